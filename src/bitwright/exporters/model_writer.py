"""Write a quantized model as a Hugging Face directory, in compressed-tensors' layouts or in bitwright's own.

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

from bitwright.model.checkpoint import WEIGHT_INDEX, Checkpoint
from bitwright.model.layouts import compressed_tensors, own
from bitwright.model.layouts.stored import ct_config, module_of, own_config
from bitwright.model.sites import Site
from bitwright.model.skeleton import Skeleton
from bitwright.model.tensor_file import save_tensors_atomic
from bitwright.numerics.inputs import QuantizedSite
from bitwright.recipe import SitePlan
from bitwright.records import write_json_atomic
from bitwright.schemes import Scheme

NOT_COPIED = ("config.json", WEIGHT_INDEX, "README.md", "quantize_config.json")
EXPERTS = r"re:.*\.experts\.\d+\..*"
"""Experts as checkpoints name them, one by one, where the model holds one 3-D parameter."""
COPIED_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")


class ModelWriter:
    """Writes the shards of one quantized model into a directory.

    Args:
        layouts: of every quantized site, as `choose_layouts` decides.
    """

    def __init__(self, skeleton: Skeleton, directory: Path, num_shards: int, layouts: Mapping[str, str]) -> None:
        self.skeleton, self.directory, self.num_shards = skeleton, directory, num_shards
        self.layouts = layouts
        self.checkpoint: Checkpoint = skeleton.checkpoint

    def shard_path(self, index: int) -> Path:
        """File of shard `index`: one per block, then one for the rest."""
        return self.directory / f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def write_shard(
        self,
        index: int,
        stored_names: Iterable[str],
        quantized: dict[Site, QuantizedSite],
        edited: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Write the tensors called `stored_names`, the quantized ones as codes; return what was written.

        Args:
            index: of the shard.
            stored_names: all that belongs into it.
            quantized: sites whose weights become codes.
            edited: stored name -> tensor that takes the place of the original's, where it is not quantized.
        """
        tensors: dict[str, Tensor] = {}
        replaced: set[str] = set()
        for site, result in quantized.items():
            for name, rows in self.pieces(site, result):
                parts = encode(self.layouts[site.name], rows, self.checkpoint.stored[name].dtype)
                tensors.update({f"{module_of(name)}.{part}": tensor for part, tensor in parts.items()})
                replaced.add(name)
        for name, tensor in (edited or {}).items():
            if name not in replaced:
                tensors[name] = tensor
                replaced.add(name)
        tensors.update(self.checkpoint.read([name for name in stored_names if name not in replaced]))
        # safetensors refuses tensors that share memory, as the calibrated scales of one group of sites do.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_tensors_atomic(self.shard_path(index), tensors)
        return tensors

    def pieces(self, site: Site, result: QuantizedSite) -> list[tuple[str, QuantizedSite]]:
        """Cut a site's result into the tensors that the checkpoint stores (experts' gate and up are separate there)."""
        pieces = self.skeleton.stored_pieces(site.parameter)
        wanted = [piece for piece in pieces if piece[1] == site.index]
        if len(wanted) == 1:
            return [(wanted[0][0], result)]
        return [(name, replace(result, weight=result.weight.rows(first, end))) for name, _, first, end in wanted]

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
        if not config.get("dtype") and not config.get("torch_dtype"):
            # Engines would take the first tensor's, which may be that of a scale.
            config["dtype"] = str(self.checkpoint.dense_dtype).removeprefix("torch.")
        config["quantization_config"] = self.quantization_config(sites, plan)
        config.pop("transformers_weights", None)  # another name of the original's weight file
        if own.NAME in self.layouts.values():
            config["transformers_weights"] = own.NEEDS_BITWRIGHT
        write_json_atomic(self.directory / "config.json", config)
        for file in sorted(self.checkpoint.path.iterdir()):
            if file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED and file.is_file():
                shutil.copyfile(file, self.directory / file.name)

    def quantization_config(self, sites: Sequence[Site], plan: dict[str, SitePlan]) -> dict[str, Any]:
        """One config group per distinct scheme; a single scheme targets `Linear` and lists what it leaves alone."""
        modules: dict[tuple[Scheme, str, bool], list[str]] = {}
        for site in sites:
            scheme = plan[site.name].effective
            if scheme is None:
                continue
            key = (scheme, self.layouts[site.name], site.index is not None)
            names = [piece[0] for piece in self.skeleton.stored_pieces(site.parameter) if piece[1] == site.index]
            modules.setdefault(key, []).extend(module_of(name) for name in names)
        if own.NAME in self.layouts.values():
            return own_config({str(scheme): names for (scheme, _, _), names in modules.items()})
        quantized = {name for names in modules.values() for name in names}
        if len({key[:2] for key in modules}) == 1:
            scheme, layout, _ = next(iter(modules))
            groups = [(scheme, layout, ["Linear"])]
        else:
            # Transformers takes for the experts the group whose pattern says so, and for the rest any other.
            groups = [
                (scheme, layout, [EXPERTS] if are_experts else names)
                for (scheme, layout, are_experts), names in modules.items()
            ]
        config = ct_config(groups, sorted(self._linears() - quantized))
        if any(_has_packed_zero_points(scheme, layout) for scheme, layout, _ in modules):
            # Tells transformers to dequantize as it reads, and to leave inputs alone. Otherwise it expects zero points
            # that are not packed, because compressed-tensors 0.20 forgets to pack them on the meta device.
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


def _has_packed_zero_points(scheme: Scheme, layout: str) -> bool:
    return layout == compressed_tensors.PACKED and not scheme.weights.format.symmetric


def encode(layout: str, site: QuantizedSite, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the stored tensors of a site in a layout, by their names inside its module; `dtype` of the original."""
    if layout == own.NAME:
        return {own.GUARD: own.guard(dtype), **own.encode(site)}
    return compressed_tensors.encode(layout, site)


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
            found_tensor, expected = cast(Tensor, handle.get_tensor(name)), written[name]
            if not torch.equal(found_tensor.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)):
                different.append(name)
    return different + sorted(found - written.keys())
