"""k-means on a line against its definition: all ways to cut a short row, and the full shortest path for long ones."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.kmeans import fit_codebook
from bitwright.numerics.ranges import fit_grid

TENSOR, CHANNEL = Granularity(kind="tensor"), Granularity(kind="channel")
RAGGED = Granularity(kind="group", group_size=24)
BLOCK = Granularity(kind="block", group_size=24, block_rows=3)
COLUMNS = Granularity(kind="columns", group_size=24)
EVERY_GRANULARITY = pytest.mark.parametrize(
    "granularity", [TENSOR, CHANNEL, RAGGED, BLOCK, COLUMNS], ids=lambda g: g.kind
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
FLOAT32_ROUNDOFF = 2.0**-24


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def shaped(name: str, num_rows: int, num_columns: int) -> Tensor:
    """Rows of one distribution, each with another size and mean."""
    x = normal(num_rows, num_columns, seed=1)
    match name:
        case "normal":
            pass
        case "heavy":
            x = x**3
        case "outliers":
            x[:, :4] *= 30
        case "uniform":
            x = torch.rand(num_rows, num_columns, generator=generator(2))
        case _:  # lumpy: more lumps than entries
            x = torch.randint(0, 20, (num_rows, num_columns), generator=generator(3)) + 0.01 * x
    return x * torch.logspace(-4, 2, num_rows).unsqueeze(1) + x.std()


SHAPES = ["normal", "heavy", "outliers", "uniform", "lumpy"]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)


def importance_of(*shape: int) -> Tensor:
    """Some columns count thousands of times as much as others, as inputs with massive activations do."""
    importance = torch.rand(*shape, generator=generator(4)) ** 6 * 50 + 1e-3
    return torch.where(torch.rand(*shape, generator=generator(5)) < 0.02, 1e4, importance)


def fit(weight: Tensor, bits: int, granularity: Granularity = CHANNEL, **options: object) -> CodebookGrid:
    return fit_codebook(weight, CodebookFormat(bits=bits), granularity, **options)  # pyright: ignore


def loss(weight: Tensor, values: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error per row in float64."""
    squares = (weight.double() - values.double()).square()
    return (squares if importance is None else squares * importance.double()).sum(-1)


def fitted_loss(weight: Tensor, grid: CodebookGrid, importance: Tensor | None = None) -> Tensor:
    return loss(weight, grid.dequantize(grid.quantize(weight), torch.float64), importance)


def slack_of(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """What rounding may add to an error: entries to float32, once at an optimum, where the first order vanishes; and
    prefix sums in float64, of up to n terms as large as the largest."""
    mass = torch.ones_like(weight).double() if importance is None else importance.double().expand_as(weight)
    largest = weight.double().abs().amax(-1).square() * mass.sum(-1)
    return largest * (FLOAT32_ROUNDOFF**2 + weight.shape[-1] * 2.0**-52)


def brute_force(row: Tensor, mass: Tensor, num_entries: int) -> float:
    """The least weighted squared error over all ways to cut the sorted row into intervals."""
    x, order = row.double().sort()
    m, n = mass.double()[order], len(row)
    best = float("inf")
    for cuts in combinations(range(1, n), min(num_entries, n) - 1):
        edges, total = [0, *cuts, n], 0.0
        for start, stop in pairwise(edges):
            part, weights = x[start:stop], m[start:stop]
            mean = (part * weights).sum() / weights.sum() if weights.sum() > 0 else part[0]
            total += float((weights * (part - mean).square()).sum())
        best = min(best, total)
    return best


def optimum(weight: Tensor, num_entries: int, importance: Tensor | None = None) -> Tensor:
    """The same per row for long rows: the shortest path over all points, in float64."""
    results = []
    for r, row in enumerate(weight.double()):
        x, order = (row - row.mean()).sort()
        mass = torch.ones_like(x) if importance is None else importance.double().expand_as(weight)[r][order]
        sums = [torch.nn.functional.pad(mass * x**power, (1, 0)).cumsum(0) for power in range(3)]
        total, moment, square = (s.unsqueeze(1) - s for s in sums)
        cost = (square - moment.square() / total.masked_fill(total <= 0, 1.0)).clamp(min=0)
        cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).triu(1), torch.inf)
        best = cost[:, 0]
        for _ in range(num_entries - 1):
            best = (cost + best).amin(1)
        results.append(best[-1])
    return torch.stack(results)


WEIGHTS = st.one_of(st.floats(-4, 4, width=16), st.sampled_from([-1.0, 0.0, 0.5, 0.50048828125, 3.0, 100.0]))


@settings(max_examples=100)
@given(
    bits=st.integers(1, 3),
    points=st.lists(st.tuples(WEIGHTS, st.sampled_from([0.0, 1e-3, 0.3, 1.0, 1.0, 7.0, 1e3])), min_size=1, max_size=11),
)
def test_short_rows_get_the_optimum(bits: int, points: list[tuple[float, float]]) -> None:
    row, mass = torch.tensor(points).T
    if not bool(mass.any()):
        mass = torch.ones_like(mass)
    found = fitted_loss(row.unsqueeze(0), fit(row.unsqueeze(0), bits, importance=mass), mass)
    best = brute_force(row, mass, 2**bits)
    # The path adds up to K costs in float32.
    assert found.item() <= best * (1 + 2 ** (bits + 1) * FLOAT32_ROUNDOFF) + slack_of(row.unsqueeze(0), mass).item()


@EVERY_SHAPE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_up_to_128_different_weights_get_the_optimum(shape: str, weighted: bool, bits: int) -> None:
    weight = shaped(shape, 4, 128)
    importance = importance_of(128) if weighted else None
    found = fitted_loss(weight, fit(weight, bits, importance=importance), importance)
    best = optimum(weight, 2**bits, importance)
    assert (found <= best * (1 + 2 ** (bits + 1) * FLOAT32_ROUNDOFF) + slack_of(weight, importance)).all()


@EVERY_SHAPE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_long_rows_come_within_five_percent_of_the_optimum(shape: str, weighted: bool, bits: int) -> None:
    weight = shaped(shape, 3, 500)
    importance = importance_of(500) if weighted else None
    found = fitted_loss(weight, fit(weight, bits, importance=importance), importance)
    best = optimum(weight, 2**bits, importance)
    assert (found <= best * 1.05).all()
    assert (found >= best - slack_of(weight, importance)).all(), "the oracle is no optimum"


@EVERY_SHAPE
@EVERY_DTYPE
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_never_worse_than_its_starts(shape: str, dtype: torch.dtype, bits: int) -> None:
    weight, importance = shaped(shape, 5, 700), importance_of(700)
    if dtype == torch.float16:
        weight = weight / 16
    start = fitted_loss(weight, fit(weight, bits, importance=importance, dtype=dtype, iterations=0), importance)
    refined = fitted_loss(weight, fit(weight, bits, importance=importance, dtype=dtype), importance)
    # Codes are chosen in float32, the best table in float64: a weight on a border adds no more than slack.
    assert (refined <= start + slack_of(weight, importance)).all()
    if dtype == torch.float32 and bits > 2:
        assert (refined < start).any(), "no iteration took place; the test shows nothing"


@EVERY_SHAPE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_beats_every_uniform_grid_of_the_same_width(shape: str, weighted: bool, bits: int) -> None:
    weight = shaped(shape, 6, 600)
    importance = importance_of(600) if weighted else None
    found = fitted_loss(weight, fit(weight, bits, importance=importance), importance)
    for name in (f"int{bits}", f"uint{bits}"):
        uniform = fit_grid(weight, FORMATS[name], CHANNEL, method="mse", importance=importance)
        assert (found < loss(weight, uniform.fake_quantize(weight), importance)).all()


@EVERY_SHAPE
def test_entries_are_the_means_of_their_cells(shape: str) -> None:
    weight, importance = shaped(shape, 4, 900), importance_of(900)
    grid = fit(weight, 4, importance=importance, iterations=1000)
    codes, table = grid.quantize(weight).long(), grid.codebook[:, 0].double()
    mass = torch.zeros_like(table).scatter_add(1, codes, importance.double().expand_as(weight))
    moment = torch.zeros_like(table).scatter_add(1, codes, importance.double() * weight.double())
    used = mass > 0
    assert used.all(dim=1).any(), "no row uses all entries; the test shows little"
    expected = torch.where(used, moment / mass.clamp(min=1e-9), table)
    torch.testing.assert_close(table, expected, rtol=2.0**-23, atol=0)


def test_importance_moves_entries_to_where_it_is() -> None:
    weight, importance = normal(8, 400), importance_of(8, 400)
    plain = fitted_loss(weight, fit(weight, 3), importance)
    weighted = fitted_loss(weight, fit(weight, 3, importance=importance), importance)
    assert (weighted < 0.5 * plain).all()


def test_importance_per_column_is_importance_per_weight() -> None:
    weight, importance = normal(7, 90), importance_of(90)
    for granularity in (TENSOR, CHANNEL, RAGGED, BLOCK, COLUMNS):
        by_column = fit(weight, 3, granularity, importance=importance)
        by_weight = fit(weight, 3, granularity, importance=importance.expand(7, 90))
        assert torch.equal(by_column.codebook, by_weight.codebook)


@EVERY_GRANULARITY
def test_only_ratios_of_importance_matter(granularity: Granularity) -> None:
    weight, importance = normal(7, 90), importance_of(7, 90)
    expected = fit(weight, 3, granularity, importance=importance).codebook
    for factor in (2.0**-60, 2.0**60):
        assert torch.equal(fit(weight, 3, granularity, importance=importance * factor).codebook, expected)


@EVERY_GRANULARITY
def test_weights_without_importance_do_not_count(granularity: Granularity) -> None:
    weight, importance = normal(6, 96), torch.ones(6, 96)
    importance[:, ::3] = 0
    moved = weight.clone()
    moved[:, ::3] = torch.rand(6, 32, generator=generator(9))
    found = [fit(w, 2, granularity, importance=importance) for w in (weight, moved)]
    losses = [loss(w, grid.fake_quantize(w), importance).sum() for w, grid in zip((weight, moved), found, strict=True)]
    # Zeros change where bins are cut, not what is optimal.
    assert abs(losses[0] - losses[1]) <= 0.02 * losses[0]


@EVERY_GRANULARITY
def test_tables_without_any_importance_treat_weights_alike(granularity: Granularity) -> None:
    weight, importance = normal(6, 90), torch.ones(6, 90)
    importance[:, 24:48] = 0
    importance[3:] = 0
    expected = fit(weight, 2, granularity).codebook
    assert torch.equal(fit(weight, 2, granularity, importance=torch.zeros(90)).codebook, expected)
    found = fit(weight, 2, granularity, importance=importance).codebook
    same = (found == expected).all(-1)
    # Where a table has some weights with importance and some without, it follows those with.
    mixed = {"tensor": [[True]], "channel": [[True]] * 3 + [[False]] * 3, "columns": [[True, False, True, True]]}
    if granularity.kind in mixed:
        assert torch.equal(same, ~torch.tensor(mixed[granularity.kind]))
    else:
        assert same.all()


def parts(weight: Tensor, granularity: Granularity) -> list[tuple[int, int, Tensor]]:
    """Table row, group and weights of every table, by the definition of each granularity."""
    num_rows, num_columns = weight.shape
    height = {"tensor": num_rows, "columns": num_rows, "block": granularity.block_rows or 1}.get(granularity.kind, 1)
    width = granularity.group_size or num_columns
    return [
        (r // height, c // width, weight[r : r + height, c : c + width])
        for r in range(0, num_rows, height)
        for c in range(0, num_columns, width)
    ]


@EVERY_GRANULARITY
@pytest.mark.parametrize("weighted", [False, True])
def test_every_table_is_fitted_to_its_own_weights(granularity: Granularity, weighted: bool) -> None:
    """With ragged tails in both directions: 90 columns in groups of 24, 7 rows in tiles of 3."""
    weight, importance = normal(7, 90) + 0.7, importance_of(7, 90)
    grid = fit(weight, 3, granularity, importance=importance if weighted else None)
    masses = parts(importance, granularity)
    for (row, group, part), (_, _, mass) in zip(parts(weight, granularity), masses, strict=True):
        flat, flat_mass = part.reshape(1, -1), mass.reshape(1, -1) if weighted else None
        alone = fit(flat, 3, importance=flat_mass)
        table = CodebookGrid(
            format=grid.format,
            granularity=CHANNEL,
            in_features=flat.shape[1],
            codebook=grid.codebook[row, group][None, None],
        )
        if part.numel() <= 128:
            # Sums over differently ordered or padded points may round differently.
            slack = slack_of(flat, flat_mass)
            assert (fitted_loss(flat, table, flat_mass) - fitted_loss(flat, alone, flat_mass)).abs() <= slack
        else:
            assert torch.equal(table.codebook, alone.codebook)


@pytest.mark.parametrize("granularity", [TENSOR, COLUMNS], ids=lambda g: g.kind)
def test_a_table_for_many_rows_is_as_good_as_one_fitted_to_all_at_once(granularity: Granularity) -> None:
    """10 chunks of rows, seen through a few thousand bins each."""
    weight = shaped("heavy", 50_000, 48)
    importance = importance_of(48)
    grid = fit(weight, 4, granularity, importance=importance)
    for _, group, part in parts(weight, granularity):
        flat = part.reshape(1, -1)
        mass = parts(importance.expand_as(weight), granularity)[group][2].reshape(1, -1)
        alone = fit(flat, 4, importance=mass)
        table = CodebookGrid(
            format=grid.format, granularity=CHANNEL, in_features=flat.shape[1], codebook=grid.codebook[:, [group]]
        )
        assert fitted_loss(flat, table, mass) <= 1.02 * fitted_loss(flat, alone, mass)


def test_many_rows_are_worked_on_in_chunks_without_a_seam() -> None:
    weight = normal(1100, 500)
    found = fit(weight, 2).codebook
    for start in (0, 523, 524, 1096):
        assert torch.equal(fit(weight[start : start + 4], 2).codebook, found[start : start + 4])


@EVERY_GRANULARITY
@EVERY_DTYPE
@pytest.mark.parametrize("bits", [1, 3, 6, 8])
def test_few_different_weights_are_kept_exactly(granularity: Granularity, dtype: torch.dtype, bits: int) -> None:
    values = normal(2**bits, seed=8).to(dtype).float()
    values[-1] = (values[0].to(dtype) * (1 + torch.finfo(dtype).eps)).float()  # two that a coarse bin would merge
    weight = values[torch.randint(0, 2**bits, (61, 590), generator=generator(1))]  # ragged tails
    grid = fit(weight, bits, granularity, dtype=dtype, importance=importance_of(590))
    assert torch.equal(grid.fake_quantize(weight), weight)


@EVERY_GRANULARITY
@pytest.mark.parametrize("value", [0.0, -1.5, 2.0**-140, -3e38])
def test_constant_weights_are_kept_exactly(granularity: Granularity, value: float) -> None:
    weight = torch.full((7, 90), value)
    for importance in (None, importance_of(90), torch.zeros(90)):
        grid = fit(weight, 2, granularity, importance=importance)
        assert torch.equal(grid.fake_quantize(weight), weight)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3)])
def test_fewer_weights_than_entries(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    for granularity in (TENSOR, CHANNEL, RAGGED, BLOCK, COLUMNS):
        assert torch.equal(fit(weight, 4, granularity).fake_quantize(weight), weight)


@EVERY_SHAPE
def test_the_unit_of_the_weights_does_not_matter(shape: str) -> None:
    weight = shaped(shape, 4, 300)
    expected = fit(weight, 4).codebook
    for factor in (2.0**-60, -1.0, 2.0**60):
        found = fit(weight * factor, 4).codebook / factor
        if factor < 0:  # mirrored sums and ties round differently: equal errors, not equal tables
            mirrored = CodebookGrid(
                format=CodebookFormat(bits=4), granularity=CHANNEL, in_features=300, codebook=found.flip(-1)
            )
            assert (fitted_loss(weight, mirrored) <= 1.05 * optimum(weight, 16)).all()
        else:
            assert torch.equal(found, expected)


@EVERY_DTYPE
def test_entries_are_stored_ones_and_the_same_every_time(dtype: torch.dtype) -> None:
    weight, importance = normal(9, 300), importance_of(300)
    copies = weight.clone(), importance.clone()
    grids = [fit(weight, 4, RAGGED, dtype=dtype, importance=importance) for _ in range(2)]
    assert grids[0].codebook.dtype == dtype
    assert torch.equal(grids[0].codebook, grids[1].codebook)
    assert torch.equal(weight, copies[0])
    assert torch.equal(importance, copies[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_float_dtype_is_fitted_as_its_float32(dtype: torch.dtype) -> None:
    weight = normal(3, 200).to(dtype)
    assert torch.equal(fit(weight, 3).codebook, fit(weight.float(), 3).codebook)


def test_entries_beyond_the_stored_dtype_are_refused() -> None:
    weight = normal(2, 40)
    weight[1, 7] = 7e4
    with pytest.raises(RecipeError, match=r"exceeds 65504, the largest torch\.float16"):
        fit(weight, 3, dtype=torch.float16)
    assert fit(weight, 3, dtype=torch.bfloat16).codebook[1, 0, -1].item() == torch.tensor(7e4).bfloat16().item()


@EVERY_GRANULARITY
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused(granularity: Granularity, value: float) -> None:
    weight = normal(4, 60)
    weight[3, 59] = value
    with pytest.raises(VerificationError, match="weight holds NaN or Inf"):
        fit(weight, 2, granularity)


def test_bad_arguments_are_refused() -> None:
    weight = normal(4, 60)
    for shape in [(60,), (0, 4), (4, 0)]:
        with pytest.raises(ShapeError, match=r"must be \[O, I\] and not empty"):
            fit(torch.zeros(shape), 2)
    with pytest.raises(RecipeError, match=r"not torch\.float64"):
        fit(weight, 2, dtype=torch.float64)
    for shape in [(4,), (1, 60), (60, 4)]:
        with pytest.raises(ShapeError, match="fit_codebook: importance"):
            fit(weight, 2, importance=torch.ones(shape))
    for value in (-1e-9, torch.nan, torch.inf):
        importance = torch.ones(60)
        importance[5] = value
        with pytest.raises(VerificationError, match="NaN, Inf or negative"):
            fit(weight, 2, importance=importance)
