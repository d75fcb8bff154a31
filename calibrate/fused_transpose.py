"""`calibrate.fp8_matmul.rescaled_transpose` as a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, uint8

_ROWS, _COLUMNS = 64, 128  # of a tile


def fused_rescaled_transpose(rows8: Tensor, factor: Tensor) -> Tensor:
    """`calibrate.fp8_matmul.rescaled_transpose` on a GPU, of contiguous tensors."""
    rows, columns = rows8.shape
    out = rows8.new_empty(columns, rows)
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    _turn[grid](rows8.view(uint8), factor, out.view(uint8), rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS)
    return out


@triton.jit
def _turn(
    source,  # [M, K] bytes of e4m3
    factor,  # [M] float32
    out,  # [K, M] bytes of e4m3
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    bits = tl.load(source + row[:, None].to(tl.int64) * columns + column[None, :], mask=here, other=0)
    scaled = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32) * tl.load(factor + row, mask=row < rows)[:, None]
    turned = tl.trans(scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True))
    tl.store(out + column[:, None].to(tl.int64) * rows + row[None, :], turned, mask=tl.trans(here))
