"""Plant one fault into a copy of a healthy quantized checkpoint: what `bitwright diagnose` is tested on.

    python scripts/break_checkpoint.py HEALTHY FAULT OUT [--site MODULE]

HEALTHY is a model directory or a run directory of `bitwright quantize`. Unless named the site is a square one in
the middle. What was planted, and where, is printed. The eight faults, one of them in two variants:

    swapped-scales        two sites of one block exchange their scales
    unquantized           the weight is stored as floats, and the configuration still says that it is quantized
    unquantized-ignored   the same, and the configuration says so
    saturated             scales a quarter of what they were, and codes clipped to what they then reach
    group-order           the scales of every row move one group on
    nan-scale             one scale is NaN
    clipped-zero-point    zero points are clipped as if a signed type had to hold them
    transposed            the codes are those of the transposed weight; square sites only
    missing               nothing is stored of the site
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.checkup.sites import rounded
from bitwright.errors import RecipeError
from bitwright.model.checkpoint import WEIGHT_INDEX, Checkpoint, open_checkpoint, scan_headers
from bitwright.model.layouts import compressed_tensors, own
from bitwright.model.layouts.stored import module_of
from bitwright.numerics.block_scales import StoredE8M0Scale
from bitwright.numerics.grid import Grid
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.qtensor import QTensor
from bitwright.runs import RUN_FILE, open_run

SHRINK = 4.0
E8M0_NAN = 255
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Patient:
    """A healthy checkpoint and the site to harm."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    site: str

    def decoded(self) -> QuantizedSite:
        return self.checkpoint.read_packed(f"{self.site}.weight")

    def grid(self) -> Grid:
        grid = self.decoded().weight.grid
        if not isinstance(grid, Grid):
            raise RecipeError(f"{self.site}: has tables and no scales. Choose another checkpoint.")
        return grid

    def stored(self, site: str | None = None) -> Tensors:
        """What is stored of a site, by full names."""
        module = self.site if site is None else site
        names = [name for name in self.checkpoint.stored if name.rpartition(".")[0] == module]
        return self.checkpoint.read_stored(names)

    def encoded(self, weight: QTensor) -> Tensors:
        """Another weight in the place of the site's."""
        site = replace(self.decoded(), weight=weight)
        quantization = self.config["quantization_config"]
        if quantization["quant_method"] == own.NAME:
            parts = own.encode(site) | {own.GUARD: own.guard(self.checkpoint.dense_dtype)}
        else:
            parts = compressed_tensors.encode(self.layout(), site)
        return {f"{self.site}.{name}": tensor for name, tensor in parts.items()}

    def layout(self) -> str:
        quantization = self.config["quantization_config"]
        for group in quantization["config_groups"].values():
            if self.site in group["targets"] or "Linear" in group["targets"]:
                return str(group.get("format") or quantization["format"])
        raise RecipeError(f"{self.site}: no config group names it. Choose another --site.")


def swapped_scales(patient: Patient) -> tuple[Tensors, list[str]]:
    here = patient.stored()
    for name in patient.checkpoint.packed_names():
        other = module_of(name)
        there = patient.stored(other)
        one, two = f"{patient.site}.weight_scale", f"{other}.weight_scale"
        is_near = other.rpartition(".")[0] == patient.site.rpartition(".")[0]
        if other != patient.site and is_near and here[one].shape == there[two].shape:
            return {one: there[two], two: here[one]}, [patient.site, other]
    raise RecipeError(f"{patient.site}: no site beside it has scales of the same shape. Choose another --site.")


def unquantized(patient: Patient) -> tuple[Tensors, list[str]]:
    name = f"{patient.site}.weight"
    return {name: patient.checkpoint.read([name])[name]}, [patient.site]


def saturated(patient: Patient) -> tuple[Tensors, list[str]]:
    grid = _shrunk(patient.grid(), patient.site)
    dense = patient.decoded().weight.dequantize()
    return patient.encoded(QTensor(codes=grid.quantize(dense), grid=grid)), [patient.site]


def _shrunk(grid: Grid, site: str) -> Grid:
    """The grid with scales a quarter as large, as they would be stored."""
    if grid.stored is None:
        return replace(grid, scale=grid.scale / SHRINK)
    if not isinstance(grid.stored, StoredE8M0Scale):
        raise RecipeError(f"{site}: its scales have two levels. Choose a checkpoint with floats or powers of two.")
    octaves = int(math.log2(SHRINK))
    stored = replace(grid.stored, scale=grid.stored.scale.clamp_min(octaves + 1) - octaves)
    return replace(grid, scale=stored.values(), stored=stored)


def group_order(patient: Patient) -> tuple[Tensors, list[str]]:
    num_groups = patient.grid().scale.shape[1]
    if num_groups < 2:
        raise RecipeError(f"{patient.site}: one group per row, so that there is no order. Choose another checkpoint.")
    moved = {
        name: tensor.roll(1, 1).contiguous()
        for name, tensor in patient.stored().items()
        if name.endswith(("weight_scale", "weight_zero_point")) and tensor.shape[-1] == num_groups
    }
    return moved, [patient.site]


def nan_scale(patient: Patient) -> tuple[Tensors, list[str]]:
    name = f"{patient.site}.weight_scale"
    scale = patient.stored()[name]
    scale.view(-1)[0] = E8M0_NAN if scale.dtype == torch.uint8 else math.nan
    return {name: scale}, [patient.site]


def clipped_zero_point(patient: Patient) -> tuple[Tensors, list[str]]:
    grid = patient.grid()
    if grid.zero_point is None:
        raise RecipeError(f"{patient.site}: has no zero points. Choose an asymmetric scheme, such as W4A16-g128-asym.")
    clipped = grid.zero_point.clamp(max=grid.format.num_codes // 2 - 1)
    codes = patient.decoded().weight.codes
    return patient.encoded(QTensor(codes=codes, grid=replace(grid, zero_point=clipped))), [patient.site]


def transposed(patient: Patient) -> tuple[Tensors, list[str]]:
    grid = patient.grid()
    turned = patient.decoded().weight.dequantize().T.contiguous()
    if turned.shape[0] != turned.shape[1]:
        raise RecipeError(f"{patient.site}: {list(turned.T.shape)} is not square. Choose q_proj or o_proj.")
    fitted = rounded(turned, patient.decoded().weight).grid
    assert isinstance(fitted, Grid)
    if fitted.stored is None:
        fitted = replace(fitted, scale=fitted.scale.to(grid.scale.dtype))
    return patient.encoded(QTensor(codes=fitted.quantize(turned), grid=fitted)), [patient.site]


def missing(patient: Patient) -> tuple[Tensors, list[str]]:
    return {}, [patient.site]


FAULTS: dict[str, Callable[[Patient], tuple[Tensors, list[str]]]] = {
    "swapped-scales": swapped_scales,
    "unquantized": unquantized,
    "unquantized-ignored": unquantized,
    "saturated": saturated,
    "group-order": group_order,
    "nan-scale": nan_scale,
    "clipped-zero-point": clipped_zero_point,
    "transposed": transposed,
    "missing": missing,
}
REPLACES_ALL = ("unquantized", "unquantized-ignored", "missing")
"""Faults after which nothing of what was stored of the site is left."""


def plant(healthy: Path, fault: str, out: Path, *, site: str | None = None) -> list[str]:
    """Write a copy of a model directory with one fault; return the modules that have it."""
    source = open_run(healthy).model if (healthy / RUN_FILE).is_file() else healthy
    checkpoint = open_checkpoint(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    patient = Patient(checkpoint=checkpoint, config=config, site=site or _middle_site(checkpoint))
    if f"{patient.site}.weight" not in checkpoint.packed_names():
        raise RecipeError(f"{patient.site}: not a quantized module of {source}.")
    changed, modules = FAULTS[fault](patient)
    shutil.copytree(source, out)
    removed = set(patient.stored()) if fault in REPLACES_ALL else set()
    _rewrite(checkpoint, out, changed, removed)
    if fault == "unquantized-ignored":
        _leave_out(config, patient.site)
        (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return modules


def _middle_site(checkpoint: Checkpoint) -> str:
    """A square site in the middle of the model, which every fault can be planted in."""
    square = [name for name in checkpoint.packed_names() if len(set(checkpoint.shape(name))) == 1]
    if not square:
        raise RecipeError(f"{checkpoint.path}: no square site. Name one with --site.")
    return module_of(square[len(square) // 2])


def _rewrite(checkpoint: Checkpoint, out: Path, changed: Tensors, removed: set[str]) -> None:
    """Change tensors in the shards that hold them; new ones go beside others of their module."""
    touched = removed | changed.keys()
    shards = {checkpoint.stored[name].file for name in touched & checkpoint.stored.keys()}
    placed: set[str] = set()
    for shard in sorted(shards):
        tensors = {name: tensor for name, tensor in load_file(shard).items() if name not in removed}
        new = {
            name: tensor
            for name, tensor in changed.items()
            if name in tensors or (name not in placed and name not in checkpoint.stored) or name in removed
        }
        placed |= new.keys()
        target = out / shard.relative_to(checkpoint.path)
        save_file({**tensors, **{name: t.contiguous() for name, t in new.items()}}, target, metadata={"format": "pt"})
    infos = scan_headers(sorted(out.glob("*.safetensors")))
    index = {"metadata": {}, "weight_map": {name: info.file.name for name, info in sorted(infos.items())}}
    (out / WEIGHT_INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _leave_out(config: dict[str, Any], site: str) -> None:
    """Let the configuration say that a site is not quantized."""
    quantization = config["quantization_config"]
    for modules in quantization.get("schemes", {}).values():
        if site in modules:
            modules.remove(site)
    for group in quantization.get("config_groups", {}).values():
        group["targets"] = [target for target in group["targets"] if target != site]
    if "ignore" in quantization:
        quantization["ignore"] = [*quantization["ignore"], site]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("healthy", type=Path)
    parser.add_argument("fault", choices=sorted(FAULTS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--site")
    given = parser.parse_args()
    modules = plant(given.healthy, given.fault, given.out, site=given.site)
    print(f"{given.out}: {given.fault} in {' and '.join(modules)}")


if __name__ == "__main__":
    main()
