import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.codebook_grid import CodebookFormat, CodebookGrid, midpoints, nearest
from bitwright.numerics.granularity import Granularity

TENSOR, CHANNEL = Granularity(kind="tensor"), Granularity(kind="channel")
RAGGED = Granularity(kind="group", group_size=8)
BLOCK = Granularity(kind="block", group_size=8, block_rows=4)
COLUMNS = Granularity(kind="columns", group_size=8)
EVERY_GRANULARITY = pytest.mark.parametrize(
    "granularity", [TENSOR, CHANNEL, RAGGED, BLOCK, COLUMNS, Granularity(kind="token")], ids=lambda g: g.kind
)
EVERY_BITS = pytest.mark.parametrize("bits", range(1, 9))
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
NUM_ROWS, NUM_COLUMNS = 6, 29


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def grid_of(
    granularity: Granularity,
    *,
    bits: int = 3,
    num_rows: int = NUM_ROWS,
    in_features: int = NUM_COLUMNS,
    dtype: torch.dtype = torch.float32,
) -> CodebookGrid:
    shape = (*granularity.scale_shape(num_rows, in_features), 2**bits)
    codebook = normal(*shape).to(dtype).sort(dim=-1).values
    return CodebookGrid(
        format=CodebookFormat(bits=bits), granularity=granularity, in_features=in_features, codebook=codebook
    )


def table_at(grid: CodebookGrid, row: int, column: int) -> list[float]:
    """The table of one weight, by the definition of each granularity."""
    kind, size = grid.granularity.kind, grid.granularity.group_size
    group = 0 if size is None else column // size
    table_row = {"tensor": 0, "columns": 0, "block": row // (grid.granularity.block_rows or 1)}.get(kind, row)
    return grid.codebook[table_row, group].double().tolist()


@EVERY_BITS
def test_a_format_is_its_width(bits: int) -> None:
    format = CodebookFormat(bits=bits)
    assert (format.name, format.num_codes, format.min_code) == (f"kmeans{bits}", 2**bits, 0)
    assert format.end_codes == (0, 2**bits - 1)
    assert format.code_dtype == torch.uint8
    assert format.symmetric
    assert format == CodebookFormat(bits=bits)
    assert hash(format) == hash(CodebookFormat(bits=bits))


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"1 to 8 bits, not {bits}"):
        CodebookFormat(bits=bits)


@EVERY_BITS
@EVERY_GRANULARITY
@EVERY_DTYPE
def test_every_weight_takes_the_nearest_entry_of_its_own_table(
    bits: int, granularity: Granularity, dtype: torch.dtype
) -> None:
    weight, grid = normal(NUM_ROWS, NUM_COLUMNS, seed=1), grid_of(granularity, bits=bits, dtype=dtype)
    codes = grid.quantize(weight)
    values = grid.dequantize(codes)
    assert codes.dtype == torch.uint8
    for row in range(NUM_ROWS):
        for column in range(NUM_COLUMNS):
            table = table_at(grid, row, column)
            assert values[row, column].item() == table[int(codes[row, column])]
            # A border is rounded once: a weight so near to it may fall on either side.
            slack = 2.0**-22 * max(map(abs, table))
            distances = [abs(weight[row, column].item() - entry) for entry in table]
            assert distances[int(codes[row, column])] <= min(distances) + slack


@EVERY_GRANULARITY
def test_entries_are_fixed_points(granularity: Granularity) -> None:
    grid = grid_of(granularity, bits=2)
    codes = torch.randint(0, 4, (NUM_ROWS, NUM_COLUMNS), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    values = grid.dequantize(codes)
    assert torch.equal(grid.quantize(values), codes)
    assert torch.equal(grid.fake_quantize(values), values)


@settings(max_examples=200)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=4, max_size=4))
def test_entries_are_fixed_points_at_any_spacing(entries: list[float]) -> None:
    """Also neighbouring floats, whose midpoint rounds to one of them, equal ones and those whose sum overflows."""
    table = torch.tensor([entries]).sort(dim=-1).values
    assert torch.equal(table.gather(1, nearest(table, table)), table)
    assert bool((midpoints(table).diff(dim=-1) >= 0).all())


@pytest.mark.parametrize("start", [1.0, 1.0 + 2.0**-23, -1.0, -1.0 - 2.0**-23, 2.0**-126, 3.4e38, 2.0**-149])
def test_adjacent_floats_are_told_apart(start: float) -> None:
    first = torch.tensor(start)
    table = torch.stack([first, torch.nextafter(first, torch.tensor(math.inf))]).unsqueeze(0)
    assert nearest(table, table).tolist() == [[0, 1]]


def test_borders_between_huge_entries_do_not_overflow() -> None:
    assert nearest(torch.tensor([[2e38, 3.4e38]]), torch.tensor([[2.1e38, 3.3e38]])).tolist() == [[0, 1]]


def test_equal_distance_goes_to_the_lower_entry() -> None:
    table = torch.tensor([[-1.0, 0.0, 2.0, 2.0]])
    assert nearest(table, torch.tensor([[-0.5, 1.0, 2.0, 9.0, -9.0]])).tolist() == [[0, 1, 2, 3, 0]]


@EVERY_GRANULARITY
def test_columns_round_as_the_whole_does(granularity: Granularity) -> None:
    weight, grid = normal(NUM_ROWS, NUM_COLUMNS), grid_of(granularity)
    codes, values = grid.quantize(weight), grid.fake_quantize(weight)
    for j in range(NUM_COLUMNS):
        column_codes, column_values = grid.rounder(j, len(weight))(weight[:, j])
        assert column_codes.dtype == torch.uint8
        assert torch.equal(column_codes, codes[:, j])
        assert torch.equal(column_values, values[:, j])


@EVERY_GRANULARITY
def test_parts_round_as_the_whole_does(granularity: Granularity) -> None:
    weight, grid = normal(NUM_ROWS, NUM_COLUMNS), grid_of(granularity)
    codes = grid.quantize(weight)
    for start, stop in [(0, 4), (4, 6), (0, 6)]:
        assert torch.equal(grid.rows(start, stop).quantize(weight[start:stop]), codes[start:stop])
    for start, stop in [(0, 8), (8, 29), (16, 24), (0, 29)]:
        assert torch.equal(grid.columns(start, stop).quantize(weight[:, start:stop]), codes[:, start:stop])


def test_parts_must_not_cut_a_table() -> None:
    with pytest.raises(ShapeError, match=r"columns 4\.\.8 cut a group of 8"):
        grid_of(RAGGED).columns(4, 8)
    for start, stop in [(2, 4), (0, 3)]:
        with pytest.raises(ShapeError, match=rf"rows {start}\.\.{stop} cut a tile of 4"):
            grid_of(BLOCK).rows(start, stop)


@pytest.mark.parametrize(
    "granularity", [TENSOR, CHANNEL, Granularity(kind="group", group_size=64)], ids=lambda g: g.kind
)
def test_many_rows_are_worked_on_in_chunks_without_a_seam(granularity: Granularity) -> None:
    weight = normal(1300, 500)
    grid = grid_of(granularity, num_rows=1300, in_features=500)
    codes = grid.quantize(weight)
    for start in (0, 523, 524, 525, 1296):  # a chunk is 2^18 // 500 = 524 rows
        rows = slice(start, start + 4)
        assert torch.equal(grid.rows(start, start + 4).quantize(weight[rows]), codes[rows])
        assert torch.equal(grid.rows(start, start + 4).dequantize(codes[rows]), grid.dequantize(codes)[rows])


@EVERY_DTYPE
def test_dequantize_casts_once(dtype: torch.dtype) -> None:
    grid = grid_of(CHANNEL, dtype=dtype)
    codes = grid.quantize(normal(NUM_ROWS, NUM_COLUMNS))
    exact = grid.codebook.squeeze(1).gather(1, codes.long())
    for wanted in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        found = grid.dequantize(codes, wanted)
        assert found.dtype == wanted
        assert torch.equal(found, exact.to(wanted))
    assert grid.fake_quantize(normal(NUM_ROWS, NUM_COLUMNS).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("granularity", "dtype", "expected"),
    [
        (CHANNEL, torch.float16, 6 * 8 * 16),
        (RAGGED, torch.float32, 6 * 4 * 8 * 32),
        (TENSOR, torch.bfloat16, 8 * 16),
        (BLOCK, torch.float16, 2 * 4 * 8 * 16),
        (COLUMNS, torch.float16, 4 * 8 * 16),
    ],
    ids=str,
)
def test_tables_are_counted(granularity: Granularity, dtype: torch.dtype, expected: int) -> None:
    grid = grid_of(granularity, dtype=dtype)
    assert grid.num_metadata_bits == expected == grid.codebook.untyped_storage().nbytes() * 8


def test_moving_keeps_everything() -> None:
    grid = grid_of(RAGGED)
    moved = grid.to("cpu")
    assert moved.device == torch.device("cpu")
    assert torch.equal(moved.codebook, grid.codebook)


@EVERY_GRANULARITY
def test_only_matrices_of_its_shape_fit(granularity: Granularity) -> None:
    grid = grid_of(granularity)
    assert grid.fits(NUM_ROWS)
    assert grid.fits(NUM_ROWS + 7) == (granularity.kind in ("tensor", "columns"))
    shapes = [(NUM_ROWS, NUM_COLUMNS - 1), (NUM_COLUMNS,)]
    if not grid.fits(NUM_ROWS + 7):
        shapes.append((NUM_ROWS + 7, NUM_COLUMNS))
    for shape in shapes:
        with pytest.raises(ShapeError, match="does not fit this grid"):
            grid.quantize(torch.ones(shape))
        with pytest.raises(ShapeError, match="does not fit this grid"):
            grid.dequantize(torch.ones(shape, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(6, 8), (6, 1, 4), (6, 2, 8), (8,), ()], ids=str)
def test_tables_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"do not fit kmeans3 per channel over 29 columns: expected \[\d+, 1, 8\]"):
        CodebookGrid(
            format=CodebookFormat(bits=3), granularity=CHANNEL, in_features=NUM_COLUMNS, codebook=torch.zeros(shape)
        )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([0.0, 1.0, 0.5, 2.0], "not in ascending order"),
        ([0.0, 1.0, 2.0, math.inf], "NaN or Inf"),
        ([0.0, math.nan, 2.0, 3.0], "NaN or Inf"),
    ],
)
def test_tables_that_cannot_be_searched_are_refused(entries: list[float], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        CodebookGrid(
            format=CodebookFormat(bits=2), granularity=TENSOR, in_features=4, codebook=torch.tensor([[entries]])
        )


def test_tables_in_another_dtype_are_refused() -> None:
    codebook = torch.zeros(1, 1, 4, dtype=torch.float64)
    with pytest.raises(VerificationError, match="store float16, bfloat16 or float32"):
        CodebookGrid(format=CodebookFormat(bits=2), granularity=TENSOR, in_features=4, codebook=codebook)


@EVERY_GRANULARITY
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused(granularity: Granularity, value: float) -> None:
    weight = normal(NUM_ROWS, NUM_COLUMNS)
    weight[-1, -1] = value
    with pytest.raises(VerificationError, match="NaN or Inf"):
        grid_of(granularity).quantize(weight)


def test_values_need_a_table_each() -> None:
    with pytest.raises(ShapeError, match="3 tables for 2 rows"):
        nearest(torch.zeros(3, 4), torch.zeros(2, 4))
