import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import RecipeError
from bitwright.numerics.granularity import KINDS, SIZED, Granularity, Kind, row_chunks

SIZES = st.integers(1, 48)
GRANULARITIES = st.one_of(
    st.sampled_from([Granularity(kind=kind) for kind in KINDS if kind not in SIZED]),
    st.builds(Granularity, kind=st.sampled_from(["group", "columns"]), group_size=SIZES),
    st.builds(Granularity, kind=st.just("block"), group_size=SIZES, block_rows=st.integers(1, 9)),
)


def position(granularity: Granularity, row: int, column: int, in_features: int) -> tuple[int, int]:
    """The scale of one element, by the table of the module."""
    width = granularity.group_size or in_features
    rows = {"tensor": 0, "columns": 0, "block": row // (granularity.block_rows or 1)}
    return rows.get(granularity.kind, row), 0 if granularity.kind == "tensor" else column // width


@settings(max_examples=300)
@given(granularity=GRANULARITIES, num_rows=st.integers(1, 12), num_columns=st.integers(1, 40))
def test_split_arranges_by_scale_and_join_undoes_it(granularity: Granularity, num_rows: int, num_columns: int) -> None:
    x = torch.arange(1, num_rows * num_columns + 1).reshape(num_rows, num_columns)
    groups = granularity.split(x)
    assert groups.shape[:2] == granularity.scale_shape(num_rows, num_columns)
    assert torch.equal(granularity.join(groups, num_rows, num_columns), x)
    # Every element is in the row of its scale; what else is there is padding.
    members: dict[tuple[int, int], list[int]] = {}
    for i in range(num_rows):
        for j in range(num_columns):
            members.setdefault(position(granularity, i, j, num_columns), []).append(int(x[i, j]))
    for (row, group), expected in members.items():
        assert sorted(value for value in groups[row, group].tolist() if value) == sorted(expected)
    assert len(members) == groups.shape[0] * groups.shape[1]
    assert int((groups != 0).sum()) == x.numel()


@pytest.mark.parametrize(
    ("kind", "shape", "scale_shape"),
    [("tensor", (1, 1, 42), (1, 1)), ("channel", (6, 1, 7), (6, 1)), ("token", (6, 1, 7), (6, 1))],
)
def test_kinds_without_groups(kind: Kind, shape: tuple[int, ...], scale_shape: tuple[int, int]) -> None:
    granularity = Granularity(kind=kind)
    x = torch.rand(6, 7)
    assert granularity.split(x).shape == shape
    assert granularity.split(x).data_ptr() == x.data_ptr(), "a view"
    assert granularity.scale_shape(6, 7) == scale_shape
    assert granularity.columns_per_group(7) == 7


def test_the_shapes_of_ragged_tiles() -> None:
    x = torch.arange(15).reshape(3, 5) + 1
    tiles = Granularity(kind="block", block_rows=2, group_size=3)
    assert tiles.split(x).tolist() == [
        [[1, 2, 3, 6, 7, 8], [4, 5, 0, 9, 10, 0]],
        [[11, 12, 13, 0, 0, 0], [14, 15, 0, 0, 0, 0]],
    ]
    columns = Granularity(kind="columns", group_size=3)
    assert columns.split(x).tolist() == [[[1, 2, 3, 6, 7, 8, 11, 12, 13], [4, 5, 0, 9, 10, 0, 14, 15, 0]]]


def test_a_group_wider_than_the_row_is_one_unpadded_group() -> None:
    for granularity in (Granularity(kind="group", group_size=128), Granularity(kind="columns", group_size=128)):
        assert granularity.num_groups(64) == 1
        assert granularity.split(torch.rand(2, 64)).numel() == 128
    tall = Granularity(kind="block", group_size=128, block_rows=8)
    assert tall.split(torch.rand(2, 64)).shape == (1, 1, 8 * 64)


@pytest.mark.parametrize(
    ("kind", "group_size", "block_rows", "message"),
    [
        ("group", None, None, "group needs group_size >= 1, not None"),
        ("group", 0, None, "group needs group_size >= 1, not 0"),
        ("columns", None, None, "columns needs group_size >= 1, not None"),
        ("block", None, 4, "block needs group_size >= 1, not None"),
        ("channel", 32, None, "channel takes no group_size, but 32 was given"),
        ("block", 4, None, "block_rows None with kind block; block needs block_rows >= 1"),
        ("block", 4, 0, "block_rows 0 with kind block; block needs block_rows >= 1"),
        ("group", 4, 2, "block_rows 2 with kind group; block needs block_rows >= 1, the other kinds take none"),
        ("chanel", None, None, "unknown kind 'chanel'. Did you mean 'channel'"),
    ],
)
def test_contradictions(kind: Kind, group_size: int | None, block_rows: int | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Granularity(kind=kind, group_size=group_size, block_rows=block_rows)


def test_spanning_rows() -> None:
    spanning = {kind for kind in KINDS if _of(kind).spans_rows}
    assert spanning == {"tensor", "columns"}


def _of(kind: Kind) -> Granularity:
    return Granularity(kind=kind, group_size=4 if kind in SIZED else None, block_rows=2 if kind == "block" else None)


@settings(max_examples=200)
@given(
    granularity=GRANULARITIES, num_rows=st.integers(1, 60), num_columns=st.integers(1, 40), budget=st.integers(1, 99)
)
def test_chunks_cover_every_row_once_and_cut_no_tile(
    granularity: Granularity, num_rows: int, num_columns: int, budget: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitwright.numerics.granularity.CHUNK_ELEMENTS_CPU", budget)
        x = torch.rand(num_rows, num_columns)
        chunks = list(granularity.row_chunks(x))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(num_rows))
    height = granularity.block_rows or 1
    assert all(chunk.start % height == 0 for chunk in chunks)
    for chunk in chunks:
        # Within the budget, unless one tile exceeds it.
        assert (chunk.stop - chunk.start) * num_columns <= max(budget, height * num_columns)
    if granularity.spans_rows:
        return
    scale_rows = [granularity.scale_rows(chunk) for chunk in chunks]
    num_scales = granularity.scale_shape(num_rows, num_columns)[0]
    assert [row for rows in scale_rows for row in range(rows.start, rows.stop)] == list(range(num_scales))
    whole = granularity.split(x)
    for chunk, rows in zip(chunks, scale_rows, strict=True):
        assert torch.equal(granularity.split(x[chunk]), whole[rows])


@pytest.mark.parametrize("shape", [(1, 10**6), (1000, 1000), (3, 1), (0, 4)])
def test_row_chunks_cover_every_row_once(shape: tuple[int, int]) -> None:
    x = torch.empty(shape, device="cpu")
    rows = [row for chunk in row_chunks(x) for row in range(chunk.start, chunk.stop)]
    assert rows == list(range(shape[0]))
