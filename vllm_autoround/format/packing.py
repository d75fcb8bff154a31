"""Codes <-> 32-bit words: the only statement of the bit layout (layout version 1).

Codes are dense: code i of a row occupies bits [i*bits, (i+1)*bits) of the row's stream, and word w holds stream bits
[32*w, 32*w + 32), low bits first. A code may straddle two words. The last word of a row is filled up with zeros.

compressed-tensors before 0.19 pads 3-, 5-, 6- and 7-bit codes instead (no code straddles two words); vLLM's loader
reads the dense layout for every width. `unpack_padded` reads what it wrote.

E2M1 codes go two to a byte, the first in the low four bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Codes in flight at once: the intermediates stay in a CPU's L2 cache; elsewhere what counts is that calls are few.
_BLOCK_CODES_ON_CPU, _BLOCK_CODES = 1 << 18, 1 << 24


def words_per_row(columns: int, bits: int) -> int:
    """Words that hold a row of ``columns`` codes: ceil(columns * bits / 32)."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [N, K] uint8, each below 2**bits, into words [N, ceil(K*bits/32)] int32."""
    rows, columns = codes.shape
    words = torch.empty(rows, words_per_row(columns, bits), dtype=torch.int32, device=codes.device)
    step = _rows_at_once(codes.device, columns)
    for begin in range(0, rows, step):
        words[begin : begin + step] = _pack_rows(codes[begin : begin + step], bits)[:, : words.shape[1]]
    return words


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack words [N, ceil(columns*bits/32)] int32 into codes [N, columns] uint8: the inverse of `pack`."""
    rows = words.shape[0]
    if words.shape[1] != words_per_row(columns, bits):
        raise ValueError(
            f"a row of {columns} codes of {bits} bits takes {words_per_row(columns, bits)} words, got {words.shape[1]}"
        )
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=words.device)
    step = _rows_at_once(words.device, columns)
    for begin in range(0, rows, step):
        codes[begin : begin + step] = _unpack_rows(words[begin : begin + step], bits)[:, :columns]
    return codes


def padded_words_per_row(columns: int, bits: int) -> int:
    """Words that hold a row in the padded layout: ceil(columns / (32 // bits))."""
    return -(-columns // (32 // bits))


def unpack_padded(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack words [N, ceil(columns/(32//bits))] int32 whose codes never straddle two words into codes uint8."""
    if words.shape[1] != padded_words_per_row(columns, bits):
        raise ValueError(
            f"a padded row of {columns} codes of {bits} bits takes {padded_words_per_row(columns, bits)} words, "
            f"got {words.shape[1]}"
        )
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes [N, K] uint8 below 16, K even -> bytes [N, K/2] uint8."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Bytes [N, K/2] uint8 -> codes [N, K] uint8: the inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def _rows_at_once(device: torch.device, columns: int) -> int:
    codes = _BLOCK_CODES_ON_CPU if device.type == "cpu" else _BLOCK_CODES
    return max(1, codes // max(columns, 1))


def _fold_steps(bits: int) -> list[tuple[int, int, int]]:
    """(mask of the lower fields, mask of the upper fields, gap) of the three foldings of eight byte lanes.

    Eight codes, a byte each, make one 64-bit integer. Folding neighbours three times (8 lanes of 8 bits to 4 of 16,
    2 of 32, 1 of 64) leaves the eight codes in its low 8*bits bits: `bits` whole bytes of the dense stream.
    """
    steps = []
    for lane in (8, 16, 32):
        field = (1 << (bits * lane // 8)) - 1
        lower = sum(field << offset for offset in range(0, 64, 2 * lane))
        steps.append((lower, lower << lane, lane - bits * lane // 8))
    return steps


def _signed(mask: int) -> int:
    """The 64-bit two's complement reading of ``mask``, which is how torch takes an int64 scalar."""
    return mask - (1 << 64) if mask >> 63 else mask


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """A copy of [N, C] with zero columns up to a multiple; its plain strides are what view(dtype) needs."""
    count, columns = rows.shape
    padded = rows.new_zeros(count, columns + -columns % multiple)
    padded[:, :columns] = rows
    return padded


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    padded = _padded(codes, 32)
    if bits == 8:
        return padded.view(torch.int32)
    lanes = padded.view(torch.int64)
    for lower, upper, gap in _fold_steps(bits):
        # No field reaches the sign bit below 8 bits, so the arithmetic shift is a logical one.
        lanes = (lanes & _signed(lower)) | ((lanes & _signed(upper)) >> gap)
    return lanes.view(torch.uint8).unflatten(1, (-1, 8))[..., :bits].flatten(1).view(torch.int32)


def _unpack_rows(words: Tensor, bits: int) -> Tensor:
    padded = _padded(words, bits)
    if bits == 8:
        return padded.view(torch.uint8)
    stream = padded.view(torch.uint8).unflatten(1, (-1, bits))
    lanes = torch.nn.functional.pad(stream, (0, 8 - bits)).flatten(1).view(torch.int64)
    for lower, upper, gap in reversed(_fold_steps(bits)):
        lanes = (lanes & _signed(lower)) | ((lanes << gap) & _signed(upper))
    return lanes.view(torch.uint8)
