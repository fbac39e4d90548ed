"""Two and three levels: weights that are -a or +a, and weights that are -a, 0 or +a.

With so few levels the scale a is not a range to cover but the value itself, and the best one has a closed form. Let h
be the importance of a weight. For the set S of weights that become ±a, the error Σ h (w - ŵ)² is least at the mean
magnitude over S, where it is

    Σ h w²  -  (Σ_S h |w|)² / Σ_S h        at        a = Σ_S h |w| / Σ_S h

Binary has no choice: S holds all weights. Ternary wants the S with the greatest second term. Given a, a weight is
better off at ±a than at 0 exactly when |w| > a/2, whatever its importance, so that the best S is the k largest
magnitudes for some k: sort, take prefix sums, try every k. For N(0, 1) this gives a = 1.224 and an error of 0.190,
against 1 - 2/π = 0.363 at a = sqrt(2/π) for binary.

Two published rules are cheaper. `absmean` takes the mean magnitude of all weights, `twn` the mean magnitude of those
above Δ = 0.7 mean|w|, which approximates the optimum for normal and uniform weights. TWN also rounds at Δ; here every
method rounds to the nearest level, that is at a/2, which with the same a is never worse.

Legend: R rows of scales, G groups per row, n weights per group (of one piece).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitwright.numerics.linalg import wide_dtype

TWN_FACTOR = 0.7

# Magnitudes that share the upper 16 bits of their float32: the bfloat16 numbers, 128 bins per octave.
NUM_BINS = 2**15
# A bin that could improve the explained energy by less than this, relatively, is not searched.
SLACK = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class TernaryFormat:
    """The levels -1, 0, +1 as codes 0, 1, 2, five to a byte; satisfies `formats.LevelFormat`."""

    name: str = field(init=False, default="ternary")
    bits: float = field(init=False, default=1.6)
    num_codes: int = field(init=False, default=3)
    min_code: int = field(init=False, default=0)
    end_codes: tuple[int, int] = field(init=False, default=(0, 2))
    symmetric: bool = field(init=False, default=True)
    code_dtype: torch.dtype = field(init=False, default=torch.uint8)
    min_value: float = field(init=False, default=-1.0)
    max_value: float = field(init=False, default=1.0)

    def snap(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the nearest levels of weights divided by their scale; a tie at ±1/2 becomes 0."""
        assert zero_point is None  # The format is symmetric: a grid holds no zero point for it.
        # Adding 0 turns the -0 of a small negative weight into the 0 that `decode` returns.
        return torch.round(scaled).clamp_(-1, 1).add_(0.0)

    def encode(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return codes, level + 1, of weights divided by their scale."""
        return self.snap(scaled, zero_point).add_(1).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return levels (float32)."""
        assert zero_point is None
        return codes.to(torch.float32).sub_(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BinaryFormat:
    """The levels -1, +1 as codes 0, 1; satisfies `formats.LevelFormat`.

    0 is not a level and becomes +1, so that padding must carry no weight where errors are summed.
    """

    name: str = field(init=False, default="binary")
    bits: float = field(init=False, default=1.0)
    num_codes: int = field(init=False, default=2)
    min_code: int = field(init=False, default=0)
    end_codes: tuple[int, int] = field(init=False, default=(0, 1))
    symmetric: bool = field(init=False, default=True)
    code_dtype: torch.dtype = field(init=False, default=torch.uint8)
    min_value: float = field(init=False, default=-1.0)
    max_value: float = field(init=False, default=1.0)

    def snap(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the signs of weights, +1 for 0 and for -0."""
        assert zero_point is None  # The format is symmetric: a grid holds no zero point for it.
        return torch.ones_like(scaled).copysign_(scaled + 0.0)

    def encode(self, scaled: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return codes: 1 where the weight is 0 or more, else 0."""
        assert zero_point is None
        return (scaled >= 0).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return levels (float32)."""
        assert zero_point is None
        return codes.to(torch.float32).mul_(2).sub_(1)


def absmean(pieces: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Return the mean magnitude per group [R, G] in the widest float; 0 for a group of zeros.

    The least-squares scale of binary weights, and the ternary scale of BitNet b1.58.

    Args:
        pieces: each [R, G, n], any float dtype; their groups continue each other. Padding is 0.
        counts: [1 or R, G], weights per group over all pieces; padding not counted.
    Reference:
        arXiv:1603.05279, section 3.1 (binary); arXiv:2402.17764, eq. 3 (ternary; adds a small constant instead of
        treating zeros apart).
    """
    total = torch.zeros(pieces[0].shape[:-1], dtype=wide_dtype(counts.device), device=counts.device)
    for groups in pieces:
        total += groups.float().abs().sum(-1, dtype=total.dtype)
    return total / counts


def twn(pieces: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Return the mean magnitude of the weights above 0.7 · mean|w| per group [R, G]; arguments as `absmean`.

    Reference:
        arXiv:1605.04711. Differs: the caller rounds to the nearest level, not at 0.7 · mean|w|.
    """
    threshold = TWN_FACTOR * absmean(pieces, counts).unsqueeze(-1)
    total, number = torch.zeros_like(threshold[..., 0]), torch.zeros_like(threshold[..., 0])
    for groups in pieces:
        magnitude = groups.float().abs()
        above = magnitude > threshold
        total += magnitude.mul_(above).sum(-1, dtype=total.dtype)
        number += above.sum(-1)
    return total / number.clamp_(min=1)


def optimal_binary(pieces: Sequence[Tensor], counts: Tensor, importance: Tensor | None) -> Tensor:
    """Return the scale of binary weights with the least Σ importance · (w - ŵ)² per group [R, G].

    Groups where Σ importance · |w| is 0 count every weight alike, since 0 is no scale; groups of zeros give 0.

    Args:
        pieces: each [R, G, n], any float dtype; their groups continue each other. Padding is 0.
        counts: [1 or R, G], weights per group over all pieces; padding not counted.
        importance: [1 or R, G, n], >= 0, 0 for padding; may be longer than a piece; None when all weights count alike.
    """
    plain = absmean(pieces, counts)
    if importance is None:
        return plain
    total, mass = torch.zeros_like(plain), torch.zeros_like(plain)
    for groups in pieces:
        masses = importance[..., : groups.shape[-1]].to(plain.dtype)
        total += (masses * groups.float().abs()).sum(-1)
        mass += masses.sum(-1)
    return torch.where(total > 0, total / mass, plain)


def optimal_ternary(pieces: Sequence[Tensor], importance: Tensor | None) -> Tensor:
    """Return the scale of ternary weights with the least Σ importance · (w - ŵ)² per group [R, G].

    The global optimum over all scales, for weights rounded to the nearest level. Arguments and groups without weighted
    magnitude as `optimal_binary`. One piece is sorted at once (about 40 bytes per weight). Several pieces are narrowed
    down first, which needs no copy of the weight and gives up at most `SLACK` of the explained energy.
    """
    if len(pieces) == 1:
        best = _best_prefix(pieces[0].float().abs(), importance)
    else:
        num_rows, num_groups, _ = pieces[0].shape
        masses = None if importance is None else importance.expand(num_rows, -1, -1)
        scales = [
            _best_prefix(*_condense([piece[r, g] for piece in pieces], None if masses is None else masses[r, g]))
            for r in range(num_rows)
            for g in range(num_groups)
        ]
        best = torch.stack(scales).reshape(num_rows, num_groups)
    if importance is None or bool((best > 0).all()):
        return best
    return torch.where(best > 0, best, optimal_ternary(pieces, None))


def _best_prefix(magnitudes: Tensor, masses: Tensor | None) -> Tensor:
    """Return Σ h|w| / Σ h [...] over the largest magnitudes [..., n], as many as maximise (Σ h|w|)² / Σ h."""
    wide = wide_dtype(magnitudes.device)
    values, order = magnitudes.sort(dim=-1, descending=True)
    values = values.to(wide)
    if masses is None:
        mass = torch.arange(1, values.shape[-1] + 1, dtype=wide, device=values.device).expand_as(values)
        total = values.cumsum(-1)
    else:
        masses = masses.to(wide).expand_as(values).gather(-1, order)
        mass, total = masses.cumsum(-1), values.mul_(masses).cumsum(-1)
    # The largest magnitudes may carry no importance: 0/0 explains nothing.
    divisor = torch.where(mass > 0, mass, torch.ones_like(mass))
    best = (total.square() / divisor).argmax(-1, keepdim=True)
    return (total.gather(-1, best) / divisor.gather(-1, best)).squeeze(-1)


def _condense(pieces: Sequence[Tensor], importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return fewer magnitudes and masses with the same best prefix, for one group in 1-D pieces.

    Magnitudes fall into bins. Where no prefix that ends inside a bin can beat the best one that ends at a border, the
    bin becomes a single magnitude, its mean, that carries its whole mass; the others keep their weights. A prefix that
    takes the mass y of a bin adds at most y times the largest magnitude there; the bound is convex in y, so that its
    ends decide.
    """
    wide = wide_dtype(pieces[0].device)
    mass = torch.zeros(NUM_BINS, dtype=wide, device=pieces[0].device)
    total, top = torch.zeros_like(mass), torch.zeros_like(mass)
    for bins, magnitude, masses in _binned(pieces, importance):
        mass.index_add_(0, bins, masses)
        total.index_add_(0, bins, masses * magnitude)
        top.scatter_reduce_(0, bins, magnitude, "amax")
    above_mass, above_total = mass.flip(0).cumsum(0).flip(0), total.flip(0).cumsum(0).flip(0)
    divisor = torch.where(above_mass > 0, above_mass, torch.ones_like(mass))
    border = (above_total.square() / divisor).max()
    reachable = (above_total - total + mass * top).square() / divisor
    searched = reachable > border * (1 + SLACK)
    # An empty bin stays as magnitude 0 without mass, so that something is left where no weight has importance.
    means = total / torch.where(mass > 0, mass, torch.ones_like(mass))
    values, weights = [means[~searched]], [mass[~searched]]
    for bins, magnitude, masses in _binned(pieces, importance):
        kept = searched[bins]
        values.append(magnitude[kept])
        weights.append(masses[kept])
    return torch.cat(values), torch.cat(weights)


def _binned(pieces: Sequence[Tensor], importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the bins, magnitudes and masses of 1-D pieces; magnitudes of finite floats order like their bits."""
    for piece in pieces:
        magnitude = piece.float().abs()
        bins = (magnitude.view(torch.int32) >> 16).long()
        magnitude = magnitude.to(wide_dtype(piece.device))
        masses = torch.ones_like(magnitude) if importance is None else importance[: magnitude.shape[-1]].to(magnitude)
        yield bins, magnitude, masses
