"""optimum-quanto: `quantize` and `freeze`, no data. https://github.com/huggingface/optimum-quanto

qint4 and qint2 come in groups with a float shift, and the group is what quanto chooses: 128 where a row has whole
groups of 128, else 64 or 32. Ranges are its default optimizers'. W8A8 is qint8 weights alone: its int8 activations have
static scales per tensor, which is another scheme, so that cell is not here.
"""

from common import Job, PeerError, Quantized, decoded, decoder_linears, main, tensor_bits

SUPPORTED = {"rtn": ("W4A16-g128", "W2A16-g128", "W8A16"), "hqq": ("W4A16-g128", "W2A16-g128")}


def quantize(job: Job) -> Quantized:
    from optimum.quanto import HqqOptimizer, freeze, qint2, qint4, qint8, quantize

    formats = {2: qint2, 4: qint4, 8: qint8}
    model = job.load()
    names = list(decoder_linears(model))
    options = {"optimizer": HqqOptimizer()} if job.method == "hqq" else {}
    with job.clock:
        quantize(model, weights=formats[job.scheme.weight_bits], exclude="lm_head", **options)
        freeze(model)
    weights, bits, groups = {}, 0, set()
    for name in names:
        made = model.get_submodule(name).weight
        groups.add(getattr(made, "_group_size", None))
        if hasattr(made, "_scale_shift"):  # scales and shifts as the kernel of 4-bit weights in bfloat16 has them
            bits += job.scheme.weight_bits * made.numel() + tensor_bits(made._scale_shift)
            made._scale_shift = made._scale_shift.float()
        else:
            bits += tensor_bits(getattr(made._data, "_data", made._data), made._scale, getattr(made, "_shift", None))
            made._scale = made._scale.float()
            if hasattr(made, "_shift"):
                made._shift = made._shift.float()
        weights.update([decoded(name, made.dequantize())])
    if groups != {job.scheme.group}:
        raise PeerError(f"quanto chose groups of {sorted(groups, key=str)} instead of {job.scheme.group}.")
    return Quantized(weights=weights, bits=bits, settings={"groups": sorted(groups, key=str)})


if __name__ == "__main__":
    raise SystemExit(main("quanto", "optimum-quanto", SUPPORTED, quantize))
