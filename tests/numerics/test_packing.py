import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.packing import pack, unpack

WIDTHS = range(1, 9)
LENGTHS = [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 97, 128, 1000]


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", LENGTHS)
def test_packing_is_a_bijection(bits: int, n: int) -> None:
    codes = random_codes(bits, 3, n)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-n * bits // 32))
    assert torch.equal(unpack(words, bits, n), codes)


@settings(deadline=None)
@given(bits=st.sampled_from(WIDTHS), values=st.lists(st.integers(0, 255), min_size=1, max_size=80))
def test_the_layout_is_a_little_endian_bitstream(bits: int, values: list[int]) -> None:
    values = [value % 2**bits for value in values]
    stream = sum(value << (i * bits) for i, value in enumerate(values))
    words = pack(torch.tensor(values), bits)
    assert [word % 2**32 for word in words.tolist()] == [stream >> 32 * k & 0xFFFFFFFF for k in range(len(words))]


@pytest.mark.parametrize("bits", WIDTHS)
def test_any_words_survive_the_way_back(bits: int) -> None:
    words = torch.randint(-(2**31), 2**31, (4, 3 * bits), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    assert torch.equal(pack(unpack(words, bits, 96), bits), words)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_compressed_tensors(bits: int, n: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, 3, n)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    words = pack(codes, bits)
    assert torch.equal(words, helpers.pack_to_int32(signed, bits))
    assert torch.equal(helpers.unpack_from_int32(words, bits, torch.Size([3, n])), signed)


def test_more_dimensions_pack_the_last() -> None:
    codes = random_codes(3, 2, 4, 11)
    words = pack(codes, 3)
    assert words.shape == (2, 4, 2)
    assert torch.equal(words[1, 2], pack(codes[1, 2], 3))
    assert torch.equal(unpack(words, 3, 11), codes)


@pytest.mark.parametrize("codes", [torch.tensor([[0, 16]]), torch.tensor([[-1, 3]], dtype=torch.int8)])
def test_codes_that_would_spill_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(VerificationError, match="do not fit 4 unsigned bits"):
        pack(codes, 4)


def test_wrong_widths_and_lengths_are_refused() -> None:
    with pytest.raises(RecipeError, match="bits must be 1 to 8, not 9"):
        pack(torch.zeros(1, 4, dtype=torch.uint8), 9)
    with pytest.raises(ShapeError, match=r"expected int32 \[..., 2\]"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), 3, 11)
