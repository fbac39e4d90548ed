import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import RecipeError
from bitwright.numerics.granularity import Granularity, Kind, row_chunks


@settings(deadline=None)
@given(num_rows=st.integers(1, 5), num_columns=st.integers(1, 40), group_size=st.integers(1, 48))
def test_split_pads_with_zeros_and_join_undoes_it(num_rows: int, num_columns: int, group_size: int) -> None:
    granularity = Granularity(kind="group", group_size=group_size)
    x = torch.arange(1, num_rows * num_columns + 1).reshape(num_rows, num_columns)
    groups = granularity.split(x)
    width = granularity.columns_per_group(num_columns)
    assert groups.shape == (num_rows, granularity.num_groups(num_columns), width)
    assert torch.equal(granularity.join(groups, num_columns), x)
    assert int((groups == 0).sum()) == num_rows * (width * granularity.num_groups(num_columns) - num_columns)
    for j in range(num_columns):
        assert torch.equal(groups[:, j // width, j % width], x[:, j])


@pytest.mark.parametrize(
    ("kind", "shape", "scale_shape"),
    [("tensor", (1, 1, 42), (1, 1)), ("channel", (6, 1, 7), (6, 1)), ("token", (6, 1, 7), (6, 1))],
)
def test_kinds_without_groups(kind: Kind, shape: tuple[int, ...], scale_shape: tuple[int, int]) -> None:
    granularity = Granularity(kind=kind)
    x = torch.rand(6, 7)
    assert granularity.split(x).shape == shape
    assert torch.equal(granularity.join(granularity.split(x), 7), x)
    assert granularity.scale_shape(6, 7) == scale_shape
    assert granularity.columns_per_group(7) == 7


def test_a_group_wider_than_the_row_is_one_unpadded_group() -> None:
    granularity = Granularity(kind="group", group_size=128)
    assert granularity.num_groups(64) == 1
    assert granularity.split(torch.rand(2, 64)).shape == (2, 1, 64)


@pytest.mark.parametrize(
    ("kind", "group_size", "message"),
    [
        ("group", None, "group needs group_size >= 1, not None"),
        ("group", 0, "group needs group_size >= 1, not 0"),
        ("channel", 32, "channel takes no group_size, but 32 was given"),
        ("chanel", None, "unknown kind 'chanel'. Did you mean 'channel'"),
    ],
)
def test_contradictions(kind: Kind, group_size: int | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Granularity(kind=kind, group_size=group_size)


@pytest.mark.parametrize("shape", [(1, 10**6), (1000, 1000), (3, 1), (0, 4)])
def test_row_chunks_cover_every_row_once(shape: tuple[int, int]) -> None:
    x = torch.empty(shape, device="cpu")
    rows = [row for chunk in row_chunks(x) for row in range(chunk.start, chunk.stop)]
    assert rows == list(range(shape[0]))
