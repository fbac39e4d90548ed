"""Write a quantized model as a Hugging Face directory in the compressed-tensors `pack-quantized` layout.

The directory is written shard by shard, one per decoder block and one for the rest, each under a temporary name first,
so that a run that dies leaves whole shards or none. Tensors that are not quantized are copied as the original stores
them.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bitwright.errors import RecipeError, ShapeError
from bitwright.model import packed
from bitwright.model.checkpoint import WEIGHT_INDEX, Checkpoint
from bitwright.model.sites import Site
from bitwright.model.skeleton import Skeleton
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.qtensor import QTensor
from bitwright.recipe import SitePlan
from bitwright.records import write_json_atomic

NOT_COPIED = ("config.json", WEIGHT_INDEX, "README.md", "quantize_config.json")
EXPERTS = r"re:.*\.experts\.\d+\..*"
"""Experts as checkpoints name them, one by one, where the model holds one 3-D parameter."""
KEPT = "kept in 16 bit"
COPIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")


def check_plan(sites: Iterable[Site], plan: Mapping[str, SitePlan]) -> None:
    """Refuse a plan whose result the layout cannot hold or transformers cannot read, before any work.

    Transformers (5.23) reads the experts of a 3-D parameter by one scheme without zero points, and other weights with
    zero points by one scheme.

    Raises:
        ShapeError: transposed weights (GPT-2's Conv1D).
        RecipeError: schemes that cannot be read back side by side.
    """
    experts: set[str] = set()
    others: set[str] = set()
    for site in sites:
        entry = plan[site.name]
        if entry.scheme is not None and site.transposed:
            raise ShapeError(
                f"{site.name}: stored as [in, out] (Conv1D), which compressed-tensors cannot hold. "
                "Ignore it, or convert the model to Linear weights first."
            )
        if site.index is not None:
            experts.add(_treatment(entry))
        elif entry.scheme is not None:
            others.add(_treatment(entry))
    if len(experts) > 1 or any(name == KEPT or name.endswith("-asym") for name in experts):
        raise RecipeError(
            f"experts: {', '.join(sorted(experts))}. Transformers reads the experts of this model only if all are "
            "quantized by one symmetric scheme. Give them one, by a rule if the other sites have another."
        )
    if len(others) > 1 and any(name.endswith("-asym") for name in others):
        raise RecipeError(
            f"schemes {', '.join(sorted(others))}: transformers reads an asymmetric scheme only if all sites have it. "
            "Use symmetric ones, or one scheme whose group size divides every row (or channel)."
        )


def _treatment(entry: SitePlan) -> str:
    """The scheme with the group size that is really used, or KEPT."""
    if entry.scheme is None or entry.granularity is None:
        return KEPT
    return str(replace(entry.scheme, granularity=entry.granularity))


class ModelWriter:
    """Writes the shards of one quantized model into a directory."""

    def __init__(self, skeleton: Skeleton, directory: Path, num_shards: int) -> None:
        self.skeleton, self.directory, self.num_shards = skeleton, directory, num_shards
        self.checkpoint: Checkpoint = skeleton.checkpoint

    def shard_path(self, index: int) -> Path:
        """File of shard `index`: one per block, then one for the rest."""
        return self.directory / f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def write_shard(self, index: int, stored_names: Iterable[str], quantized: dict[Site, QTensor]) -> dict[str, Tensor]:
        """Write the tensors called `stored_names`, the quantized ones packed; return what was written."""
        tensors: dict[str, Tensor] = {}
        for site, result in quantized.items():
            for name, rows in self.pieces(site, result):
                tensors.update(packed.encode(name, rows))
        replaced = {name.removesuffix("_packed") for name in tensors if name.endswith("_packed")}
        tensors.update(self.checkpoint.read([name for name in stored_names if name not in replaced]))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_tensors_atomic(self.shard_path(index), tensors)
        return tensors

    def pieces(self, site: Site, result: QTensor) -> list[tuple[str, QTensor]]:
        """Cut a site's result into the tensors that the checkpoint stores (experts' gate and up are separate there)."""
        pieces = self.skeleton.stored_pieces(site.parameter)
        wanted = [piece for piece in pieces if piece[1] == site.index]
        return [(name, result.rows(first, end)) for name, _, first, end in wanted]

    def finish(self, sites: Sequence[Site], plan: dict[str, SitePlan]) -> None:
        """Write what makes the directory complete: index, configuration, tokenizer, generation configuration."""
        weight_map: dict[str, str] = {}
        total = 0
        for index in range(self.num_shards):
            shard = self.shard_path(index)
            for name, num_bytes in tensor_sizes(shard).items():
                weight_map[name] = shard.name
                total += num_bytes
        write_json_atomic(
            self.directory / WEIGHT_INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        config = dict(self.checkpoint.config)
        config["quantization_config"] = self.quantization_config(sites, plan)
        write_json_atomic(self.directory / "config.json", config)
        for file in sorted(self.checkpoint.path.iterdir()):
            if file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED and file.is_file():
                shutil.copyfile(file, self.directory / file.name)

    def quantization_config(self, sites: Sequence[Site], plan: dict[str, SitePlan]) -> dict[str, Any]:
        """One config group per distinct scheme; a single scheme targets `Linear` and lists what it leaves alone."""
        modules: dict[tuple[int, bool, Granularity, bool], list[str]] = {}
        for site in sites:
            entry = plan[site.name]
            if entry.scheme is None:
                continue
            assert entry.granularity is not None
            number_format = entry.scheme.weight_format
            key = (number_format.bits, number_format.symmetric, entry.granularity, site.index is not None)
            names = [piece[0] for piece in self.skeleton.stored_pieces(site.parameter) if piece[1] == site.index]
            modules.setdefault(key, []).extend(name.removesuffix(".weight") for name in names)
        quantized = {name for names in modules.values() for name in names}
        if len({key[:3] for key in modules}) == 1:
            groups = [packed.config_group(*next(iter(modules))[:3], ["Linear"])]
        else:
            # Transformers takes for the experts the group whose pattern says so, and for the rest any other.
            groups = [packed.config_group(*key[:3], [EXPERTS] if key[3] else names) for key, names in modules.items()]
        config = packed.quantization_config(groups, sorted(self._linears() - quantized))
        if not all(symmetric for _, symmetric, _, _ in modules):
            # Tells transformers to dequantize as it reads. Otherwise it expects zero points that are not packed,
            # because compressed-tensors 0.20 forgets to pack them on the meta device.
            config["dequantize"] = True
        return config

    def _linears(self) -> set[str]:
        """Names, as stored, of all Linear modules of the model."""
        names = {name for name, module in self.skeleton.model.named_modules() if isinstance(module, nn.Linear)}
        stored = {source: name for name, sources in self.skeleton.sources.items() for source in sources}
        direct = {
            source.removesuffix(".weight") for source, name in stored.items() if name.removesuffix(".weight") in names
        }
        tied = {name for name in names if f"{name}.weight" in self.skeleton.tied_names()}
        return direct | tied


def tensor_sizes(shard: Path) -> dict[str, int]:
    """Names and sizes in bytes of one shard's tensors, from its header."""
    with shard.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def reread_equals(shard: Path, written: dict[str, Tensor]) -> list[str]:
    """Read a shard back from disk and return the names of tensors that differ from what was written."""
    found = set(tensor_sizes(shard))
    different = [name for name in written if name not in found]
    for name in sorted(found & written.keys()):
        # Opened anew for each tensor: a mapped file counts as memory as far as it was read.
        with safe_open(shard, framework="pt") as handle:  # pyright: ignore[reportUnknownVariableType]
            if not torch.equal(cast(Tensor, handle.get_tensor(name)), written[name]):
                different.append(name)
    return different + sorted(found - written.keys())
