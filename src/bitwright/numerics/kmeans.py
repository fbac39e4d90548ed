"""Learning codebooks: weighted k-means in one dimension, for all rows or groups at once.

The table of a row minimises Σ importance · (w - nearest entry)². On a line every cluster is an interval of the sorted
weights, which makes k-means far easier than in space:

- With prefix sums over the sorted weights, the mean of any interval takes two look-ups. One Lloyd iteration (means of
  the intervals, then borders halfway between the means) costs O(K log n) per row instead of O(K n).
- The optimum itself is a shortest path: best(k, j) = min over i of best(k - 1, i) + cost(i, j). Over all n weights
  that takes O(K n²), so it runs over at most 128 bins of neighbouring weights. Rows of up to 128 different weights get
  the optimum; longer ones a start that differs from it by how bins are cut, and Lloyd's iterations move those cuts.

A second start gives each entry one bin, which is exact where there are no more values than entries. Both are refined,
and the best table is kept per row, after its entries have been rounded to the stored dtype.

Legend: O out features, I in features, R rows of tables, G groups, N tables worked on at once, n weights that share one,
K entries of a table, M bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.codebook_grid import STORED_DTYPES, CodebookFormat, CodebookGrid, midpoints, nearest
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.linalg import wide_dtype

# The shortest path takes K · M² steps per table, and M must exceed K several times: too long for large tables, which
# start from bins only and end further from their optimum.
PATH_BINS = 128
MAX_PATH_ENTRIES = 32
# Tables whose [M + 1, M + 1] costs are held at once: 4 MiB on a CPU, so that they stay in its caches.
PATH_TABLES_CPU = 32
PATH_TABLES_DEVICE = 1024
# Points that stand for one chunk of rows where all rows share a table.
SUMMARY_POINTS = 4096


def fit_codebook(
    weight: Tensor,
    format: CodebookFormat,
    granularity: Granularity,
    *,
    importance: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    iterations: int = 30,
) -> CodebookGrid:
    """Learn the tables of a weight: weighted k-means per row, group, tile or tensor; deterministic.

    Args:
        weight: [O, I], any float dtype; not modified.
        format: how many entries a table has.
        granularity: which weights share a table.
        importance: [I], E[x_i²] of the inputs, or [O, I], Fisher information; >= 0. Tables all of whose weights have
            none treat them alike.
        dtype: float16, bfloat16 or float32: what the checkpoint will store.
        iterations: at most so many Lloyd iterations from each start; 0 keeps the best start.
    Raises:
        ShapeError: the weight is not [O, I] or is empty; the importance is neither [I] nor [O, I].
        VerificationError: NaN or Inf in weight or importance; a negative importance.
        RecipeError: another dtype; an entry that the dtype cannot hold.
    Reference:
        SqueezeLLM, arXiv:2306.07629, section 4.1 (importance = Fisher information); any4, arXiv:2507.04610 (E[x²]).
        Differs: deterministic, shortest-path start in place of k-means++; error of the entries as stored. The path is
        that of Wang and Song, Ckmeans.1d.dp, The R Journal 3(2), 2011.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ShapeError(f"fit_codebook: a weight must be [O, I] and not empty, not {list(weight.shape)}.")
    if dtype not in STORED_DTYPES:
        raise RecipeError(f"fit_codebook: entries are float32, float16 or bfloat16, not {dtype}.")
    if importance is not None:
        importance = importance_rows(importance, weight, "fit_codebook")
    shape = (*granularity.scale_shape(weight.shape[0], weight.shape[1]), format.num_codes)
    codebook = torch.empty(shape, dtype=dtype, device=weight.device)
    for rows, points in _tables(weight, granularity, importance):
        entries = _learn(points, format.num_codes, dtype, iterations)
        if not bool(torch.isfinite(entries).all()):
            raise RecipeError(
                f"fit_codebook: an entry exceeds {torch.finfo(dtype).max:.0f}, the largest {dtype}. Store float32 "
                "entries, or bfloat16 ones."
            )
        codebook[rows] = entries.reshape(-1, *shape[1:])
    return CodebookGrid(format=format, granularity=granularity, in_features=weight.shape[1], codebook=codebook)


def importance_rows(importance: Tensor, weight: Tensor, where: str) -> Tensor:
    """Return the importance of a weight [O, I] as [1, I] or [O, I] on its device.

    Raises:
        ShapeError: neither one per column nor one per weight; begins with `where`.
        VerificationError: NaN, Inf or a negative entry; begins with `where`.
    """
    if importance.shape not in (weight.shape, weight.shape[1:]):
        raise ShapeError(
            f"{where}: importance {list(importance.shape)} must be [{weight.shape[1]}], one per column, or "
            f"{list(weight.shape)}, one per weight."
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise VerificationError(f"{where}: importance has NaN, Inf or negative entries; it is a mean square.")
    return importance.to(weight.device).reshape(-1, weight.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class _Points:
    """Sorted weights of N tables, what each counts, and prefix sums of both.

    Args:
        x: [N, n], ascending, in the widest float.
        mass: [N, n], >= 0.
        mass_before: [N, n + 1], mass of the first 0 .. n points.
        moment_before: [N, n + 1], Σ mass · x of them.
    """

    x: Tensor
    mass: Tensor
    mass_before: Tensor
    moment_before: Tensor

    @staticmethod
    def sort(values: Tensor, mass: Tensor) -> "_Points":
        """From values and masses [N, n] in any order."""
        x, order = values.to(wide_dtype(values.device)).sort(dim=-1, stable=True)
        mass = mass.to(x.dtype).gather(-1, order)
        return _Points(x, mass, _prefix_sums(mass), _prefix_sums(mass * x))

    def means(self, edges: Tensor, otherwise: Tensor) -> Tensor:
        """Weighted means [N, K] of the intervals between edges [N, K + 1]; `otherwise` [N, K] where there is no mass.

        A mean is kept between the ends of its interval: equal points have exactly their value as mean, and means
        ascend, whatever the rounding of the sums.
        """
        start, stop = edges[:, :-1], edges[:, 1:]
        mass = self.mass_before.gather(-1, stop) - self.mass_before.gather(-1, start)
        moment = self.moment_before.gather(-1, stop) - self.moment_before.gather(-1, start)
        last = self.x.shape[-1] - 1
        lowest, highest = self.x.gather(-1, start.clamp(max=last)), self.x.gather(-1, (stop - 1).clamp(min=0))
        filled = (mass > 0) & (stop > start)
        mean = torch.minimum(torch.maximum(moment / torch.where(filled, mass, 1.0), lowest), highest)
        return torch.where(filled, mean, otherwise)

    def centres(self, edges: Tensor) -> Tensor:
        """Means of intervals; an interval without mass is represented by the first point at or after its start."""
        return self.means(edges, self.x.gather(-1, edges[:, :-1].clamp(max=self.x.shape[-1] - 1)))

    def error(self, entries: Tensor) -> Tensor:
        """Σ mass · (x - nearest entry)², [N], summed point by point: prefix sums would cancel where it is small."""
        entries = entries.to(self.x.dtype)
        residual = entries.gather(-1, nearest(entries, self.x)).sub_(self.x)
        return residual.square_().mul_(self.mass).sum(-1)


def _learn(points: _Points, num_entries: int, dtype: torch.dtype, iterations: int) -> Tensor:
    """Return the best tables [N, K] in the stored dtype."""
    best = best_error = None
    for start in _starts(points, num_entries):
        for levels in (start, _lloyd(points, start, iterations)):
            entries = levels.to(dtype)
            error = points.error(entries)
            if best is None or best_error is None:
                best, best_error = entries, error
                continue
            better = error < best_error
            best, best_error = torch.where(better.unsqueeze(-1), entries, best), torch.where(better, error, best_error)
    assert best is not None  # There is at least one start.
    return best


def _starts(points: _Points, num_entries: int) -> Iterator[Tensor]:
    """Yield tables [N, K] to begin with: the path, where it is short enough, and one bin per entry."""
    if num_entries <= MAX_PATH_ENTRIES:
        yield points.centres(_shortest_path(points, num_entries))
    yield points.centres(_bins(points, num_entries))


def _lloyd(points: _Points, levels: Tensor, iterations: int) -> Tensor:
    """Alternate nearest entries and means; the error never rises. Stops where no border moves."""
    edges = None
    for _ in range(iterations):
        previous = edges
        edges = _with_ends(torch.searchsorted(points.x, midpoints(levels), right=True), points.x.shape[-1])
        if previous is not None and torch.equal(edges, previous):
            break
        # An entry without points keeps its place, which lies between its neighbours' cells.
        levels = points.means(edges, levels)
    return levels


def _bins(points: _Points, count: int) -> Tensor:
    """Cut the points into `count` intervals [N, count + 1] that fit clusters; one per value if there are few values.

    With many entries the best density of entries is proportional to density^(1/3) (Panter and Dite), so half of the
    cuts go where the integral of that, estimated from gaps between neighbours, grows. A single far outlier could claim
    all of those; the other half goes by rank.
    """
    x, mass = points.x, points.mass
    num_points = x.shape[-1]
    gaps = x[:, 1:] - x[:, :-1]
    measure = _prefix_sums(((mass[:, 1:] + mass[:, :-1]) * gaps.square()).pow_(1 / 3))
    tiny = torch.finfo(x.dtype).tiny
    by_rank = torch.linspace(0, 1, num_points, dtype=x.dtype, device=x.device)
    position = (measure / measure[:, -1:].clamp(min=tiny) + by_rank) * (count / 2)
    values_before = torch.nn.functional.pad((gaps > 0).cumsum(-1), (1, 0))
    few = values_before[:, -1:] < count
    bin_of = torch.where(few, values_before, position.long().clamp_(max=count - 1))
    borders = torch.arange(1, count, device=x.device).expand(x.shape[0], -1).contiguous()
    return _with_ends(torch.searchsorted(bin_of, borders), num_points)


def _shortest_path(points: _Points, num_entries: int) -> Tensor:
    """Cut the points into K intervals [N, K + 1] of least squared error, only between bins."""
    edges = _bins(points, min(PATH_BINS, points.x.shape[-1]))
    # Sums of squares about the mean lose fewer digits than those about 0.
    centred = points.x - points.moment_before[:, -1:] / points.mass_before[:, -1:]
    moment = _prefix_sums(points.mass * centred).gather(-1, edges)
    square = _prefix_sums(points.mass * centred.square()).gather(-1, edges)
    mass = points.mass_before.gather(-1, edges)
    step = PATH_TABLES_CPU if points.x.device.type == "cpu" else PATH_TABLES_DEVICE
    parts = zip(mass.split(step), moment.split(step), square.split(step), strict=True)
    return edges.gather(-1, torch.cat([_path(*part, num_entries) for part in parts]))


def _path(mass: Tensor, moment: Tensor, square: Tensor, num_entries: int) -> Tensor:
    """Return the bins [N, K + 1] at which intervals begin and end, from prefix sums [N, M + 1] over bins."""

    # cost[:, j, i]: squared error of the bins i .. j - 1 about their mean; 0 when empty, infinite when reversed.
    def between(before: Tensor) -> Tensor:
        return before.unsqueeze(-1) - before.unsqueeze(-2)

    # In units of the whole table's error single precision is enough to compare sums, at half the memory traffic.
    unit = square[:, -1:].clamp(min=torch.finfo(square.dtype).tiny)
    total = between(mass).clamp_(min=torch.finfo(mass.dtype).tiny)
    cost = between(square / unit).sub_(between(moment / unit.sqrt()).square_().div_(total)).clamp_(min=0).float()
    cost.masked_fill_(torch.ones_like(cost[0], dtype=torch.bool).triu_(1), torch.inf)
    best = [cost[:, :, 0]]
    sums = torch.empty_like(cost)
    for _ in range(num_entries - 2):
        torch.add(cost, best[-1].unsqueeze(-2), out=sums)
        best.append(sums.amin(-1))
    at = torch.full_like(mass[:, :1], mass.shape[-1] - 1, dtype=torch.int64)
    borders = [at]
    for reach in reversed(best):
        last = cost.gather(1, at.unsqueeze(-1).expand(-1, -1, cost.shape[-1])).squeeze(1)
        at = (last + reach).argmin(-1, keepdim=True)
        borders.append(at)
    borders.append(torch.zeros_like(at))
    return torch.cat(borders[::-1], dim=-1)


def _tables(weight: Tensor, granularity: Granularity, importance: Tensor | None) -> Iterator[tuple[slice, _Points]]:
    """Yield rows of tables and the points of these tables, few enough to work on."""
    if not granularity.spans_rows:
        for rows in granularity.row_chunks(weight):
            values, mass, real = _points_of(weight, granularity, importance, rows)
            yield granularity.scale_rows(rows), _Points.sort(values, torch.where(_has_mass(mass), mass, real))
        return
    if importance is not None:
        totals = granularity.split(importance.sum(0, keepdim=True, dtype=wide_dtype(weight.device)))
        lifted = (~_has_mass(totals)).expand_as(totals)
        importance = importance + granularity.join(lifted, 1, weight.shape[1])
    # One table for all rows sees each chunk through a few thousand bins, each represented by mean and mass.
    centres: list[Tensor] = []
    masses: list[Tensor] = []
    for rows in granularity.row_chunks(weight):
        values, mass, _ = _points_of(weight, granularity, importance, rows)
        points = _Points.sort(values, mass)
        edges = _bins(points, min(SUMMARY_POINTS, points.x.shape[-1]))
        centres.append(points.centres(edges))
        masses.append(points.mass_before.gather(-1, edges).diff(dim=-1))
    yield slice(0, 1), _Points.sort(torch.cat(centres, dim=-1), torch.cat(masses, dim=-1))


def _points_of(
    weight: Tensor, granularity: Granularity, importance: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, masses and what is no padding [N, n] of some rows; padding repeats a weight, without mass."""
    values = granularity.split(weight[rows].float()).flatten(0, 1)
    if not bool(torch.isfinite(values).all()):
        raise VerificationError("fit_codebook: the weight holds NaN or Inf. Repair the checkpoint.")
    real = granularity.split(torch.ones_like(weight[rows], dtype=torch.float32)).flatten(0, 1)
    values = torch.where(real > 0, values, values[:, :1])
    if importance is None:
        return values, real, real
    given = importance[rows] if importance.shape[0] > 1 else importance.expand(weight[rows].shape)
    return values, granularity.split(given).flatten(0, 1), real


def _has_mass(mass: Tensor) -> Tensor:
    """Whether any point of a table [..., n] counts: [..., 1]. Where none does, all are counted alike."""
    return (mass > 0).any(-1, keepdim=True)


def _prefix_sums(x: Tensor) -> Tensor:
    """Sums of the first 0 .. n entries: [N, n] to [N, n + 1]."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _with_ends(borders: Tensor, num_points: int) -> Tensor:
    """Inner borders [N, K - 1] to edges [N, K + 1]; ascending, also where a parallel prefix sum dips by a rounding."""
    inner = borders.cummax(-1).values
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=num_points)
