"""Write a random Llama of any size as a Hugging Face directory, shard by shard: what memory benchmarks run on.

    python scripts/make_random_llama.py --out build/random-llama-1.1b

The default is TinyLlama's shape, 1.1 billion parameters. Weights are drawn as before training (normal with deviation
0.02, norms 1), each from a seed made of its name, so that the same shapes give the same bytes however they are cut
into shards. At most one shard is in memory. The tokenizer is byte-level: 256 bytes and two special tokens, so any text
tokenises.
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

DEVIATION = 0.02
CONTEXT = 2048
DTYPE = torch.bfloat16


def tensor_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the order they are stored."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    key_value = hidden // config.num_attention_heads * (config.num_key_value_heads or config.num_attention_heads)
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{block}.self_attn.k_proj.weight", (key_value, hidden)
        yield f"{block}.self_attn.v_proj.weight", (key_value, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{block}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPE)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=DTYPE).normal_(0.0, DEVIATION, generator=generator)


def cut_into_shards(config: LlamaConfig, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, shape in tensor_shapes(config):
        size = math.prod(shape) * DTYPE.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += size
    return shards


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def write_model(config: LlamaConfig, out: Path, *, shard_bytes: int, seed: int) -> int:
    """Write the whole directory; return how many parameters it holds. config.json, written last, marks it complete."""
    out.mkdir(parents=True, exist_ok=True)
    shards = cut_into_shards(config, shard_bytes)
    weight_map: dict[str, str] = {}
    num_parameters = 0
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_tensor(name, shape, seed) for name, shape in members}
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        num_parameters += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": num_parameters * DTYPE.itemsize}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    byte_tokenizer().save_pretrained(out)
    config.save_pretrained(out)
    return num_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    num_parameters = write_model(config, given.out, shard_bytes=given.shard_mb * 10**6, seed=given.seed)
    print(f"{given.out}: {num_parameters:,} parameters")


if __name__ == "__main__":
    main()
