"""The bit layouts: golden words written by hand, big integers, and compressed-tensors' own packing.

compressed-tensors 0.17 is dense where a width divides 32 and padded elsewhere.
"""

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_autoround.format.grids import e2m1_codes, e2m1_values
from vllm_autoround.format.packing import (
    pack,
    pack_nibbles,
    padded_words_per_row,
    unpack,
    unpack_nibbles,
    unpack_padded,
    words_per_row,
)

# Codes 0, 1, 2 ... repeating up to the largest; every word worked out by hand from the definition.
GOLDEN = {
    2: ([0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    3: ([0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    4: ([0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
    8: ([0x10, 0x32, 0x54, 0xFE], [0xFE543210]),
    # 5 bits: 1 + 31 << 5 + 16 << 10, then 30 more zero codes; bits 0-14 hold 0b10000_11111_00001.
    5: ([1, 31, 16] + [0] * 29, [0x43E1, 0, 0, 0, 0]),
    # 6 bits: code 5 is 63 at bits 30-35, so it straddles words 0 and 1.
    6: ([0, 0, 0, 0, 0, 63] + [0] * 10, [0xC0000000, 0x0000000F, 0]),
    # 7 bits: code 4 is 0b1000001 at bits 28-34: four low bits end word 0, three high bits begin word 1.
    7: ([0, 0, 0, 0, 0b1000001] + [0] * 27, [0x10000000, 0b100, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits: int) -> None:
    codes, words = GOLDEN[bits]
    packed = pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == words
    assert unpack(packed, bits, len(codes))[0].tolist() == codes


@settings(deadline=None, derandomize=True, max_examples=60)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_words_are_the_bits_of_one_big_integer(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << (index * bits) for index, code in enumerate(row))
        expected = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(words_per_row(columns, bits))]
        assert [word & 0xFFFFFFFF for word in words] == expected
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_slicing_rows_commutes_with_packing(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (12, 96), dtype=torch.uint8)
    assert torch.equal(pack(codes, bits)[3:9], pack(codes[3:9], bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_agrees_with_compressed_tensors_where_its_layout_is_dense(bits: int) -> None:
    signed = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (16, 256), dtype=torch.int8)
    codes = (signed.int() + (1 << (bits - 1))).to(torch.uint8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))


def test_large_weights_are_packed_in_slices_without_a_seam() -> None:
    codes = torch.randint(0, 8, (600, 1024), dtype=torch.uint8)  # more than one slice of 2^18 codes
    assert torch.equal(unpack(pack(codes, 3), 3, 1024), codes)


def test_a_wrong_number_of_words_is_an_error() -> None:
    with pytest.raises(ValueError, match="takes 12 words, got 16"):
        unpack(torch.zeros(2, 16, dtype=torch.int32), 3, 128)  # padded 3-bit codes would take 13


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 10, 31, 64, 100])
def test_unpack_padded_reads_what_compressed_tensors_packs(bits: int, columns: int) -> None:
    signed = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, columns), dtype=torch.int8)
    words = pack_to_int32(signed, bits)
    assert words.shape[1] == padded_words_per_row(columns, bits)
    assert torch.equal(unpack_padded(words, bits, columns).int(), signed.int() + (1 << (bits - 1)))


def test_padded_golden_words() -> None:
    # Ten 3-bit codes a word, bits 30 and 31 unused; the eleventh begins the next word.
    words = torch.tensor([[0b00_111_000_111_000_111_000_011_010_001_000, 0b101]], dtype=torch.int32)
    assert unpack_padded(words, 3, 11)[0].tolist() == [0, 1, 2, 3, 0, 7, 0, 7, 0, 7, 5]
    with pytest.raises(ValueError, match="takes 13 words, got 12"):
        unpack_padded(torch.zeros(2, 12, dtype=torch.int32), 3, 128)


def test_the_two_layouts_differ_exactly_where_a_code_would_straddle_words() -> None:
    for bits in range(2, 9):
        codes = torch.randint(0, 1 << bits, (1, 96), dtype=torch.uint8)
        dense = pack(codes, bits)
        if 32 % bits:
            assert padded_words_per_row(96, bits) > words_per_row(96, bits)
        else:
            assert torch.equal(unpack_padded(dense, bits, 96), codes)


def test_nibble_golden_bytes() -> None:
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x8]], dtype=torch.uint8)  # the first code goes to the low nibble
    assert pack_nibbles(codes).tolist() == [[0x21, 0x8F]]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_nibbles_agree_with_compressed_tensors() -> None:
    codes = torch.randint(0, 16, (7, 64), dtype=torch.uint8)
    codes[codes == 8] = 0  # minus zero, of which the library keeps the sign and we do not
    values = e2m1_values(codes)
    assert torch.equal(pack_nibbles(e2m1_codes(values)), pack_fp4_to_uint8(values))
    assert torch.equal(unpack_fp4_from_uint8(pack_nibbles(codes), 7, 64, torch.float32), values)


def test_minus_zero_keeps_no_sign() -> None:
    zeros = torch.tensor([[-0.0, 0.0]])
    assert pack_nibbles(e2m1_codes(zeros)).tolist() == [[0x00]]
    assert pack_fp4_to_uint8(zeros).tolist() == [[0x08]]
