"""Examine a quantized model beside its original, one decoder block of each in memory.

For every block: decode what can be decoded, run the original's block and keep the inputs of its sites, compare each
weight with what it should be, then run the quantized block, on its own path and on the original's. Scales that fit no
weight of their own are tried on the other weights at the end: two that were swapped show up as a pair.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitwright.checkup.faults import GAIN_DB, find_fault, scale_gain_db
from bitwright.checkup.findings import BlockDepth, Finding, SiteFigures
from bitwright.checkup.folding import Folding, find_folding
from bitwright.checkup.plain import compare_plain
from bitwright.checkup.sites import Measured, SiteCase, figures_alone, figures_of, finite, groups_of, measure
from bitwright.checkup.stored import DamagedCheckpoint, decode_site, not_finite, wrong_shape
from bitwright.errors import CheckpointError
from bitwright.inspection import probe_streamed
from bitwright.model.layouts.stored import module_of
from bitwright.model.sites import Site, SiteCalls, block_sites, weight_view
from bitwright.model.stream import StreamedModel
from bitwright.model.structure import BlockStructure, Edge
from bitwright.numerics.inputs import QuantizedSite
from bitwright.numerics.metrics import sqnr_db
from bitwright.progress import Progress, no_progress

SAMPLED_TOKENS = 512
SCALE_NOISE_DB = 3.0
"""A site so far behind rounding to nearest makes it worth looking for folded scales."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Piece:
    """A stored weight and the rows of the site that it holds."""

    name: str
    site: Site
    first: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Suspect:
    """A site whose scales fit its codes badly for a reason that is not known yet."""

    name: str
    case: SiteCase


@dataclass(slots=True, eq=False)
class Examination:
    """Everything that a check-up gathers on its way.

    Attributes:
        original: the unquantized model.
        quantized: the model to examine.
        checkpoint: of the quantized model.
        frame: [D, D] that turns the original's hidden state into the quantized model's; None where they share a basis.
        progress: called with (what, done, total).
    """

    original: StreamedModel
    quantized: StreamedModel
    checkpoint: DamagedCheckpoint
    frame: Tensor | None
    progress: Progress = no_progress
    findings: list[Finding] = field(default_factory=list[Finding])
    figures: list[SiteFigures] = field(default_factory=list[SiteFigures])
    depth: list[BlockDepth] = field(default_factory=list[BlockDepth])
    suspects: list[Suspect] = field(default_factory=list[Suspect])
    vague: dict[int, list[tuple[SiteCase, Measured]]] = field(
        default_factory=dict[int, list[tuple[SiteCase, Measured]]]
    )
    folds: list[str] = field(default_factory=list[str])
    folded: set[str] = field(default_factory=set[str])
    input_peaks: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _structures: list[BlockStructure] | None = None

    def run(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Go through all blocks; return the last hidden states of original and quantized model for windows [N, T]."""
        with self.original.outside():
            expected = self.original.enter(windows)
        with self.quantized.outside():
            found = self.quantized.enter(windows)
        for index in range(self.original.num_blocks):
            pieces = self._pieces(index)
            decoded = self.decode(self.original.skeleton.stored_names(self.original.block_names[index]))
            with self.original.block(index) as block:
                inputs, after = self._capture(index, block, expected)
                self._compare(index, block, pieces, decoded, inputs)
            with self.quantized.block(index) as block:
                alone = self.quantized.run_block(block, index, self._turned(expected))
                found = self.quantized.run_block(block, index, found)
            self._note_depth(index, self._turned(expected), self._turned(after), alone, found)
            expected = after
            self.progress("diagnose", index + 1, self.original.num_blocks)
        return expected, found

    def examine_outside(self, decoded: dict[str, QuantizedSite]) -> None:
        """Examine weights outside the blocks, without inputs."""
        checkpoint = self.original.skeleton.checkpoint
        for name, quantized in decoded.items():
            if self.frame is None:
                reference = checkpoint.read([name])[name].float()
                self._examine(name, None, reference, None, None, quantized, folded=False)

    def _pieces(self, index: int) -> list[Piece]:
        """The stored weights of a block's sites."""
        name = self.original.block_names[index]
        pieces: list[Piece] = []
        for site in block_sites(self.original.skeleton.model.get_submodule(name), name):
            try:
                stored = self.original.skeleton.stored_pieces(site.parameter)
            except CheckpointError:
                continue  # stored in a way in which it cannot be quantized either
            if site.transposed:
                stored = [(stored[0][0], None, 0, site.out_features)]
            pieces += [Piece(name=n, site=site, first=a, end=b) for n, i, a, b in stored if i == site.index]
        return pieces

    def decode(self, names: Iterable[str]) -> dict[str, QuantizedSite]:
        """Decode weights, and look at what is stored as floats; what cannot be used gives findings."""
        decoded: dict[str, QuantizedSite] = {}
        packed = set(self.checkpoint.all_packed_names())
        for name in names:
            if name in packed:
                found = decode_site(self.checkpoint, name)
                if isinstance(found, Finding):
                    self.findings.append(found)
                else:
                    decoded[name] = found
            elif name in self.checkpoint.reshaped:
                shapes = self.checkpoint.reshaped[name], self.checkpoint.shape(name)
                self.findings.append(wrong_shape(module_of(name), *shapes))
            elif name not in self.checkpoint.stand_ins:
                bad = not_finite(name, self.checkpoint.read([name])[name])
                if bad is not None:
                    self.checkpoint.stand_ins.add(name)
                    self.findings.append(bad)
        return decoded

    def _capture(self, index: int, block: nn.Module, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Run the original's block; return the inputs of its sites and the hidden state after it."""
        inputs: dict[str, list[Tensor]] = {}

        def on_call(site: Site, x: Tensor) -> None:
            kept = inputs.setdefault(site.name, [])
            missing = SAMPLED_TOKENS - sum(len(each) for each in kept)
            if missing > 0:
                kept.append(x.reshape(-1, x.shape[-1])[:missing].float())

        sites = block_sites(block, self.original.block_names[index])
        with SiteCalls(block, sites, on_call):
            after = self.original.run_block(block, index, hidden)
        return {name: torch.cat(parts) for name, parts in inputs.items()}, after

    def _compare(
        self,
        index: int,
        block: nn.Module,
        pieces: list[Piece],
        decoded: dict[str, QuantizedSite],
        inputs: dict[str, Tensor],
    ) -> None:
        """Examine every weight of a block that could be decoded."""
        if self.frame is not None:
            self.figures += [
                figures_alone(index, piece.name, decoded[piece.name]) for piece in pieces if piece.name in decoded
            ]
            return
        prefix = self.original.block_names[index]
        originals = {piece.site.name: weight_view(block, piece.site, prefix).float() for piece in pieces}
        folding = self._folding(index, block, pieces, decoded, originals)
        for piece in pieces:
            if piece.name not in decoded:
                continue
            site, rows = piece.site.name, slice(piece.first, piece.end)
            reference = folding.apply(site, originals[site])[rows]
            x, columns, scaled = inputs.get(site), folding.columns.get(site), folding.rows.get(site)
            x = x if x is None or columns is None else x / columns
            scaled = None if scaled is None else scaled[rows]
            self._examine(piece.name, index, reference, x, scaled, decoded[piece.name], folded=folding.touches(site))
        self.findings += compare_plain(self.original, self.checkpoint, index, block, folding, self.findings)
        if folding.producers:
            self.folds.append(f"{prefix}: {', '.join(name.removeprefix(prefix + '.') for name in folding.producers)}")

    def _examine(
        self,
        name: str,
        block: int | None,
        reference: Tensor,
        inputs: Tensor | None,
        rows: Tensor | None,
        quantized: QuantizedSite,
        *,
        folded: bool,
    ) -> None:
        case = SiteCase(
            site=module_of(name), block=block, reference=reference.contiguous(), inputs=inputs, rows=rows,
            quantized=quantized.to(reference.device), folded=folded,
        )  # fmt: skip
        measured = measure(case)
        if folded:
            self.folded.add(name)
        self.figures.append(figures_of(case, measured))
        if inputs is not None and quantized.inputs is not None:
            self.input_peaks[case.site] = inputs.abs().amax(0)
        fault = find_fault(case, measured)
        if fault is not None:
            self.findings.append(fault)
            return
        groups = groups_of(case)
        if groups is not None and scale_gain_db(groups) >= GAIN_DB:
            self.suspects.append(Suspect(name=name, case=case))
        self.vague.setdefault(-1 if block is None else block, []).append((case, measured))

    def _folding(
        self,
        index: int,
        block: nn.Module,
        pieces: list[Piece],
        decoded: dict[str, QuantizedSite],
        originals: dict[str, Tensor],
    ) -> Folding:
        """What was folded into the block; nothing is looked for where every site is as good as rounding to nearest."""
        whole = {p.site.name: decoded[p.name].dense() for p in pieces if p.name in decoded and self._is_whole(p)}
        floats = {p.site.name: p.name for p in pieces if p.name not in decoded and not p.site.transposed}
        floats = {site: n for site, n in floats.items() if n not in self.checkpoint.stand_ins and "[" not in site}
        whole |= {site: self.checkpoint.read([name])[name].float() for site, name in floats.items()}
        whole = {site: weight.to(originals[site].device) for site, weight in whole.items()}
        bits = {p.site.name: decoded[p.name].weight.grid.format.bits for p in pieces if p.name in decoded}
        far = any(
            sqnr_db(originals[s], w) < rough_sqnr_db(bits[s]) - SCALE_NOISE_DB for s, w in whole.items() if s in bits
        )
        if not far and not self._norms_changed(index):
            return Folding()

        def norm_ratio(edge: Edge) -> Tensor | None:
            parameter = f"{edge.producer}.weight"
            here = block.get_parameter(parameter[len(self.original.block_names[index]) + 1 :]).detach()
            sources = self.quantized.skeleton.sources[parameter]
            there = self.checkpoint.read(sources)[sources[0]].to(here.device, here.dtype)
            offset = 1.0 if edge.kind == "norm_plus_one" else 0.0
            ratio = (offset + there) / (offset + here)
            is_scale = bool((torch.isfinite(ratio) & (ratio > 0)).all()) and not torch.equal(here, there)
            return ratio if is_scale else None

        return find_folding(self._structure(index).edges, originals, whole, norm_ratio)

    def _norms_changed(self, index: int) -> bool:
        """Whether a vector of the block, a norm or a bias, differs from the original's."""
        files = self.original.skeleton.checkpoint
        names = self.original.skeleton.stored_names(self.original.block_names[index])
        plain = [n for n in names if len(files.shape(n)) == 1 and n not in self.checkpoint.stand_ins]
        return any(not torch.equal(files.read([n])[n], self.checkpoint.read([n])[n]) for n in plain)

    def _is_whole(self, piece: Piece) -> bool:
        return piece.end - piece.first == piece.site.out_features

    def _structure(self, index: int) -> BlockStructure:
        """The proven structure of a block of the original; probed at first use, on a model of its own."""
        if self._structures is None:
            skeleton = self.original.skeleton
            probed = StreamedModel(
                skeleton.checkpoint, device=str(self.original.device), trust_remote_code=skeleton.trust_remote_code
            )
            self._structures = list(probe_streamed(probed, no_progress).blocks)
        return self._structures[index]

    def _turned(self, hidden: Tensor) -> Tensor:
        return hidden if self.frame is None else hidden @ self.frame.to(hidden)

    def _note_depth(self, index: int, before: Tensor, after: Tensor, alone: Tensor, found: Tensor) -> None:
        self.depth.append(
            BlockDepth(
                block=self.original.block_names[index],
                hidden_sqnr_db=finite(sqnr_db(after, found)),
                update_sqnr_db=finite(sqnr_db(after - before, alone - before)),
            )
        )


def rough_sqnr_db(bits: float) -> float:
    """Below what rounding to nearest gives in about any format of so many bits."""
    return min(25.0, 6.0 * bits - 5.0)
