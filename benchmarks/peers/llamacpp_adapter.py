"""llama.cpp: K-quants of a GGUF file, by `llama_model_quantize` of llama-cpp-python. https://github.com/ggml-org/llama.cpp

A Llama is written as GGUF (float32, query and key rows in llama.cpp's order, no vocabulary), quantized, and decoded by
the package `gguf`. A method is a file type: it gives most tensors one K-quant and some a better one, so its bits per
weight are those of its blocks' tensors as they lie in the file. `-imatrix` weighs errors by the mean square of every
input on the calibration windows, which is what llama-imatrix collects; it is collected here, in PyTorch.

Rows that are not whole blocks of 256 weights silently get another type: `settings.types` counts what they really got.
"""

import ctypes
from pathlib import Path
from typing import Any

from common import Job, PeerError, Quantized, decoder_linears, main

FILE_TYPES = {
    "q8_0": (7, "W8A16-g32"), "q4_k_m": (15, "W4A16-g32"), "q4_k_s": (14, "W4A16-g32"), "q3_k_m": (12, "W3A16-g16"),
    "q3_k_s": (11, "W3A16-g16"), "q2_k": (10, "W2A16-g16"), "iq4_xs": (30, "W4A16-g32"), "iq3_s": (26, "W3A16-g32"),
    "iq2_s": (28, "W2A16-g16"),
}  # fmt: skip
"""Name -> number in llama.h, and the scheme of ours with as many code bits and the same (smallest) group."""
IMATRIX = "-imatrix"
SUPPORTED = {
    **{name: (scheme,) for name, (_, scheme) in FILE_TYPES.items() if not name.startswith("iq2")},  # which needs one
    **{f"{name}{IMATRIX}": (scheme,) for name, (_, scheme) in FILE_TYPES.items() if name != "q8_0"},  # which uses none
}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(module: str) -> str:
    """The name of a module's weight in a GGUF file."""
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    _, _, index, rest = module.split(".", 3)
    if rest not in NAMES:
        raise PeerError(f"{module}: only Llama's modules have names here.")
    return f"blk.{index}.{NAMES[rest]}.weight"


def to_pairs(weight: Any, num_heads: int) -> Any:
    """Query or key rows in llama.cpp's order: the two halves of a rotation side by side."""
    rows = weight.shape[0]
    return weight.reshape(num_heads, 2, rows // num_heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)


def to_halves(weight: Any, num_heads: int) -> Any:
    """The inverse of `to_pairs`."""
    rows = weight.shape[0]
    return weight.reshape(num_heads, rows // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)


def heads_of(module: str, config: Any) -> int | None:
    """How many heads the rows of a query or key projection belong to; None for another module."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module.rpartition(".")[2])


def write_gguf(model: Any, path: Path) -> None:
    """Write a Llama as a GGUF file in float32."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("no_vocab")
    for name, value in model.named_parameters():
        module = name.removesuffix(".weight")
        array = value.detach().float().numpy()
        heads = heads_of(module, config)
        writer.add_tensor(gguf_name(module), array if heads is None else to_pairs(array, heads).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(job: Job, model: Any) -> dict[str, Any]:
    """The mean square of every input of every Linear over the calibration windows, by GGUF name."""
    import torch

    sums: dict[str, Any] = {}

    def add(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).square().sum(0)

        return hook

    hooks = [each.register_forward_pre_hook(add(gguf_name(name))) for name, each in decoder_linears(model).items()]
    with torch.no_grad():
        for window in job.tokens:
            model(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    return {name: (value / job.tokens.numel()).numpy() for name, value in sums.items()}


def quantize_file(source: Path, target: Path, file_type: int, threads: int, matrix: dict[str, Any]) -> None:
    """Let llama.cpp quantize a file."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, threads
    kept = []
    if matrix:
        kept = as_imatrix(matrix)
        params.imatrix = kept[0]
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    del kept
    if code:
        raise PeerError(f"llama_model_quantize returned {code}.")


def as_imatrix(matrix: dict[str, Any]) -> list[Any]:
    """The array that llama.cpp takes, and what it points to."""
    import llama_cpp

    arrays = [value.astype("float32") for value in matrix.values()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()  # the last one has no name
    for entry, name, array in zip(entries, matrix, arrays, strict=False):
        entry.name, entry.size = name.encode(), array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return [entries, arrays]


def quantize(job: Job) -> Quantized:
    import torch
    from gguf import GGUFReader, dequantize

    model = job.load().float()
    kind = job.method.removesuffix(IMATRIX)
    source, target = job.scratch / "f32.gguf", job.scratch / f"{kind}.gguf"
    write_gguf(model, source)
    with job.clock:
        matrix = importance(job, model) if job.method.endswith(IMATRIX) else {}
        quantize_file(source, target, FILE_TYPES[kind][0], torch.get_num_threads(), matrix)
    tensors = {each.name: each for each in GGUFReader(target).tensors}
    weights, bits, types = {}, 0, {}
    for name, linear in decoder_linears(model).items():
        tensor = tensors[gguf_name(name)]
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).reshape(linear.weight.shape).copy())
        heads = heads_of(name, model.config)
        weights[f"{name}.weight"] = value.contiguous() if heads is None else to_halves(value, heads).contiguous()
        bits += 8 * int(tensor.n_bytes)
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    for path in (source, target):
        path.unlink()
    return Quantized(weights=weights, bits=bits, settings={"types": types})


if __name__ == "__main__":
    raise SystemExit(main("llamacpp", "llama-cpp-python", SUPPORTED, quantize))
