"""llm-compressor: RTN, GPTQ, AWQ and SmoothQuant by `oneshot`. https://github.com/vllm-project/llm-compressor

Weights are symmetric, as its presets W4A16 and W8A8 have them; `-asym` has a zero point. W8A8 is per channel, with
symmetric dynamic inputs per token. What is judged is what `save_pretrained` stored, decoded by compressed-tensors.
"""

import json
from typing import Any

from common import (
    BUDGETS,
    PER_TOKEN_INT8,
    Job,
    PeerError,
    Quantized,
    decoded,
    decoder_linears,
    main,
    stored_tensors,
    tensor_bits,
)

SUPPORTED = {
    "rtn": (*BUDGETS, "W8A8"),
    "rtn-asym": BUDGETS,
    "gptq": (*BUDGETS, "W8A8"),
    "gptq-asym": BUDGETS,
    "awq": BUDGETS,
    "awq-asym": BUDGETS,
    "smoothquant": ("W8A8",),
    "smoothquant-gptq": ("W8A8",),
}


def recipe(job: Job) -> list[Any]:
    """The modifiers of a method, at their own defaults but for the format."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    method = job.method.removesuffix("-asym")
    weights = {
        "num_bits": job.scheme.weight_bits, "type": "int", "symmetric": job.method == method, "dynamic": False,
        "strategy": "channel" if job.scheme.group is None else "group", "group_size": job.scheme.group,
    }  # fmt: skip
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if job.scheme.input_bits == 8:
        group["input_activations"] = {
            "num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token",
        }  # fmt: skip
    asked = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    steps: list[Any] = []
    if method.startswith("smoothquant"):
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        steps.append(SmoothQuantModifier(smoothing_strength=0.8))  # of its W8A8 example
    if method == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        # AWQ pins memory for the copy to a GPU, which torch refuses where there is none; nothing else needs one.
        IntermediatesCache.pin_memory = lambda *_: None
        steps.append(AWQModifier())
    steps.append(GPTQModifier(**asked) if method.endswith("gptq") else QuantizationModifier(**asked))
    return steps


def quantize(job: Job) -> Quantized:
    from datasets import Dataset
    from llmcompressor import oneshot

    model = job.load()
    names = list(decoder_linears(model))
    steps = recipe(job)
    windows = Dataset.from_dict(
        {"input_ids": job.tokens.tolist(), "attention_mask": [[1] * job.tokens.shape[1]] * len(job.tokens)}
    )
    with job.clock:
        oneshot(
            model=model, dataset=windows, recipe=steps, num_calibration_samples=len(job.tokens),
            max_seq_length=job.tokens.shape[1], shuffle_calibration_samples=False,
        )  # fmt: skip
    schemes = {name: model.get_submodule(name).quantization_scheme for name in names}
    model.save_pretrained(job.scratch, save_compressed=True)
    return decode(job, schemes)


def decode(job: Job, schemes: dict[str, Any]) -> Quantized:
    """Read what was saved: codes decoded by compressed-tensors itself, in float32, and the norms as they are now."""
    from compressed_tensors.compressors import BaseCompressor

    stored = dict(stored_tensors(job.scratch))
    kind = json.loads((job.scratch / "config.json").read_text())["quantization_config"]["format"]
    compressor = BaseCompressor.get_value_from_registry(kind)
    weights, bits = {}, 0
    for name, scheme in schemes.items():
        state = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        if "weight_scale" not in state:
            raise PeerError(f"{name}: saved without a scale: not quantized.")
        bits += tensor_bits(*(value for key, value in state.items() if key.startswith("weight") and "shape" not in key))
        state["weight_scale"] = state["weight_scale"].float()
        weights.update([decoded(name, compressor.decompress(state, scheme)["weight"])])
    return Quantized(
        weights=weights,
        bits=bits,
        others={key: value.float() for key, value in stored.items() if "norm" in key},
        inputs=PER_TOKEN_INT8 if job.scheme.input_bits == 8 else None,
        settings={"format": kind},
    )


if __name__ == "__main__":
    raise SystemExit(main("llmcompressor", "llmcompressor", SUPPORTED, quantize))
