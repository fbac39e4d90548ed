import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitwright.errors import CheckpointError, RecipeError, ShapeError, VerificationError
from bitwright.numerics.codebook_grid import CodebookFormat
from bitwright.numerics.granularity import Granularity
from bitwright.numerics.kmeans import fit_codebook
from bitwright.numerics.outliers import SparseOutliers, split_outliers
from bitwright.numerics.qtensor import QTensor

FRACTIONS = [0.0, 0.0005, 0.0045, 0.07, 0.5, 0.999]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers_of(index: list[int], shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> SparseOutliers:
    value = torch.arange(1, len(index) + 1, dtype=dtype)
    return SparseOutliers(index=torch.tensor(index, dtype=torch.int32), value=value, shape=shape)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("weighted", [None, "column", "weight"])
def test_exactly_the_asked_number_of_largest_weights_leave(fraction: float, weighted: str | None) -> None:
    weight = normal(40, 100)
    shape = {None: None, "column": (100,), "weight": (40, 100)}[weighted]
    importance = None if shape is None else normal(*shape, seed=1).square()
    dense, outliers = split_outliers(weight, fraction, importance)
    assert len(outliers) == math.ceil(Fraction(str(fraction)) * 4000)
    score = (weight.double().square() * (1 if importance is None else importance.double())).flatten()
    index = outliers.index.long()
    left = torch.ones(4000, dtype=torch.bool)
    left[index] = False
    if len(outliers):
        assert score[index].min() >= score[left].max() * (1 - 2.0**-21)  # float32 scores, a root and a product
    assert torch.equal(dense.flatten()[left], weight.flatten()[left])
    assert (dense.flatten()[index] == 0).all()
    assert torch.equal(outliers.add_to(dense), weight)


def test_the_fraction_is_the_decimal_that_was_written() -> None:
    """In binary 0.07 · 100 is a little above 7 and 0.29 · 100 a little below 29."""
    assert 0.07 * 100 > 7
    for fraction, expected in [(0.07, 7), (0.29, 29), (0.0001, 1), (0.071, 8)]:
        assert len(split_outliers(normal(10, 10), fraction)[1]) == expected


def test_of_equal_weights_the_first_leave_across_chunks() -> None:
    weight = torch.ones(3000, 300)  # chunks of 2^18 // 300 = 873 rows
    weight[1::2] = -1
    weight[2500, 17] = 5
    outliers = split_outliers(weight, 0.5)[1]
    expected = [*range(450_000 - 1), 2500 * 300 + 17]
    assert outliers.index.tolist() == expected


def test_chunks_make_no_difference() -> None:
    weight = normal(1000, 700)
    index = split_outliers(weight, 0.01)[1].index.long()
    expected = weight.flatten().abs().topk(7000).indices.sort().values
    assert torch.equal(index, expected)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 32)], ids=str)
def test_values_are_those_of_the_stored_dtype(dtype: torch.dtype, bits: int) -> None:
    weight = normal(30, 50)
    dense, outliers = split_outliers(weight, 0.1, dtype=dtype)
    index = outliers.index.long()
    assert outliers.value.dtype == dtype
    assert torch.equal(outliers.value, weight.flatten()[index].to(dtype))
    assert torch.equal(outliers.add_to(dense).flatten()[index], outliers.value.float())
    lossless = split_outliers(weight.to(dtype), 0.1)[1]
    assert lossless.value.dtype == dtype
    assert lossless.num_bits == sum(t.untyped_storage().nbytes() * 8 for t in lossless.tensors().values())
    assert lossless.num_bits == 150 * bits + 31 * 32 + 150 * 16


def test_stored_values_replace_what_codes_stand_for() -> None:
    weight = normal(20, 64)
    weight[3, 5], weight[9, 60] = 40.0, -50.0
    dense, outliers = split_outliers(weight, 2 / 1280)
    assert outliers.index.tolist() == [3 * 64 + 5, 9 * 64 + 60]
    grid = fit_codebook(dense, CodebookFormat(bits=4), Granularity(kind="tensor"))
    whole = QTensor(codes=grid.quantize(dense), grid=grid, outliers=outliers)
    plain = fit_codebook(weight, CodebookFormat(bits=4), Granularity(kind="tensor"))
    error = (whole.dequantize() - weight).square().sum()
    # Two of the sixteen entries are free again, and two errors are gone.
    assert error < (plain.fake_quantize(weight) - weight).square().sum()
    assert whole.dequantize()[9, 60] == -50
    assert torch.equal(whole.rows(9, 12).dequantize(), whole.dequantize()[9:12])


POSITIONS = st.sets(st.integers(0, 7 * 11 - 1), max_size=30).map(sorted)


@settings(max_examples=100)
@given(index=POSITIONS)
def test_both_layouts_come_back_and_are_counted(index: list[int]) -> None:
    outliers = outliers_of(index, (7, 11), torch.float16)
    tensors = outliers.tensors()
    back = SparseOutliers.from_tensors(tensors, (7, 11))
    assert torch.equal(back.index, outliers.index)
    assert torch.equal(back.value, outliers.value)
    flat, by_row = 32 * len(index), 16 * len(index) + 32 * 8
    assert outliers.num_bits == 16 * len(index) + min(flat, by_row)
    assert outliers.num_bits == sum(t.numel() * t.element_size() * 8 for t in tensors.values())
    assert set(tensors) == ({"row_start", "column", "value"} if by_row < flat else {"index", "value"})


@settings(max_examples=100)
@given(index=POSITIONS, ends=st.tuples(st.integers(0, 7), st.integers(0, 7)).map(sorted))
def test_rows_are_those_of_the_whole(index: list[int], ends: list[int]) -> None:
    outliers, (start, stop) = outliers_of(index, (7, 11)), ends
    part = outliers.rows(start, stop)
    assert part.shape == (stop - start, 11)
    whole = outliers.add_to(torch.zeros(7, 11))
    assert torch.equal(part.add_to(torch.zeros(stop - start, 11)), whole[start:stop])


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((2, 65536), {"row_start": torch.int32, "column": torch.uint16}),
        ((2, 65537), {"index": torch.int32}),  # columns of 32 bits save nothing over flat positions of 32
        ((2**15, 2**16 + 8), {"row_start": torch.int32, "column": torch.int32}),  # flat positions take 64
    ],
    ids=str,
)
def test_positions_take_16_32_or_64_bits(
    shape: tuple[int, int], dtypes: dict[str, torch.dtype], tmp_path: Path
) -> None:
    num_rows, width = shape
    step = max(1, math.prod(shape) // 40_000)
    index = torch.arange(math.prod(shape) - 1, 0, -step).flip(0)
    index = index.to(torch.int32 if math.prod(shape) < 2**31 else torch.int64)
    outliers = SparseOutliers(index=index, value=torch.ones(len(index), dtype=torch.bfloat16), shape=shape)
    tensors = outliers.tensors()
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {**dtypes, "value": torch.bfloat16}
    save_file(tensors, tmp_path / "outliers.safetensors")
    back = SparseOutliers.from_tensors(load_file(tmp_path / "outliers.safetensors"), shape)
    assert torch.equal(back.index, outliers.index)
    assert back.index.dtype == outliers.index.dtype
    last = outliers.rows(num_rows - 1, num_rows)
    assert last.index.dtype == torch.int32
    assert torch.equal(last.index.long(), index[index >= (num_rows - 1) * width].long() - (num_rows - 1) * width)


def test_moving_keeps_everything() -> None:
    outliers = outliers_of([3, 8], (2, 5))
    moved = outliers.to("cpu")
    assert torch.equal(moved.index, outliers.index)
    assert torch.equal(moved.value, outliers.value)
    assert moved.shape == (2, 5)


def test_add_to_writes_in_place_in_the_dtype_of_the_weight() -> None:
    outliers = SparseOutliers(index=torch.tensor([1], dtype=torch.int32), value=torch.tensor([0.1]), shape=(1, 2))
    dense = torch.zeros(1, 2, dtype=torch.bfloat16)
    assert outliers.add_to(dense) is dense
    assert dense[0, 1] == torch.tensor(0.1).bfloat16()
    for wrong in (torch.zeros(2, 1), torch.zeros(2), torch.zeros(1, 4)[:, ::2]):
        with pytest.raises(ShapeError, match="not a contiguous weight"):
            outliers.add_to(wrong)


@pytest.mark.parametrize("index", [[3, 2], [2, 2], [-1, 3], [0, 10]])
def test_positions_out_of_order_or_outside_are_refused(index: list[int]) -> None:
    with pytest.raises(VerificationError, match=r"not ascending|outside a weight \[2, 5\]"):
        outliers_of(index, (2, 5))


def test_tensors_that_do_not_fit_are_refused() -> None:
    index, value = torch.tensor([1, 2], dtype=torch.int32), torch.ones(2)
    with pytest.raises(ShapeError, match=r"must both be \[n\]"):
        SparseOutliers(index=index, value=torch.ones(3), shape=(2, 5))
    with pytest.raises(VerificationError, match=r"torch\.int64 index"):
        SparseOutliers(index=index.long(), value=value, shape=(2, 5))
    with pytest.raises(VerificationError, match=r"torch\.float64 value"):
        SparseOutliers(index=index, value=value.double(), shape=(2, 5))
    with pytest.raises(VerificationError, match="NaN or Inf"):
        SparseOutliers(index=index, value=value / 0, shape=(2, 5))


def test_damaged_checkpoints_are_refused() -> None:
    value, column = torch.ones(3), torch.tensor([0, 4, 1], dtype=torch.uint16)
    starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    good = {"row_start": starts, "column": column, "value": value}
    assert SparseOutliers.from_tensors(good, (2, 5)).index.tolist() == [0, 4, 6]
    with pytest.raises(CheckpointError, match="expected index and value"):
        SparseOutliers.from_tensors({"row_start": starts, "value": value}, (2, 5))
    for damaged in ([0, 2], [0, 2, 4], [1, 2, 3], [0, 4, 3]):
        with pytest.raises(ShapeError, match="does not divide 3 values into 2 rows"):
            SparseOutliers.from_tensors({**good, "row_start": torch.tensor(damaged, dtype=torch.int32)}, (2, 5))
    for columns, message in (([0, 5, 1], "a column lies outside"), ([4, 0, 1], "not ascending")):
        with pytest.raises(VerificationError, match=message):
            SparseOutliers.from_tensors({**good, "column": torch.tensor(columns, dtype=torch.uint16)}, (2, 5))


def test_bad_arguments_are_refused() -> None:
    weight = normal(4, 6)
    for fraction in (-0.1, 1.0, torch.nan):
        with pytest.raises(RecipeError, match=r"outside \[0, 1\)"):
            split_outliers(weight, fraction)
    with pytest.raises(RecipeError, match=r"not torch\.float64"):
        split_outliers(weight.double(), 0.1)
    with pytest.raises(RecipeError, match=r"exceeds the largest torch\.float16"):
        split_outliers(weight * 1e6, 0.1, dtype=torch.float16)
    with pytest.raises(ShapeError, match=r"must be \[O, I\] and not empty"):
        split_outliers(torch.zeros(4), 0.1)
    with pytest.raises(ShapeError, match="outliers: importance"):
        split_outliers(weight, 0.1, torch.ones(4))
    with pytest.raises(VerificationError, match="NaN, Inf or negative"):
        split_outliers(weight, 0.1, -torch.ones(6))
    weight[2, 2] = torch.nan
    with pytest.raises(VerificationError, match="weight holds NaN or Inf"):
        split_outliers(weight, 0.1)
