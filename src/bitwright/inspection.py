"""Look at a model without changing it: its sites, groups and proven edges, and what common schemes would weigh."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.model.probe import probe_head, propose, prove
from bitwright.model.sites import Site
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import BlockStructure, ModelStructure, block_signature
from bitwright.preflight import estimate
from bitwright.preparation import model_sites
from bitwright.progress import Progress
from bitwright.recipe import Recipe, resolve
from bitwright.schemes import Scheme

if TYPE_CHECKING:
    from bitwright.outlier_report import SiteActivity

PROBE_WINDOWS, PROBE_TOKENS = 4, 32
WEIGHED_SCHEMES = ("W8A16-channel", "W6A16-g128", "W4A16-g128", "W4A16-g32", "W3A16-g128", "W2A16-g64")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeWeight:
    """What a model would weigh under a scheme; no size where the scheme does not fit, and `note` says why."""

    scheme: str
    size_bytes: int | None
    bits_per_weight: float | None
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What `bitwright inspect` shows.

    Attributes:
        activity: outliers and losses per group of sites; empty unless a calibration text was given.
    """

    model: str
    architecture: str
    num_parameters: int
    size_bytes: int
    structure: ModelStructure
    schemes: tuple[SchemeWeight, ...]
    unused_tensors: tuple[str, ...]
    activity: "tuple[SiteActivity, ...]" = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data in a stable order."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "num_parameters": self.num_parameters,
            "size_bytes": self.size_bytes,
            "schemes": [
                {"scheme": s.scheme, "size_bytes": s.size_bytes, "bits_per_weight": s.bits_per_weight, "note": s.note}
                for s in self.schemes
            ],
            "unused_tensors": list(self.unused_tensors),
            "structure": self.structure.to_json(),
            "activity": [entry.to_json() for entry in self.activity],
        }

    def counts(self) -> Counter[str]:
        """Sites by kind over all blocks."""
        return Counter(site.kind for block in self.structure.blocks for site in block.sites)


def inspect_model(model: StreamedModel, source: str | Path, progress: Progress) -> Inspection:
    """Probe one block of each kind, prove its edges, and weigh the common schemes.

    Blocks with equal parameter names and shapes share one proof, made on the first of them with random tokens.
    """
    checkpoint = model.skeleton.checkpoint
    sites = model_sites(model)
    return Inspection(
        model=str(source),
        architecture=type(model.skeleton.model).__name__,
        num_parameters=sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names),
        size_bytes=checkpoint.num_bytes,
        structure=probe_streamed(model, progress),
        schemes=tuple(_weigh(model, sites, name) for name in WEIGHED_SCHEMES),
        unused_tensors=tuple(model.skeleton.unused),
    )


def probe_streamed(model: StreamedModel, progress: Progress) -> ModelStructure:
    """Return the proven structure of a model with one block in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    skeleton = model.skeleton
    size = int(skeleton.model.config.get_text_config().vocab_size)
    ids = torch.randint(size, (PROBE_WINDOWS, PROBE_TOKENS), generator=generator)
    with model.outside():
        hidden = model.enter(ids)
        head, tied = probe_head(
            skeleton.model,
            model.blocks_path,
            lambda: skeleton.model(input_ids=ids.to(model.device), use_cache=False).logits,
            generator,
        )
    proven: dict[str, BlockStructure] = {}
    blocks: list[BlockStructure] = []
    for index, name in enumerate(model.block_names):
        signature = block_signature(skeleton.model.get_submodule(name))
        if signature not in proven:
            proven[signature] = _prove_block(model, index, hidden, generator)
        blocks.append(proven[signature].renamed(name))
        progress("probe", index + 1, model.num_blocks)
    return ModelStructure(blocks_path=model.blocks_path, blocks=tuple(blocks), head=head, tied_head=tied)


def _prove_block(model: StreamedModel, index: int, hidden: Tensor, generator: torch.Generator) -> BlockStructure:
    name = model.block_names[index]
    with model.block(index) as block:

        def call() -> Tensor:
            return model.run_block(block, index, hidden)

        return prove(block, name, call, propose(block, name, call), generator)


def _weigh(model: StreamedModel, sites: tuple[Site, ...], name: str) -> SchemeWeight:
    try:
        plan = resolve(Recipe(scheme=Scheme.parse(name), ignore=()), sites)
    except BitwrightError as error:
        return SchemeWeight(scheme=name, size_bytes=None, bits_per_weight=None, note=str(error))
    needed = estimate(model, sites, plan, 0, 0, 0)
    odd = sum(entry.scheme is not None and entry.group_size not in (None, entry.scheme.weights.granularity.group_size)
              for entry in plan.sites.values())  # fmt: skip
    note = f"{odd} sites use another group size" if odd else ""
    return SchemeWeight(
        scheme=name, size_bytes=needed.model_bytes, bits_per_weight=needed.quantized_bits_per_weight, note=note
    )
