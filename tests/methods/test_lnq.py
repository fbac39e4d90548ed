"""LNQ against the definitions of its two steps, and what must not matter. Everything runs in float64 unless it says so.

Tables are stored in float32 or less, so that losses agree to what rounding the entries of an optimum adds.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, SingularHessian
from bitwright.methods.gptq import gptq
from bitwright.methods.lnq import lnq
from bitwright.methods.rtn import rtn
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.kmeans import fit_codebook
from bitwright.numerics.qtensor import QTensor

NUM_ROWS, NUM_COLUMNS = 11, 50
DAMP = 0.01
TENSOR, CHANNEL = Granularity(kind="tensor"), Granularity(kind="channel")
RAGGED = Granularity(kind="group", group_size=12)
BLOCK = Granularity(kind="block", group_size=12, block_rows=4)  # tiles of 4, 4 and 3 rows
COLUMNS = Granularity(kind="columns", group_size=12)
EVERY_GRANULARITY = pytest.mark.parametrize(
    "granularity", [TENSOR, CHANNEL, RAGGED, BLOCK, COLUMNS], ids=lambda g: g.kind
)
EVERY_BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(seed: int = 0, num_rows: int = NUM_ROWS, num_columns: int = NUM_COLUMNS) -> Tensor:
    return torch.randn(num_rows, num_columns, dtype=torch.float64, generator=generator(seed))


def hessian_of(seed: int = 0, num_columns: int = NUM_COLUMNS, num_tokens: int = 200) -> Tensor:
    """Of inputs that share a few directions and differ in size, as a model's do."""
    directions = torch.randn(6, num_columns, dtype=torch.float64, generator=generator(seed + 1))
    x = torch.randn(num_tokens, 6, dtype=torch.float64, generator=generator(seed + 2)) @ directions
    x += 0.5 * torch.randn(num_tokens, num_columns, dtype=torch.float64, generator=generator(seed + 3))
    x *= torch.rand(num_columns, dtype=torch.float64, generator=generator(seed + 4)) + 0.1
    return 2 / num_tokens * x.T @ x


def damped(hessian: Tensor, damp: float = DAMP) -> Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def losses(weight: Tensor, result: QTensor, hessian: Tensor, damp: float = DAMP) -> Tensor:
    error = weight - result.dequantize(torch.float64)
    return ((error @ damped(hessian, damp)) * error).sum(1)


def fit(
    weight: Tensor,
    bits: int,
    granularity: Granularity = CHANNEL,
    importance: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> CodebookGrid:
    return fit_codebook(weight, CodebookFormat(bits=bits), granularity, importance=importance, dtype=dtype)


def rounding_of(grid: CodebookGrid, hessian: Tensor) -> float:
    """What rounding the entries of optimal tables may add to the loss of a row: e^T H e with e half a unit each."""
    half_unit = torch.finfo(grid.codebook.dtype).eps / 2 * float(grid.codebook.abs().max())
    return float(torch.linalg.eigvalsh(damped(hessian))[-1]) * len(hessian) * half_unit**2


def least_squares_losses(weight: Tensor, codes: Tensor, hessian: Tensor, tables: list[Tensor]) -> list[float]:
    """The least loss per group of rows (given as masks) that share one table, by a general solver."""
    root = torch.linalg.cholesky(damped(hessian)).T
    found: list[float] = []
    for rows in tables:
        one_hot = torch.nn.functional.one_hot(codes[rows].long()).double()  # [r, I, K]
        system = (root @ one_hot).flatten(0, 1)
        goal = (weight[rows] @ root.T).reshape(-1, 1)
        # Unused entries make the system rank deficient.
        solution = torch.linalg.lstsq(system, goal, driver="gelsd").solution
        found.append(float((system @ solution - goal).square().sum()))
    return found


@EVERY_BITS
@pytest.mark.parametrize("granularity", [CHANNEL, TENSOR], ids=lambda g: g.kind)
def test_tables_solve_least_squares(bits: int, granularity: Granularity) -> None:
    weight, hessian = weight_of(), hessian_of()
    grid = fit(weight, bits, granularity)
    start = lnq(weight, hessian, grid, rounds=0)
    found = lnq(weight, hessian, grid, rounds=1, sweeps=0)
    tables = torch.eye(NUM_ROWS).bool() if granularity is CHANNEL else torch.ones(1, NUM_ROWS).bool()
    expected = torch.tensor(least_squares_losses(weight, start.codes, hessian, list(tables)), dtype=torch.float64)
    reached = (tables.double() @ losses(weight, found, hessian).unsqueeze(1)).squeeze(1)
    assert (reached >= expected * (1 - 1e-9)).all()
    assert (reached <= expected * (1 + 1e-9) + NUM_ROWS * rounding_of(found.grid, hessian)).all()
    assert reached.sum() < losses(weight, start, hessian).sum() * 0.999, "tables did not move; the test shows nothing"


@pytest.mark.parametrize("granularity", [RAGGED, BLOCK, COLUMNS], ids=lambda g: g.kind)
def test_tables_of_the_last_group_solve_least_squares_given_the_others(granularity: Granularity) -> None:
    weight, hessian = weight_of(), hessian_of()
    found = lnq(weight, hessian, fit(weight, 2, granularity), rounds=1, sweeps=0)
    gradient = ((found.dequantize(torch.float64) - weight) @ damped(hessian))[:, 48:]
    tile = {"group": 1, "block": 4, "columns": NUM_ROWS}[granularity.kind]
    unit = torch.finfo(torch.float32).eps * float(found.grid.codebook.abs().max())
    # The derivative by an entry is the sum of the gradient over its weights: 0 but for the rounding of the entries.
    slack = unit * float(damped(hessian)[48:, 48:].abs().sum()) * tile
    for start in range(0, NUM_ROWS, tile):
        rows = slice(start, start + tile)
        for code in range(4):
            chosen = found.codes[rows, 48:] == code
            assert abs(float(gradient[rows][chosen].sum())) <= slack


@EVERY_BITS
@EVERY_GRANULARITY
def test_no_single_code_can_be_better(bits: int, granularity: Granularity) -> None:
    weight, hessian = weight_of(), hessian_of()
    found = lnq(weight, hessian, fit(weight, bits, granularity), rounds=3, sweeps=100)
    base = losses(weight, found, hessian)
    for j in range(NUM_COLUMNS):
        for code in range(2**bits):
            codes = found.codes.clone()
            codes[:, j] = code
            other = losses(weight, QTensor(codes=codes, grid=found.grid), hessian)
            assert (base <= other * (1 + 1e-6)).all()  # entries are compared in float32


def naive_sweep(weight: Tensor, codes: Tensor, grid: CodebookGrid, hessian: Tensor) -> Tensor:
    """One pass of coordinate descent, straight from its definition: try every entry, weight by weight."""
    codes, values = codes.clone(), grid.dequantize(codes, torch.float64)
    full = damped(hessian)
    width = grid.granularity.columns_per_group(weight.shape[1])
    for j in range(weight.shape[1]):
        table = grid.codebook[:, j // width].double().expand(weight.shape[0], -1)
        trial = values.unsqueeze(1).repeat(1, table.shape[1], 1)  # [O, K, I]
        trial[:, :, j] = table
        error = trial - weight.unsqueeze(1)
        best = ((error @ full) * error).sum(-1).argmin(1)
        codes[:, j], values[:, j] = best.to(torch.uint8), table.gather(1, best.unsqueeze(1)).squeeze(1)
    return codes


@pytest.mark.parametrize("block", [1, 7, 32, 128])
@pytest.mark.parametrize("granularity", [CHANNEL, TENSOR, RAGGED], ids=lambda g: g.kind)
def test_a_sweep_is_coordinate_descent_whatever_the_block(
    granularity: Granularity, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.methods.lnq.BLOCK", block)
    weight, hessian = weight_of(3), hessian_of(3)
    grid = fit(weight, 3, granularity)
    tables = lnq(weight, hessian, grid, rounds=1, sweeps=0)
    found = lnq(weight, hessian, grid, rounds=1, sweeps=1)
    assert torch.equal(found.grid.codebook, tables.grid.codebook)
    expected = naive_sweep(weight, tables.codes, tables.grid, hessian)
    assert not torch.equal(expected, tables.codes), "no code changed; the test shows nothing"
    assert torch.equal(found.codes, expected)


@pytest.mark.parametrize("bits", [1, 3])
@EVERY_GRANULARITY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_loss_falls_from_round_to_round(bits: int, granularity: Granularity, dtype: torch.dtype) -> None:
    weight, hessian = weight_of(1), hessian_of(1)
    grid = fit(weight, bits, granularity, hessian.diagonal(), dtype)
    results = [lnq(weight, hessian, grid, rounds=rounds) for rounds in range(5)]
    totals = [float(losses(weight, result, hessian).sum()) for result in results]
    assert all(later <= earlier for earlier, later in pairwise(totals))
    assert totals[1] < totals[0]
    for result in results:
        assert result.grid.codebook.dtype == dtype
        assert result.grid.granularity == granularity
        assert result.codes.dtype == torch.uint8


@EVERY_BITS
@pytest.mark.parametrize("seed", range(4))
def test_beats_nearest_and_gptq_on_the_same_tables(bits: int, seed: int) -> None:
    weight, hessian = weight_of(seed), hessian_of(seed)
    grid = fit(weight, bits, importance=hessian.diagonal())
    nearest = losses(weight, rtn(weight, grid), hessian)
    compensated = losses(weight, gptq(weight, hessian, grid), hessian)
    start = losses(weight, lnq(weight, hessian, grid, rounds=0), hessian)
    torch.testing.assert_close(start, torch.minimum(nearest, compensated))
    found = losses(weight, lnq(weight, hessian, grid), hessian)
    assert (found <= start).all()
    assert found.sum() < 0.97 * start.sum()


@pytest.mark.parametrize("rounds", [1, 4])
def test_rows_are_solved_as_if_alone(rounds: int) -> None:
    weight, hessian = weight_of(), hessian_of()
    for granularity, cut in ((CHANNEL, 5), (RAGGED, 5), (BLOCK, 8)):
        grid = fit(weight, 2, granularity)
        # Enough sweeps that no part stops before the other.
        whole = lnq(weight, hessian, grid, rounds=rounds, sweeps=30)
        for start, stop in ((0, cut), (cut, NUM_ROWS)):
            alone = lnq(weight[start:stop], hessian, grid.rows(start, stop), rounds=rounds, sweeps=30)
            part = losses(weight[start:stop], whole.rows(start, stop), hessian)
            torch.testing.assert_close(losses(weight[start:stop], alone, hessian), part, rtol=1e-6, atol=0)


def test_the_memory_limit_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = weight_of(), hessian_of()
    for granularity in (TENSOR, CHANNEL, RAGGED, BLOCK, COLUMNS):
        grid = fit(weight, 2, granularity)
        monkeypatch.undo()
        expected = lnq(weight, hessian, grid)
        monkeypatch.setattr("bitwright.methods.lnq.ONE_HOT_ELEMENTS", 4 * NUM_COLUMNS * 3)
        found = lnq(weight, hessian, grid)
        assert torch.equal(found.codes, expected.codes)
        torch.testing.assert_close(found.grid.codebook, expected.grid.codebook, rtol=2.0**-23, atol=0)


def test_uncorrelated_inputs_give_nearest_entries() -> None:
    weight = weight_of()
    diagonal = torch.rand(NUM_COLUMNS, dtype=torch.float64, generator=generator(1)) + 0.1
    found = lnq(weight, torch.diag(diagonal), fit(weight, 3), sweeps=100)
    assert torch.equal(found.codes, found.grid.quantize(weight))


def test_inputs_that_are_all_dead_count_alike() -> None:
    weight = weight_of()
    grid = fit(weight, 2)
    found = lnq(weight, torch.zeros(NUM_COLUMNS, NUM_COLUMNS, dtype=torch.float64), grid)
    error = (found.dequantize(torch.float64) - weight).square().sum()
    assert error <= (grid.dequantize(grid.quantize(weight), torch.float64) - weight).square().sum()
    assert torch.equal(found.codes, found.grid.quantize(weight))


def test_dead_columns_take_their_nearest_entry_and_hardly_disturb_the_others() -> None:
    weight, hessian = weight_of(), hessian_of()
    dead = torch.zeros(NUM_COLUMNS, dtype=torch.bool)
    dead[[0, 13, 14, 49]] = True
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    found = lnq(weight, hessian, fit(weight, 3), sweeps=100)
    assert torch.equal(found.codes[:, dead], found.grid.quantize(weight)[:, dead])
    start = lnq(weight, hessian, fit(weight, 3), rounds=0)
    assert losses(weight, found, hessian, 0.0).sum() < losses(weight, start, hessian, 0.0).sum()


@EVERY_GRANULARITY
@pytest.mark.parametrize("value", [0.0, 0.75])
def test_unused_entries_stay_and_break_nothing(granularity: Granularity, value: float) -> None:
    weight = torch.full((NUM_ROWS, NUM_COLUMNS), value, dtype=torch.float64)
    weight[:, ::7] = 2.0
    found = lnq(weight, hessian_of(), fit(weight, 4, granularity))
    assert torch.equal(found.dequantize(torch.float64), weight)


@EVERY_GRANULARITY
def test_tables_that_rounding_spoils_are_not_taken(granularity: Granularity) -> None:
    """Inputs that nearly all are one: codes let the errors cancel, which coarsely rounded entries would undo."""
    weight = weight_of() + 100  # bfloat16 has steps of half a standard deviation there
    hessian = torch.ones(NUM_COLUMNS, NUM_COLUMNS, dtype=torch.float64) + 0.02 * hessian_of()
    grid = fit(weight, 3, granularity, hessian.diagonal(), torch.bfloat16)
    start = lnq(weight, hessian, grid, rounds=0)
    found = lnq(weight, hessian, grid, rounds=1, sweeps=0)
    table_rows = {"tensor": NUM_ROWS, "columns": NUM_ROWS, "block": 4}.get(granularity.kind, 1)
    for first in range(0, NUM_ROWS, table_rows):
        rows = slice(first, first + table_rows)
        assert losses(weight, found, hessian)[rows].sum() <= losses(weight, start, hessian)[rows].sum() * (1 + 1e-9)


def test_entries_that_leave_the_stored_dtype_are_not_taken() -> None:
    """Two columns that cancel want entries far beyond the weights."""
    weight = weight_of() * 65504 / weight_of().abs().max()
    hessian = hessian_of(num_tokens=8)
    found = lnq(weight, hessian, fit(weight, 2, dtype=torch.float16), damp=1e-6)
    assert torch.isfinite(found.grid.codebook).all()
    start = lnq(weight, hessian, fit(weight, 2, dtype=torch.float16), damp=1e-6, rounds=0)
    assert losses(weight, found, hessian, 1e-6).sum() < losses(weight, start, hessian, 1e-6).sum()


def test_the_unit_of_the_inputs_does_not_matter() -> None:
    weight, hessian = weight_of(), hessian_of()
    grid = fit(weight, 3)
    expected = lnq(weight, hessian, grid)
    for factor in (2.0**-40, 2.0**40):
        found = lnq(weight, hessian * factor, grid)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.grid.codebook, expected.grid.codebook)


def test_nothing_given_is_modified() -> None:
    weight, hessian = weight_of(), hessian_of()
    grid = fit(weight, 2, RAGGED)
    before = [tensor.clone() for tensor in (weight, hessian, grid.codebook)]
    lnq(weight, hessian, grid)
    assert all(torch.equal(a, b) for a, b in zip((weight, hessian, grid.codebook), before, strict=True))


@EVERY_GRANULARITY
def test_float32_is_good_enough(granularity: Granularity) -> None:
    weight, hessian = weight_of(num_columns=200).float(), hessian_of(num_columns=200).float()
    grid = fit(weight, 3, granularity)
    exact, wide = weight.double(), hessian.double()
    start = float(losses(exact, lnq(exact, wide, grid, rounds=0), wide).sum())
    narrow = float(losses(exact, lnq(weight, hessian, grid), wide).sum())
    expected = float(losses(exact, lnq(exact, wide, grid), wide).sum())
    # Decisions that flip lead to other local optima: no worse than a fifth of what was won.
    assert narrow <= expected + 0.2 * (start - expected)


def test_bad_arguments_are_refused() -> None:
    weight, hessian = weight_of(), hessian_of()
    grid = fit(weight, 2)
    for options in ({"damp": 0.0}, {"rounds": -1}, {"sweeps": -1}):
        with pytest.raises(RecipeError, match="must be positive"):
            lnq(weight, hessian, grid, **options)
    for wrong in (hessian[:10], hessian[:10, :10]):
        with pytest.raises(ShapeError, match="does not fit a weight"):
            lnq(weight, wrong, grid)
    with pytest.raises(ShapeError, match="does not fit this grid"):
        lnq(weight_of(num_rows=3), hessian, grid)
    with pytest.raises(SingularHessian):
        lnq(weight, -hessian, grid)
