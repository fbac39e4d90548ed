"""torchao: `quantize_` with its configurations. https://github.com/pytorch/ao

`rtn` is `IntxWeightOnlyConfig` (symmetric unless `-asym`), `hqq` the same with its algorithm "hqq_scale_only", and W8A8
is `Int8DynamicActivationInt8WeightConfig`. Codes below 8 bits lie one to a byte in these tensors, which were made for
export to kernels that pack them; they are counted as packed. Scales are in the model's dtype.

`awq` is its prototype on `PrototypeInt4WeightOnlyConfig`, whose 4-bit tensors are the only ones on a CPU that it takes.
It keeps a scale for every input of every Linear and multiplies by it when the model runs, where others fold it into the
layer before; here it is folded into the decoded weights, and counted.
"""

from typing import Any

from common import BUDGETS, PER_TOKEN_INT8, Job, PeerError, Quantized, decoded, decoder_linears, main, tensor_bits

SUPPORTED = {"rtn": (*BUDGETS, "W8A8"), "rtn-asym": BUDGETS, "hqq": BUDGETS, "awq": BUDGETS[:3]}


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
    if job.method == "awq":
        return awq(job, model, names)
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


def awq(job: Job, model: Any, names: set[str]) -> Quantized:
    """Quantize with the AWQ prototype: prepare, run the calibration windows, convert."""
    import torch
    from torchao.prototype.awq import AWQConfig
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    base = PrototypeInt4WeightOnlyConfig(group_size=job.scheme.group)
    with job.clock:
        quantize_(model, AWQConfig(base, step="prepare"), filter_fn=lambda _, name: name in names)
        with torch.no_grad():
            for window in job.tokens:
                model(input_ids=window[None])
        quantize_(model, AWQConfig(base, step="convert"), filter_fn=lambda _, name: name in names)
    weights, bits = {}, 0
    for name in names:
        made = model.get_submodule(name).weight
        if not hasattr(made, "scale_and_zero"):
            raise PeerError(f"{name}: left as it was.")
        weights.update([decoded(name, decode_packed(made))])
        bits += job.scheme.weight_bits * made.numel() + tensor_bits(made.scale_and_zero, made.act_pre_scale)
    return Quantized(weights=weights, bits=bits, settings={"config": repr(base)})


def decode_packed(made: Any) -> Any:
    """The weight of a packed 4-bit tensor times its inputs' scales, in float32.

    The packing is the kernel's own, so codes are read off the kernel's product with the identity, rounded to where its
    scales and zeros say that they are.
    """
    import torch

    num_rows, num_columns = made.shape
    before, made.act_pre_scale = made.act_pre_scale.float(), None
    seen = torch.nn.functional.linear(torch.eye(num_columns, dtype=made.dtype), made).T.float()
    made.act_pre_scale = before.to(made.dtype)
    scale, zero = (made.scale_and_zero[..., part].T.float()[..., None] for part in (0, 1))
    codes = torch.round((seen.reshape(num_rows, scale.shape[1], -1) - zero) / scale) + 8
    if codes.min() < 0 or codes.max() > 15:
        raise PeerError(f"codes from {codes.min():g} to {codes.max():g} are not 4 bits.")
    return ((codes - 8) * scale + zero).reshape(num_rows, num_columns) * before


if __name__ == "__main__":
    raise SystemExit(main("torchao", "torchao", SUPPORTED, quantize))
