"""bitsandbytes: NF4 and FP4 in blocks of 64, and LLM.int8 weights; no data. https://bitsandbytes.foundation

`nf4-double` quantizes the scales too, as QLoRA does. `int8` is LLM.int8: weights per row and inputs per token, with
columns of inputs above its threshold of 6.0 left in 16 bit when the model runs; here the threshold is 0, which is W8A8.
"""

from common import PER_TOKEN_INT8, Job, Quantized, decoded, decoder_linears, main, tensor_bits

SUPPORTED = {
    "nf4": ("W4A16-g64",), "nf4-double": ("W4A16-g64",), "fp4": ("W4A16-g64",), "int8": ("W8A8",),
}  # fmt: skip


def quantize(job: Job) -> Quantized:
    import torch
    from bitsandbytes import functional

    linears = decoder_linears(job.load())
    weights, bits = {}, 0
    if job.method == "int8":
        with job.clock:
            made = {
                name: functional.int8_vectorwise_quant(each.weight.data.half())[:2] for name, each in linears.items()
            }
        for name, (codes, scales) in made.items():
            weights.update([decoded(name, codes.float() * scales[:, None] / 127)])
            bits += tensor_bits(codes, scales)
        return Quantized(weights=weights, bits=bits, inputs=PER_TOKEN_INT8)
    kind, _, double = job.method.partition("-")
    with job.clock:
        packed = {
            name: functional.quantize_4bit(
                each.weight.data, blocksize=job.scheme.group, quant_type=kind, compress_statistics=bool(double)
            )
            for name, each in linears.items()
        }
    for name, (codes, state) in packed.items():
        state.dtype = torch.float32
        weights.update([decoded(name, functional.dequantize_4bit(codes, state))])
        bits += tensor_bits(codes, state.absmax)
        if state.nested:
            bits += tensor_bits(state.state2.absmax, state.offset)
    return Quantized(weights=weights, bits=bits)


if __name__ == "__main__":
    raise SystemExit(main("bitsandbytes", "bitsandbytes", SUPPORTED, quantize))
