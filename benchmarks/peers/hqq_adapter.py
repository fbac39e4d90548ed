"""HQQ: no data; zero points fitted by half-quadratic splitting. https://github.com/mobiusml/hqq

`hqq` is `BaseQuantizeConfig` as it is (groups along the inputs, 4-bit zero points rounded); `hqq-axis0` groups along
the outputs, which HQQ's authors call the better quality without fast kernels. Scales and zero points are float16, the
default of `HQQLinear`, and 3-bit codes are ten to 32 bits. Where rows are not whole groups, its groups cross rows.
"""

from common import BUDGETS, Job, Quantized, decoded, decoder_linears, main, tensor_bits

SUPPORTED = {"hqq": BUDGETS, "hqq-axis0": BUDGETS}


def quantize(job: Job) -> Quantized:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    axis = 0 if job.method == "hqq-axis0" else 1
    linears = decoder_linears(job.load())
    config = BaseQuantizeConfig(nbits=job.scheme.weight_bits, group_size=job.scheme.group, axis=axis)
    with job.clock:
        layers = {
            name: HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
            for name, linear in linears.items()
        }
    return Quantized(
        weights=dict(decoded(name, layer.dequantize()) for name, layer in layers.items()),
        bits=sum(tensor_bits(layer.W_q, layer.meta["scale"], layer.meta["zero"]) for layer in layers.values()),
        settings={"axis": axis, "compute_dtype": "float16", **config["weight_quant_params"]},
    )


if __name__ == "__main__":
    raise SystemExit(main("hqq", "hqq", SUPPORTED, quantize))
