"""GPTQModel: GPTQ and RTN by `GPTQModel.quantize`. https://github.com/ModelCloud/GPTQModel

Configurations are its own defaults (symmetric, with group-aware activation order) but for bits and group; `-asym` sets
`sym=False`. What is judged is what `save` stored, read back and decoded by its own layers.
Quantizing on a CPU of two cores needs GPTQMODEL_CPU_WORKERS=2: its pool has one worker there, and its loader wants two.
"""

import os

from common import BUDGETS, Job, Quantized, decoded, decoder_linears, main, stored_tensors, tensor_bits

SUPPORTED = {"gptq": BUDGETS, "gptq-asym": BUDGETS, "rtn": BUDGETS}  # its AWQ needs CUDA


def config(job: Job) -> object:
    """The configuration of a method."""
    from gptqmodel.quantization.config import GPTQConfig, RTNConfig

    kind = RTNConfig if job.method == "rtn" else GPTQConfig
    other = {"sym": False} if job.method.endswith("-asym") else {}
    return kind(bits=job.scheme.weight_bits, group_size=job.scheme.group, offload_to_disk=False, **other)


def quantize(job: Job) -> Quantized:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel

    asked = config(job)
    model = GPTQModel.load(str(job.model), asked, device="cpu", dtype=job.dtype)
    names = list(decoder_linears(model.model))
    samples = [{key: value[0] for key, value in sample.items()} for sample in job.samples()]
    with job.clock:
        model.quantize(None if job.method == "rtn" else samples, batch_size=1)
    model.save(str(job.scratch))
    stored = dict(stored_tensors(job.scratch))
    loaded = GPTQModel.load(str(job.scratch), backend=BACKEND.TORCH, device="cpu")
    modules = dict(loaded.model.named_modules())
    weights = {}
    for name in names:
        layer = modules[name]
        layer.scales = layer.scales.float()  # then it decodes in float32
        weights.update([decoded(name, layer.dequantize_weight().T)])
    bits = sum(
        tensor_bits(value)
        for key, value in stored.items()
        if key.rpartition(".")[0] in set(names) and not key.endswith(("g_idx", "bias"))
    )
    return Quantized(
        weights=weights,
        bits=bits,
        others={key: value.float() for key, value in stored.items() if "norm" in key},
        settings={"layer": type(layer).__name__, "sym": asked.sym},
    )


if __name__ == "__main__":
    raise SystemExit(main("gptqmodel", "gptqmodel", SUPPORTED, quantize))
