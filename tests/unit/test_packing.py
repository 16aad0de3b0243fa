"""Packed codes, against a bitstream made of Python's integers and against the files of other projects."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import bitstream, gptq_words
from slimtune.errors import ShapeError
from slimtune.linalg.packing import WIDTHS, pack, row_bytes, unpack

LENGTHS = (1, 2, 7, 8, 9, 31, 32, 33, 37, 64, 100, 257)
widths = pytest.mark.parametrize("bits", WIDTHS)


def codes_of(bits: int, rows: int, length: int) -> Tensor:
    return torch.randint(2**bits, (rows, length), dtype=torch.uint8)


def test_all_widths_are_tried() -> None:
    assert list(WIDTHS) == [1, 2, 3, 4, 5, 6, 7, 8]


@widths
@pytest.mark.parametrize("length", LENGTHS)
def test_pack_writes_a_little_endian_bitstream(bits: int, length: int) -> None:
    codes = codes_of(bits, 3, length)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (3, row_bytes(length, bits)) == (3, 4 * -(-length * bits // 32))
    assert [bytes(row.tolist()) for row in packed] == [bitstream(row.tolist(), bits) for row in codes]


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=80))
def test_unpack_undoes_pack(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor([numbers, numbers[::-1]], dtype=torch.uint8) >> (8 - bits)
    unpacked = unpack(pack(codes, bits), bits, len(numbers))
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@widths
def test_largest_codes_do_not_spill_into_their_neighbours(bits: int) -> None:
    codes = torch.zeros(1, 67, dtype=torch.uint8)
    codes[:, ::3] = 2**bits - 1
    assert torch.equal(unpack(pack(codes, bits), bits, 67), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_a_gptq_checkpoint(bits: int) -> None:
    codes = codes_of(bits, 5, 96)
    words = pack(codes, bits).view(torch.int32)
    wanted = [gptq_words(row.tolist(), bits) for row in codes]
    assert (words.to(torch.int64) & 0xFFFFFFFF).tolist() == wanted


def test_no_rows_are_packed_into_no_rows() -> None:
    packed = pack(torch.zeros(0, 9, dtype=torch.uint8), 3)
    assert packed.shape == (0, 4)
    assert unpack(packed, 3, 9).shape == (0, 9)


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_a_width_that_does_not_exist_is_refused(bits: int) -> None:
    with pytest.raises(ShapeError, match="no such code width"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(1, 2, 8, dtype=torch.uint8),
        torch.zeros(1, 8),
        torch.zeros(1, 8).int(),
    ],
    ids=["1-D", "3-D", "float", "int32"],
)
def test_what_is_not_a_matrix_of_bytes_is_refused(codes: Tensor) -> None:
    with pytest.raises(ShapeError, match="cannot be packed"):
        pack(codes, 4)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    codes = torch.zeros(2, 9, dtype=torch.uint8)
    codes[1, 8] = 2**bits
    with pytest.raises(ShapeError, match="does not fit") as caught:
        pack(codes, bits)
    assert str(2**bits) in str(caught.value)


@widths
def test_packed_rows_of_another_length_are_refused(bits: int) -> None:
    packed = pack(codes_of(bits, 2, 40), bits)
    with pytest.raises(ShapeError, match="wrong size"):
        unpack(packed, bits, 40 + 32 // bits)
