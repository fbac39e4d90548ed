"""What the weight methods know of a site's inputs: second moments and Hessians, gathered while a block runs.

Shapes: T tokens, I in features, C groups of output channels.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor, nn

from bitwright.calibration.observers import OBSERVERS, Observer
from bitwright.errors import VerificationError
from bitwright.model.sites import Site, SiteCalls
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.inputs import InputQuantizer, InputTransform
from bitwright.numerics.linalg import accumulate_gram, wide_dtype
from bitwright.schemes import ActivationScheme


@dataclass(slots=True)
class SiteStats:
    """Statistics of the inputs of the sites that share them.

    Attributes:
        num_tokens: T, the tokens that reached the sites.
        gram: Σ x xᵀ, [I, I] float64 where the device has it; None unless a method needs Hessians.
        square_sum: Σ x², [I] float64.
        total: Σ x, [I] float64.
        cross: Σ (x' - x) x̂ᵀ, [I, I] float64, x' the input of the same token in the unquantized model, x̂ what x is
            rounded to; None unless a method needs it.
        rounding: Σ (x - x̂) x̂ᵀ, [I, I] float64; None where inputs stay floats.
        guided: site -> Σ w x xᵀ per group of its output channels, [C, I, I] float64, w the token's squared end-loss
            gradient, 1 in the mean; None likewise.
        transform: what happens to inputs before anything is counted.
        float_columns: [k] int64, columns that stay floats: the codes see inputs of 0 there, and so do all sums.
        quantizer: what inputs are rounded to, after the transform, before moments and products are formed of them;
            None if they stay floats.
        observers: the ranges of the inputs, for each way in which they will be quantized with calibrated scales.
        is_routed: a router decides which tokens arrive (experts), so that there may be few or none.
    """

    is_routed: bool = False
    num_tokens: int = 0
    gram: Tensor | None = None
    square_sum: Tensor | None = None
    total: Tensor | None = None
    cross: Tensor | None = None
    rounding: Tensor | None = None
    guided: dict[str, Tensor] | None = None
    transform: InputTransform | None = None
    float_columns: Tensor | None = None
    quantizer: InputQuantizer | None = None
    observers: dict[ActivationScheme, Observer] = field(default_factory=dict[ActivationScheme, Observer])

    @property
    def mean_square(self) -> Tensor | None:
        """E[x_i²] per input column, [I] float32: the importance of the column. None where no token was seen."""
        if self.square_sum is None or self.num_tokens == 0:
            return None
        return (self.square_sum / self.num_tokens).float()

    @property
    def mean(self) -> Tensor | None:
        """E[x], [I] float32. None where no token was seen."""
        return None if self.total is None or self.num_tokens == 0 else (self.total / self.num_tokens).float()

    @property
    def hessian(self) -> Tensor | None:
        """(2/T) Σ x xᵀ, [I, I]. None where it was not collected or no token was seen.

        An expert that saw fewer tokens than it has inputs knows its correlations only roughly: they count in proportion
        T/I, the diagonal fully.
        """
        if self.gram is None or self.num_tokens == 0:
            return None
        hessian = self._averaged(self.gram)
        trust = self.num_tokens / hessian.shape[0]
        if self.is_routed and trust < 1:
            diagonal = hessian.diagonal().clone()
            hessian *= trust
            hessian.diagonal().copy_(diagonal)
        return hessian

    def drift(self, asymmetry: float) -> Tensor | None:
        """(2/T) Σ (t - x̂) x̂ᵀ, [I, I]: how targets t differ from the inputs x̂ that there are.

        A target is the input before it was rounded, moved by the part `asymmetry` towards that of the unquantized
        model. Fitted to I inputs, T tokens of noise alone would look explained by I/T: what is found counts in
        proportion 1 - I/T. None where nothing is left, or targets and inputs are the same.
        """
        parts = [] if self.rounding is None else [self.rounding]
        parts += [] if self.cross is None or asymmetry == 0 else [asymmetry * self.cross]
        if not parts or self.num_tokens <= parts[0].shape[0]:
            return None
        return self._averaged(sum(parts[1:], start=parts[0])) * (1 - parts[0].shape[0] / self.num_tokens)

    def guided_hessians(self, site: str) -> Tensor | None:
        """(2/T) Σ w x xᵀ, [C, I, I], one for each group of a site's output channels. None where not collected."""
        return None if self.guided is None else self._averaged(self.guided[site])

    def _averaged(self, sums: Tensor) -> Tensor:
        return sums * (2.0 / self.num_tokens)

    def add(
        self,
        x: Tensor,
        *,
        with_gram: bool,
        target: Tensor | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the inputs x [..., I] of one call.

        Args:
            x: as the block has them.
            with_gram: also add to Σ x xᵀ.
            target: [..., I], the same tokens in the unquantized model; adds to `cross`.
            weights: site -> [C, T of the whole text], w of `guided`; tokens come in order.
        """
        rows = self._prepared(x)
        if self.square_sum is None:
            self.square_sum = torch.zeros(rows.shape[1], dtype=wide_dtype(rows.device), device=rows.device)
            self.total = torch.zeros_like(self.square_sum)
            self.gram = _square(rows) if with_gram else None
        assert self.total is not None
        for observer in self.observers.values():
            observer.observe(rows)
        floats = rows
        if self.quantizer is not None:
            rows = self.quantizer.quantize(rows).dequantize()
        self.total += rows.sum(0)
        if self.gram is not None:
            accumulate_gram(self.gram, rows)
            self.square_sum.copy_(self.gram.diagonal())
            if self.quantizer is not None:
                self.rounding = _square(rows) if self.rounding is None else self.rounding
                self.rounding += (floats - rows).T @ rows
        else:
            self.square_sum += rows.square().sum(0, dtype=self.square_sum.dtype)
        if target is not None:
            self.cross = _square(rows) if self.cross is None else self.cross
            self.cross += (self._prepared(target) - floats).T @ rows
        if weights is not None:
            self._add_weighted(rows, weights)
        self.num_tokens += rows.shape[0]

    def _prepared(self, x: Tensor) -> Tensor:
        """The inputs [T, I] as the quantizer gets them."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if self.transform is not None:
            rows = self.transform.apply(rows)
        return rows if self.float_columns is None else rows.index_fill(1, self.float_columns.to(rows.device), 0.0)

    def _add_weighted(self, rows: Tensor, weights: Mapping[str, Tensor]) -> None:
        seen = slice(self.num_tokens, self.num_tokens + rows.shape[0])
        guided = self.guided = self.guided or {}
        for name, all_tokens in weights.items():
            tokens = all_tokens[:, seen].to(rows.device)
            if tokens.shape[1] != rows.shape[0]:
                raise VerificationError(
                    f"{name}: called more than once for a token, so that gradients and inputs cannot be matched. "
                    "Use gptq for it."
                )
            if name not in guided:
                guided[name] = torch.stack([_square(rows)] * tokens.shape[0])
            for sums, weight in zip(guided[name], tokens, strict=True):
                accumulate_gram(sums, rows * weight.sqrt().unsqueeze(1))


def _square(rows: Tensor) -> Tensor:
    """Zeros [I, I] for sums of products of rows [T, I]."""
    width = rows.shape[1]
    return torch.zeros(width, width, dtype=wide_dtype(rows.device), device=rows.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The unquantized block: `run_batches` yields one call for each batch of the quantized one, on the same tokens."""

    block: nn.Module
    run_batches: Callable[[], Iterable[Callable[[], object]]]


class _AllSeen(Exception):
    """Raised inside the forward once every wanted site has been called: the rest of the block need not run."""


def collect(
    block: nn.Module,
    sites: list[Site],
    groups: Iterable[tuple[str, ...]],
    run_batches: Callable[[], Iterable[Callable[[], object]]],
    *,
    with_gram: bool,
    calibrated: Mapping[str, ActivationScheme] | None = None,
    transforms: Mapping[str, InputTransform] | None = None,
    float_columns: Mapping[str, Tensor] | None = None,
    quantizers: Mapping[str, InputQuantizer] | None = None,
    teacher: Teacher | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, SiteStats]:
    """Run a block over the calibration set and return statistics per site; sites of one group share one object.

    Args:
        block: the decoder block whose weights are in memory.
        sites: all sites of the block.
        groups: names of the wanted sites; those of one group read the same input.
        run_batches: yields one callable per batch, each of which runs the block once.
        with_gram: also accumulate Σ x xᵀ.
        calibrated: sites whose inputs get calibrated scales, and which.
        transforms: what happens to the inputs of a site before they are quantized; the same within a group.
        float_columns: columns of a site that stay floats; the same within a group.
        quantizers: what the inputs of a site are rounded to; the same within a group.
        teacher: also accumulate Σ (x' - x) xᵀ, x' its inputs. Not for experts: routers may send them other tokens.
        weights: site -> [C, N·T]; also accumulate Σ w x xᵀ. Not for experts, for the same reason.
    Raises:
        VerificationError: NaN or Inf where a range is observed; names the site.
    """
    known = {site.name: site for site in sites}
    members = {group[0]: group for group in groups}  # leader -> its group
    stats: dict[str, SiteStats] = {}
    for leader, group in members.items():
        wanted = {calibrated[name] for name in group if calibrated and name in calibrated}
        shared = SiteStats(
            is_routed=known[leader].kind == "expert",
            observers={scheme: observer_of(scheme, known[leader].in_features) for scheme in wanted},
            transform=(transforms or {}).get(leader),
            float_columns=(float_columns or {}).get(leader),
            quantizer=(quantizers or {}).get(leader),
        )
        stats.update(dict.fromkeys(group, shared))
    targets: dict[str, Tensor] = {}

    def add(site: Site, x: Tensor) -> None:
        shared, target = stats[site.name], targets.pop(site.name, None)
        wanted = () if weights is None or shared.is_routed else members[site.name]
        own = {name: tokens for name, tokens in (weights or {}).items() if name in wanted}
        try:
            shared.add(x, with_gram=with_gram, target=target, weights=own or None)
        except VerificationError as error:
            raise VerificationError(f"{site.name}: {error}") from None

    def keep(site: Site, x: Tensor) -> None:
        if site.kind != "expert":
            targets[site.name] = x

    teacher_runs = repeat(None) if teacher is None else teacher.run_batches()
    for run, teacher_run in zip(run_batches(), teacher_runs, strict=False):
        if teacher is not None and teacher_run is not None:
            _run_until_seen(teacher.block, sites, members, keep, teacher_run)
        _run_until_seen(block, sites, members, add, run)
    return stats


def _run_until_seen(
    block: nn.Module,
    sites: list[Site],
    wanted: Iterable[str],
    on_inputs: Callable[[Site, Tensor], None],
    run: Callable[[], object],
) -> None:
    """Run a batch and hand over what enters the wanted sites; the rest of the block need not run."""
    asked, waiting = set(wanted), set(wanted)

    def on_call(site: Site, x: Tensor) -> None:
        if site.name in asked:
            on_inputs(site, x)
        waiting.discard(site.name)
        if not waiting:
            raise _AllSeen

    with SiteCalls(block, sites, on_call), suppress(_AllSeen):
        run()


def observer_of(scheme: ActivationScheme, in_features: int) -> Observer:
    """Return an observer for the calibrated scales of a scheme, which has seen nothing."""
    assert scheme.observer is not None
    # The level above dynamic FP8 scales is one number, however many groups have scales below it.
    granularity = scheme.granularity if scheme.is_static else Granularity(kind="tensor")
    return OBSERVERS[scheme.observer](num_channels=in_features, granularity=granularity)
