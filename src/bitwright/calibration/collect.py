"""What the weight methods know of a site's inputs: second moments and Hessians, gathered while a block runs.

Shapes: T tokens, I in features.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bitwright.calibration.observers import OBSERVERS, Observer
from bitwright.errors import VerificationError
from bitwright.model.sites import Site, SiteCalls
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.inputs import InputTransform
from bitwright.numerics.linalg import accumulate_gram
from bitwright.schemes import ActivationScheme


@dataclass(slots=True)
class SiteStats:
    """Statistics of the inputs of the sites that share them.

    Attributes:
        num_tokens: T, the tokens that reached the sites.
        gram: Σ x xᵀ, [I, I] float64 where the device has it; None unless a method needs Hessians.
        square_sum: Σ x², [I] float64.
        total: Σ x, [I] float64.
        cross: Σ (x' - x) xᵀ, [I, I] float64, x' the input of the same token in the unquantized model; None unless a
            method needs it.
        guided: Σ w xᵀx per group of output channels, w the token's squared end-loss gradient; None likewise.
        transform: what happens to inputs before anything is counted.
        observers: the ranges of the inputs, for each way in which they will be quantized with calibrated scales.
        is_routed: a router decides which tokens arrive (experts), so that there may be few or none.
    """

    is_routed: bool = False
    num_tokens: int = 0
    gram: Tensor | None = None
    square_sum: Tensor | None = None
    total: Tensor | None = None
    cross: Tensor | None = None
    guided: list[Tensor] | None = None
    transform: InputTransform | None = None
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
        hessian = self.gram * (2.0 / self.num_tokens)
        trust = self.num_tokens / hessian.shape[0]
        if self.is_routed and trust < 1:
            diagonal = hessian.diagonal().clone()
            hessian *= trust
            hessian.diagonal().copy_(diagonal)
        return hessian

    def without(self, columns: Tensor) -> "SiteStats":
        """Return the statistics as if the inputs of some columns [k] were always 0; for solvers, not for observers."""

        def cleared(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.clone()
            for dimension in range(x.ndim):
                x.index_fill_(dimension, columns.to(x.device), 0.0)
            return x

        return replace(
            self,
            gram=cleared(self.gram),
            square_sum=cleared(self.square_sum),
            total=cleared(self.total),
            cross=cleared(self.cross),
            guided=None if self.guided is None else [each for x in self.guided if (each := cleared(x)) is not None],
        )

    def add(self, x: Tensor, *, with_gram: bool) -> None:
        """Add the inputs x [..., I] of one call."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if self.transform is not None:
            rows = self.transform.apply(rows)
        if self.square_sum is None:
            exact = torch.float32 if rows.device.type == "mps" else torch.float64
            width = rows.shape[1]
            self.square_sum = torch.zeros(width, dtype=exact, device=rows.device)
            self.total = torch.zeros_like(self.square_sum)
            self.gram = torch.zeros(width, width, dtype=exact, device=rows.device) if with_gram else None
        assert self.total is not None
        self.total += rows.sum(0, dtype=self.total.dtype)
        self.num_tokens += rows.shape[0]
        for observer in self.observers.values():
            observer.observe(rows)
        if self.gram is not None:
            accumulate_gram(self.gram, rows)
            self.square_sum.copy_(self.gram.diagonal())
        else:
            self.square_sum += rows.square().sum(0, dtype=self.square_sum.dtype)


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
    Raises:
        VerificationError: NaN or Inf where a range is observed; names the site.
    """
    stats: dict[str, SiteStats] = {}
    leaders: set[str] = set()
    known = {site.name: site for site in sites}
    for group in groups:
        first = known[group[0]]
        wanted = {calibrated[name] for name in group if calibrated and name in calibrated}
        observers = {scheme: _observer(scheme, first.in_features) for scheme in wanted}
        transform = (transforms or {}).get(group[0])
        shared = SiteStats(is_routed=first.kind == "expert", observers=observers, transform=transform)
        leaders.add(group[0])
        stats.update(dict.fromkeys(group, shared))
    waiting: set[str] = set()

    def on_call(site: Site, x: Tensor) -> None:
        if site.name in leaders:
            try:
                stats[site.name].add(x, with_gram=with_gram)
            except VerificationError as error:
                raise VerificationError(f"{site.name}: {error}") from None
        waiting.discard(site.name)
        if not waiting:
            raise _AllSeen

    for run in run_batches():
        waiting.update(leaders)
        with SiteCalls(block, sites, on_call):
            try:
                run()
            except _AllSeen:
                continue
    return stats


def _observer(scheme: ActivationScheme, in_features: int) -> Observer:
    assert scheme.observer is not None
    # The level above dynamic FP8 scales is one number, however many groups have scales below it.
    granularity = scheme.granularity if scheme.is_static else Granularity(kind="tensor")
    return OBSERVERS[scheme.observer](num_channels=in_features, granularity=granularity)
