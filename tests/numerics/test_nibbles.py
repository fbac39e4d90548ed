from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import RecipeError, ShapeError, VerificationError
from bitwright.numerics.nibbles import pack_high_first, pack_low_first, unpack_high_first, unpack_low_first
from bitwright.numerics.packing import pack

codes_lists = st.lists(st.integers(0, 15), min_size=1, max_size=40)


@given(codes=codes_lists, padding=st.integers(0, 15))
def test_high_first_writes_hexadecimal(codes: list[int], padding: int) -> None:
    padded = codes if len(codes) % 2 == 0 else [*codes, padding]
    packed = pack_high_first(torch.tensor(codes), padding=padding)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()).hex() == "".join(f"{code:x}" for code in padded)
    assert unpack_high_first(packed, len(codes)).tolist() == codes


@given(codes=codes_lists.filter(lambda codes: len(codes) % 2 == 0))
def test_low_first_is_the_little_endian_bitstream(codes: list[int]) -> None:
    packed = pack_low_first(torch.tensor(codes))
    stream = sum(code << 4 * i for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == stream.to_bytes(len(codes) // 2, "little")
    assert unpack_low_first(packed).tolist() == codes


def test_every_byte_survives() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert pack_high_first(unpack_high_first(every, 512)).equal(every)
    assert pack_low_first(unpack_low_first(every)).equal(every)
    assert not unpack_low_first(every).equal(unpack_high_first(every, 512))


def test_rows() -> None:
    codes = torch.randint(16, (3, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = pack_low_first(codes)
    assert rows.shape == (3, 5, 3)
    assert rows[1, 2].equal(pack_low_first(codes[1, 2]))
    # Bytes of a little-endian word are the same stream.
    assert pack_low_first(codes.flatten()[:88]).view(torch.int32).equal(pack(codes.flatten()[:88], 4))
    odd = codes[..., :5]
    flat = pack_high_first(odd, padding=7)
    assert flat.shape == (38,)
    assert flat[-1] & 15 == 7
    assert unpack_high_first(flat.view(-1, 1), 75).view(odd.shape).equal(odd)


def test_equals_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    e2m1 = torch.cat([magnitudes, -magnitudes])
    codes = torch.randint(16, (8, 32), generator=torch.Generator().manual_seed(0))
    packed = pack_low_first(codes)
    assert packed.equal(helpers.pack_fp4_to_uint8(e2m1[codes]))
    assert e2m1[unpack_low_first(packed).int()].equal(helpers.unpack_fp4_from_uint8(packed, 8, 32, torch.float32))


@pytest.mark.parametrize("packer", [pack_high_first, pack_low_first])
@pytest.mark.parametrize("codes", [torch.tensor([0, 16]), torch.tensor([-1, 3], dtype=torch.int8)])
def test_codes_that_would_spill_are_refused(
    packer: Callable[[torch.Tensor], torch.Tensor], codes: torch.Tensor
) -> None:
    with pytest.raises(VerificationError, match="do not fit 4 unsigned bits"):
        packer(codes)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match="rows of 5 codes do not fill whole bytes"):
        pack_low_first(torch.zeros(2, 5, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="cannot hold 5 codes: expected 3 bytes"):
        unpack_high_first(torch.zeros(2, dtype=torch.uint8), 5)
    with pytest.raises(ShapeError, match=r"torch.int8 \[3\] cannot hold 5 codes"):
        unpack_high_first(torch.zeros(3, dtype=torch.int8), 5)
    with pytest.raises(ShapeError, match=r"packed codes are uint8, not torch.int32"):
        unpack_low_first(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(RecipeError, match="padding must be a code 0 to 15, not 16"):
        pack_high_first(torch.zeros(3, dtype=torch.uint8), padding=16)
