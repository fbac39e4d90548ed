"""Export to bitsandbytes: NF4 and FP4 weights as transformers loads them with bitsandbytes, in 4 bits, for QLoRA.

A run in bitwright's own layout is rewritten shard by shard; no code and no scale changes. The copy is read back, and
must stand for the very weights of the run; then transformers loads it.
"""

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitwright.errors import MissingDependency, RunError, VerificationError
from bitwright.exporters.model_writer import reread_equals, tensor_sizes
from bitwright.exporters.reload import (
    compare_logits,
    compare_weights,
    load,
    logits,
    probe_tokens,
    require_memory,
    rounding_bound,
)
from bitwright.model.checkpoint import WEIGHT_INDEX, Checkpoint, open_checkpoint
from bitwright.model.layouts import bitsandbytes, own
from bitwright.model.layouts.stored import module_of, own_schemes
from bitwright.model.skeleton import Skeleton
from bitwright.model.stream import StreamedModel
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.records import write_json_atomic
from bitwright.schemes import Scheme

REWRITTEN = ("*.safetensors", WEIGHT_INDEX, "config.json")
USE_INSTEAD = "Export it with --to bitwright, or quantize again with nf4-b64 or nf4-b64-dq for every site."


def write_bitsandbytes(source: Path, target: Path) -> None:
    """Write a run's model directory in bitsandbytes' layout, and read the copy back.

    Raises:
        RunError: a site that bitsandbytes cannot hold, or sites of several kinds.
        CheckpointError: a model whose code comes with it, which is not run here.
        VerificationError: a file does not hold what was written, or stands for other weights.
    """
    checkpoint = open_checkpoint(source)
    schemes = own_schemes(checkpoint.config["quantization_config"], source)
    quant_type, nested = _common_kind(checkpoint, schemes)
    config = _config(checkpoint, quant_type, nested)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*REWRITTEN))
    shards: dict[str, list[str]] = {}
    for name in checkpoint.names:
        shards.setdefault(checkpoint.stored[name].file.name, []).append(name)
    weight_map: dict[str, str] = {}
    total = 0
    for shard, names in sorted(shards.items()):
        _write_shard(checkpoint, names, target / shard)
        sizes = tensor_sizes(target / shard)
        weight_map |= dict.fromkeys(sizes, shard)
        total += sum(sizes.values())
    write_json_atomic(
        target / WEIGHT_INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    write_json_atomic(target / "config.json", config)
    _require_same_weights(checkpoint, open_checkpoint(target))


def verify_with_bitsandbytes(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Load a directory with transformers and bitsandbytes; compare with our own, streamed, reading of the files.

    Logits are those of the packed model, and must agree within the rounding of the stored type. Weights are compared
    after bitsandbytes has dequantized them, and must be equal to the last bit.

    Raises:
        MissingDependency: bitsandbytes or accelerate is not installed.
        ResourceError: the whole model does not fit into memory.
        VerificationError: they differ, or transformers cannot load it.
    """
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(
                f"verification loads the export with transformers, which needs {package}. "
                "pip install bitsandbytes accelerate, or give --no-verify."
            )
    checkpoint = open_checkpoint(directory)
    ours = StreamedModel(checkpoint, dtype=checkpoint.dense_dtype, trust_remote_code=trust_remote_code)
    require_memory(ours, ours.dtype)
    ids = probe_tokens(ours)
    # Transformers puts such models onto a GPU, where there is one; what is compared is on the CPU.
    theirs = cast(nn.Module, cast(Any, load(directory, trust_remote_code=trust_remote_code)).to("cpu"))
    _use_plain_kernel(theirs)
    found, expected = logits(directory, theirs, ids), ours.logits(ids)
    dense = cast(nn.Module, cast(Any, theirs).dequantize(dtype=ours.dtype))
    return {
        "engine": "transformers with bitsandbytes",
        "weights_compared": compare_weights(dense, ours),
        **compare_logits(directory, found, expected, rounding_bound(ours, expected)),
    }


def _common_kind(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> tuple[str, bool]:
    """The type and whether scales are quantized, which the configuration says once for the whole model."""
    kinds: dict[tuple[str, bool], str] = {}
    for module, scheme in schemes.items():
        quant_type = bitsandbytes.quant_type(scheme)
        if quant_type is None:
            sizes = ", ".join(map(str, bitsandbytes.BLOCKS))
            raise RunError(
                f"{module}: bitsandbytes cannot hold {scheme}, only nf4 and fp4-bnb, with or without dq, in blocks of "
                f"{sizes}. {USE_INSTEAD}"
            )
        extra = next((each for each in own.EXTRAS if f"{module}.{each}" in checkpoint.stored), None)
        if extra is not None:
            raise RunError(f"{module}: bitsandbytes cannot hold its {extra}. {USE_INSTEAD}")
        in_features, block = checkpoint.shape(f"{module}.weight")[1], scheme.weights.granularity.group_size
        assert block is not None
        if in_features % block:
            raise RunError(
                f"{module}: rows of {in_features} weights do not end where a block of {block} ends, and bitsandbytes "
                f"counts blocks across rows. Export it with --to bitwright, or use a block that divides the rows."
            )
        kinds.setdefault((quant_type, scheme.weights.scale == "nested"), f"{module}: {scheme}")
    if len(kinds) != 1:
        raise RunError(
            f"{', '.join(kinds.values()) or checkpoint.path}: bitsandbytes needs one kind of weight in the whole "
            f"model, fp4 or nf4, with dq or without. {USE_INSTEAD}"
        )
    return next(iter(kinds))


def _config(checkpoint: Checkpoint, quant_type: str, nested: bool) -> dict[str, Any]:
    """The original's configuration, with what was quantized, how, and which Linear modules were not."""
    dtype = checkpoint.dense_dtype
    skeleton = Skeleton(checkpoint, dtype=dtype, device="cpu")
    packed = set(checkpoint.packed_names())
    quantized = {module_of(name) for name, sources in skeleton.sources.items() if packed.issuperset(sources)}
    linears = {name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)}
    config = {key: value for key, value in checkpoint.config.items() if key != "transformers_weights"}
    return config | {"quantization_config": bitsandbytes.config(quant_type, nested, dtype, sorted(linears - quantized))}


def _write_shard(checkpoint: Checkpoint, names: list[str], shard: Path) -> None:
    packed = set(checkpoint.packed_names())
    tensors: dict[str, Tensor] = checkpoint.read_stored(name for name in names if name not in packed)
    for name in packed.intersection(names):
        parts = bitsandbytes.encode(checkpoint.read_packed(name), checkpoint.dense_dtype)
        tensors |= {f"{module_of(name)}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_tensors_atomic(shard, tensors)
    if different := reread_equals(shard, tensors):
        raise VerificationError(f"{shard}: {different[0]} differs from what was written. Check the disk.")


def _require_same_weights(source: Checkpoint, copy: Checkpoint) -> None:
    for name in source.names:
        found, expected = (files.read([name]).get(name) if name in files.names else None for files in (copy, source))
        if found is None or expected is None or not torch.equal(found, expected):
            raise VerificationError(f"{copy.path}: {name} stands for other values than in {source.path}.")


def _use_plain_kernel(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would round scales to bfloat16 and repack the codes at the first call."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
