import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import ShapeError, VerificationError
from bitwright.numerics.trits import num_trit_bytes, pack_trits, unpack_trits

EVERY_BYTE = torch.arange(243, dtype=torch.uint8)


@given(codes=st.lists(st.integers(0, 2), max_size=40), num_rows=st.integers(1, 3))
def test_packing_is_a_bijection_for_any_length(codes: list[int], num_rows: int) -> None:
    rows = torch.stack([torch.tensor(codes, dtype=torch.uint8).roll(shift) for shift in range(num_rows)])
    packed = pack_trits(rows)
    assert packed.dtype == torch.uint8
    assert packed.shape == (num_rows, -(-len(codes) // 5)) == (num_rows, num_trit_bytes(len(codes)))
    assert torch.equal(unpack_trits(packed, len(codes)), rows)


@given(codes=st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_bytes_are_little_endian_numbers_to_the_base_three(codes: list[int]) -> None:
    expected = [sum(code * 3**i for i, code in enumerate(codes[k : k + 5])) for k in range(0, len(codes), 5)]
    assert pack_trits(torch.tensor(codes)).tolist() == expected


def test_every_byte_survives_the_way_back() -> None:
    codes = unpack_trits(EVERY_BYTE, 5 * 243)
    assert torch.equal(pack_trits(codes), EVERY_BYTE)
    assert len(set(map(tuple, codes.reshape(-1, 5).tolist()))) == 243


def test_the_digits_come_off_a_fixed_point_fraction_by_multiplication() -> None:
    # What the module's docstring promises to kernels.
    fraction = (256 * EVERY_BYTE.int() + 242) // 243
    assert int(fraction.max()) <= 255
    digits: list[torch.Tensor] = []
    for _ in range(5):
        digits.append(3 * fraction >> 8)
        fraction = 3 * fraction & 255
    codes = torch.stack(digits[::-1], dim=-1).flatten().to(torch.uint8)
    assert torch.equal(codes, unpack_trits(EVERY_BYTE, 5 * 243))


def test_more_dimensions_and_strides_pack_the_last() -> None:
    codes = torch.randint(3, (2, 4, 22), dtype=torch.uint8)[..., ::2]
    packed = pack_trits(codes)
    assert packed.shape == (2, 4, 3)
    assert torch.equal(packed[1, 2], pack_trits(codes[1, 2].contiguous()))
    assert torch.equal(unpack_trits(packed, 11), codes)
    assert torch.equal(unpack_trits(packed[:, ::2], 11), codes[:, ::2])


@pytest.mark.parametrize("codes", [torch.tensor([0, 3]), torch.tensor([-1, 1], dtype=torch.int8)])
def test_codes_that_would_change_their_neighbours_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(VerificationError, match=r"are not 0\.\.2; shift them first"):
        pack_trits(codes)


@pytest.mark.parametrize(
    ("packed", "n"),
    [(torch.zeros(2, 2, dtype=torch.uint8), 11), (torch.zeros(2, 3, dtype=torch.uint8), 10), (torch.zeros(2, 3), 11)],
)
def test_bytes_of_another_shape_are_refused(packed: torch.Tensor, n: int) -> None:
    with pytest.raises(ShapeError, match=rf"rows of {n} ternary codes: expected uint8"):
        unpack_trits(packed, n)


def test_other_data_are_refused() -> None:
    with pytest.raises(VerificationError, match="byte 243 holds no ternary codes"):
        unpack_trits(torch.tensor([0, 243], dtype=torch.uint8), 10)
