"""LNQ: learned look-up tables for the output of a layer, not for its weights.

k-means makes every weight's own error small. What counts is the error of the output, tr(E H Eᵀ), in which errors of
correlated inputs can cancel. Codes and tables are improved in turn, each exactly and with the other one fixed:

- Tables: with fixed codes the weights are linear in the entries, so the best entries solve least squares. With P [I, K]
  the one-hot codes of a row, the change d of its table satisfies (Pᵀ H P) d = -Pᵀ H e, e the row's error.
- Codes: with fixed tables one column after the other takes the entry nearest to the value that would be best for it,
  given all others: ŵ_j - (H e)_j / H_jj. Rows do not interact and are worked on together.

Neither step can raise the error, so that it falls until it stands; where it stands depends on the start. Tables are
rounded to the stored dtype as soon as they are found, and taken only if they are better after that.

Legend: O out features, I in features, R rows of tables, G groups, K entries of a table, r rows worked on at once,
w columns of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError
from bitwright.methods.gptq import gptq
from bitwright.numerics.codebook_grid import CodebookGrid
from bitwright.numerics.linalg import wide_dtype
from bitwright.numerics.qtensor import QTensor

# Entries of the one-hot codes, w · r · K, that are held at once.
ONE_HOT_ELEMENTS = 2**22
# Columns whose gradients are updated one by one; those of all others follow by one matrix product.
BLOCK = 128
# Of the mean diagonal; keeps the normal equations solvable where an entry is not used.
RIDGE = 1e-9


def lnq(
    weight: Tensor,
    hessian: Tensor,
    grid: CodebookGrid,
    *,
    rounds: int = 3,
    sweeps: int = 4,
    damp: float = 0.01,
) -> QTensor:
    """Improve tables and codes in turn under the Hessian; never worse than round-to-nearest or GPTQ on the same tables.

    Minimises tr(E (H + λI) E^T), E = weight - result. Works for every granularity: the tables of a row's groups are
    solved one group after the other; rows that share a table share its equations.

    Args:
        weight: [O, I] float32 or float64; not modified.
        hessian: [I, I], (2/T) X^T X over T tokens; symmetric PSD; activation units squared.
        grid: tables to start from, usually those of `fit_codebook`; their dtype is kept.
        rounds: at most so many times tables, then codes; stops where nothing improves. 0 keeps the better start.
        sweeps: at most so many passes over the columns per round; stops where no code changes.
        damp: λ as a fraction of mean(diag H), > 0: the share of the error that is counted as if inputs were
            uncorrelated. It also decides for columns whose input was never anything but 0.
    Returns:
        Codes on a new grid of the same format, granularity and dtype.
    Raises:
        RecipeError: damp is not positive, or rounds or sweeps are negative.
        ShapeError: the Hessian does not fit the weight, or the grid does not.
        SingularHessian: GPTQ, one of the two starts, finds no Cholesky factor.
    Reference:
        arXiv:2505.07004 (LNQ, by the authors of GuidedQuant). Differs: two starts, the better one per row; the damped
        H in both steps; tables as stored, rounded before they are compared. H may be any matrix [I, I], also one that
        end-loss gradients have weighted.
    """
    if damp <= 0 or rounds < 0 or sweeps < 0:
        raise RecipeError(f"lnq: damp {damp} must be positive, rounds {rounds} and sweeps {sweeps} at least 0.")
    num_columns = weight.shape[-1]
    if weight.ndim != 2 or hessian.shape != (num_columns, num_columns):
        raise ShapeError(f"lnq: hessian {list(hessian.shape)} does not fit a weight {list(weight.shape)}.")
    damped = _damped(hessian, damp).to(weight.dtype)
    state = _start(weight, hessian, damped, grid, damp)
    best, best_loss = state.result(), state.loss(damped).sum()
    for _ in range(rounds):
        state.improve_tables(damped)
        for _ in range(sweeps):
            if not state.improve_codes(damped):
                break
        loss = state.loss(damped).sum()
        if not bool(loss < best_loss):
            break
        best, best_loss = state.result(), loss
    return best


def _damped(hessian: Tensor, damp: float) -> Tensor:
    """H + λI in the widest float; the identity where there were no inputs at all."""
    result = hessian.to(wide_dtype(hessian.device), copy=True)
    mean = result.diagonal().mean()
    result.diagonal().add_(damp * mean if float(mean) > 0 else 1.0)
    return result


def _start(weight: Tensor, hessian: Tensor, damped: Tensor, grid: CodebookGrid, damp: float) -> "_State":
    """Nearest entries or GPTQ, whichever is better, row by row: both lie on the same tables."""
    nearest = _State.of(weight, grid.quantize(weight), grid)
    compensated = _State.of(weight, gptq(weight, hessian, grid, damp=damp).codes, grid)
    better = compensated.loss(damped) < nearest.loss(damped)
    codes = torch.where(better, compensated.codes, nearest.codes)
    return replace(nearest, codes=codes, error=torch.where(better, compensated.error, nearest.error))


@dataclass(slots=True, eq=False)
class _State:
    """Codes and tables as they are now. Columns of the weight are contiguous: everything is [I, O]."""

    target: Tensor
    codes: Tensor
    error: Tensor
    grid: CodebookGrid

    @staticmethod
    def of(weight: Tensor, codes: Tensor, grid: CodebookGrid) -> "_State":
        error = (grid.dequantize(codes, weight.dtype) - weight).T.contiguous()
        return _State(weight.T.contiguous(), codes.T.contiguous(), error, grid)

    def result(self) -> QTensor:
        return QTensor(codes=self.codes.T.contiguous(), grid=self.grid)

    def loss(self, hessian: Tensor) -> Tensor:
        """Return e^T H e of each row, [O]."""
        return (hessian @ self.error).mul_(self.error).sum(0, dtype=wide_dtype(self.error.device))

    def improve_codes(self, hessian: Tensor) -> bool:
        """Let every column in turn take its best entry, given all others; return whether any code changed."""
        before = self.codes.clone()
        diagonal = hessian.diagonal()
        num_columns, num_rows = self.grid.in_features, self.codes.shape[1]
        width = self.grid.granularity.columns_per_group(num_columns)
        rounder = self.grid.rounder(0, num_rows)
        for start in range(0, num_columns, BLOCK):
            end = min(start + BLOCK, num_columns)
            gradient = hessian[start:end] @ self.error
            for j in range(start, end):
                if j % width == 0:
                    rounder = self.grid.rounder(j, num_rows)
                desired = self.target[j] + self.error[j] - gradient[j - start] / diagonal[j]
                self.codes[j], values = rounder(desired)
                # Computed as in `of`: a code that stays leaves no trace of rounding.
                error = values.to(desired.dtype) - self.target[j]
                gradient[j + 1 - start :].addr_(hessian[j + 1 : end, j], error - self.error[j])
                self.error[j] = error
        return not torch.equal(self.codes, before)

    def improve_tables(self, hessian: Tensor) -> None:
        """Solve for the tables of one group of columns after the other, codes fixed."""
        granularity = self.grid.granularity
        width = granularity.columns_per_group(self.grid.in_features)
        codebook = self.grid.codebook.clone()
        for group in range(codebook.shape[1]):
            columns = slice(group * width, min((group + 1) * width, self.grid.in_features))
            gradient = hessian[columns] @ self.error
            for rows, matrix, vector in self._normal_equations(hessian[columns, columns], gradient, columns):
                tables = granularity.scale_rows(rows)
                found = _least_squares(codebook[tables, group], matrix, vector)
                codebook[tables, group], order = found.sort(dim=-1, stable=True)
                self._renumber(rows, columns, order, codebook[tables, group])
        self.grid = replace(self.grid, codebook=codebook)

    def _normal_equations(
        self, hessian: Tensor, gradient: Tensor, columns: slice
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows and Σ Pᵀ H P [R, K, K] and Σ Pᵀ H e [R, K] of their tables, summed over rows that share one."""
        num_rows, num_entries = self.codes.shape[1], self.grid.format.num_codes
        height = self.grid.granularity.block_rows or 1
        step = max(1, ONE_HOT_ELEMENTS // (num_entries * hessian.shape[0] * height)) * height
        total: tuple[Tensor, Tensor] | None = None
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            codes = self.codes[columns, rows].long()
            one_hot = torch.zeros(*codes.shape, num_entries, dtype=hessian.dtype, device=codes.device)  # [w, r, K]
            one_hot.scatter_(-1, codes.unsqueeze(-1), 1.0)
            product = (hessian @ one_hot.flatten(1)).view_as(one_hot)
            by_row = one_hot.permute(1, 2, 0)  # [r, K, w]
            matrix = by_row @ product.permute(1, 0, 2)
            vector = by_row @ gradient[:, rows].T.unsqueeze(-1)
            if self.grid.granularity.spans_rows:
                height = codes.shape[1]
            sums = _tile_sums(matrix, height), _tile_sums(vector, height).squeeze(-1)
            if not self.grid.granularity.spans_rows:
                yield rows, *sums
            else:
                total = sums if total is None else (total[0] + sums[0], total[1] + sums[1])
        if total is not None:
            yield slice(0, num_rows), *total

    def _renumber(self, rows: slice, columns: slice, order: Tensor, tables: Tensor) -> None:
        """Let codes follow their entries into the sorted tables [R, K], and errors the new entries."""
        row = torch.arange(rows.stop - rows.start, device=order.device)
        granularity = self.grid.granularity
        table = torch.zeros_like(row) if granularity.spans_rows else row // (granularity.block_rows or 1)
        codes = order.argsort(dim=-1)[table].gather(-1, self.codes[columns, rows].T.long())  # [r, w]
        values = tables.float()[table].gather(-1, codes).to(self.error.dtype)
        self.codes[columns, rows] = codes.T.to(self.codes.dtype)
        self.error[columns, rows] = values.T - self.target[columns, rows]


def _least_squares(tables: Tensor, matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the tables [R, K] in their own dtype that minimise d^T M d + 2 d^T v, where d is how far entries move."""
    old = tables.to(matrix.dtype)
    # An entry without codes has an empty row: the ridge keeps it where it is. It only shortens the others' moves.
    ridge = RIDGE * matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(matrix + torch.diag_embed(ridge.expand_as(old)))
    new = (old - torch.cholesky_solve(vector.unsqueeze(-1), factor).squeeze(-1)).to(tables.dtype)
    moved = new.to(old.dtype) - old
    change = (moved * ((matrix @ moved.unsqueeze(-1)).squeeze(-1) + 2 * vector)).sum(-1, keepdim=True)
    # Rounding may have undone the gain. An entry that overflows makes the change infinite or NaN, never negative.
    return torch.where(change < 0, new, tables)


def _tile_sums(x: Tensor, height: int) -> Tensor:
    """Sums [ceil(r / height), ...] over tiles of rows [r, ...], in the widest float."""
    x = torch.cat([x, x.new_zeros(-x.shape[0] % height, *x.shape[1:])])
    return x.unflatten(0, (-1, height)).sum(1, dtype=wide_dtype(x.device))
