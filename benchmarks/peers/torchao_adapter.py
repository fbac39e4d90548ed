"""torchao: `quantize_` with its configurations, no data. https://github.com/pytorch/ao

`rtn` is `IntxWeightOnlyConfig` (symmetric unless `-asym`), `hqq` the same with its algorithm "hqq_scale_only", and W8A8
is `Int8DynamicActivationInt8WeightConfig`. Codes below 8 bits lie one to a byte in these tensors, which were made for
export to kernels that pack them; they are counted as packed. Scales are in the model's dtype.
"""

from typing import Any

from common import PER_TOKEN_INT8, Job, PeerError, Quantized, decoded, decoder_linears, main, tensor_bits

BUDGETS = ("W4A16-g128", "W4A16-g32", "W3A16-g128", "W2A16-g64")
SUPPORTED = {"rtn": (*BUDGETS, "W8A8"), "rtn-asym": BUDGETS, "hqq": BUDGETS}


def config(job: Job) -> Any:
    """The configuration of a method."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, MappingType, PerGroup

    if job.scheme.input_bits == 8:
        return Int8DynamicActivationInt8WeightConfig()
    options: dict[str, Any] = {}
    if job.method == "rtn-asym":
        options["mapping_type"] = MappingType.ASYMMETRIC
    if job.method == "hqq":
        options["intx_choose_qparams_algorithm"] = "hqq_scale_only"
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.scheme.weight_bits}"), granularity=PerGroup(job.scheme.group), **options
    )


def quantize(job: Job) -> Quantized:
    from torchao.quantization import quantize_

    model = job.load()
    names = set(decoder_linears(model))
    asked = config(job)
    with job.clock:
        quantize_(model, asked, filter_fn=lambda _, name: name in names)
    weights, bits = {}, 0
    for name in names:
        made = model.get_submodule(name).weight
        if not hasattr(made, "qdata"):
            raise PeerError(f"{name}: left as it was.")
        scale, zero = made.scale, made.zero_point
        groups = made.qdata.float().reshape(*scale.shape[:1], -1, made.qdata.shape[1] // max(1, scale[0].numel()))
        shift = 0.0 if zero is None else zero.float().reshape(*groups.shape[:2], 1)
        value = (groups - shift) * scale.float().reshape(*groups.shape[:2], 1)
        weights.update([decoded(name, value.reshape(made.qdata.shape))])
        bits += job.scheme.weight_bits * made.qdata.numel() + tensor_bits(scale)
        if zero is not None and zero.any():
            bits += job.scheme.weight_bits * zero.numel()
    inputs = PER_TOKEN_INT8 if job.scheme.input_bits == 8 else None
    return Quantized(weights=weights, bits=bits, inputs=inputs, settings={"config": repr(asked)})


if __name__ == "__main__":
    raise SystemExit(main("torchao", "torchao", SUPPORTED, quantize))
