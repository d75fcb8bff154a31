"""What `calibrate.fp8_matmul` turns, `rescaled_transpose` and `scaled_both_ways`, as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibrate.fp8_matmul import COLUMN_UNIT, ROW_UNIT, STEP_UNIT

_ROWS, _COLUMNS = 64, 128  # of a tile


def fused_rescaled_transpose(rows8: Tensor, scale: Tensor) -> Tensor:
    """`calibrate.fp8_matmul.rescaled_transpose` on a GPU, of contiguous tensors."""
    return _launch(rows8.view(torch.uint8), scale, None, None, None)


def fused_scaled_both_ways(
    values: Tensor, scale: Tensor, turned_scale: Tensor, step: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`calibrate.fp8_matmul.scaled_both_ways` on a GPU, of contiguous tensors."""
    rows8 = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    return rows8, _launch(values, turned_scale, rows8.view(torch.uint8), scale, step)


def _launch(
    source: Tensor, turned_scale: Tensor, rows8: Tensor | None, scale: Tensor | None, step: Tensor | None
) -> Tensor:
    if not all(tensor is None or tensor.is_contiguous() for tensor in (source, turned_scale, scale)):
        raise ValueError("the kernel takes contiguous tensors only")
    rows, columns = source.shape
    turned = torch.empty(columns, rows, dtype=torch.float8_e4m3fn, device=source.device)
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    _turn[grid](
        source,
        turned_scale,
        turned.view(torch.uint8),
        rows8,
        scale,
        step,
        rows,
        columns,
        TURNED_STRIDE=int(turned_scale.numel() > 1),
        STRIDE=int(scale is not None and scale.numel() > 1),
        ROW_UNIT=ROW_UNIT,
        COLUMN_UNIT=COLUMN_UNIT,
        STEP_UNIT=STEP_UNIT,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    return turned


@triton.jit
def _turn(
    source,  # [M, K] bytes of e4m3, or floats
    turned_scale,  # [M] or [1] float32
    turned,  # [K, M] bytes of e4m3
    rows8,  # [M, K] bytes of e4m3; None: not wanted
    scale,  # [M] or [1] float32, of these
    step,  # [1] int64, to dither these; None: they are rounded to nearest
    rows,
    columns,
    TURNED_STRIDE: tl.constexpr,  # of `turned_scale`; 0: one for all rows
    STRIDE: tl.constexpr,  # of `scale`
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    STEP_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    values = tl.load(source + at, mask=here, other=0)
    if source.dtype.element_ty == tl.uint8:
        values = values.to(tl.float8e4nv, bitcast=True)
    values = values.to(tl.float32)
    if rows8 is not None:
        made = _over(values, scale, row, rows, STRIDE)
        if step is not None:
            of_rows = row.to(tl.uint32) * ROW_UNIT + tl.load(step).to(tl.uint32) * STEP_UNIT
            made = _dither(made, of_rows[:, None] + (column.to(tl.uint32) * COLUMN_UNIT)[None, :])
        tl.store(rows8 + at, made.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=here)
    made = _over(values, turned_scale, row, rows, TURNED_STRIDE)
    other_way = tl.trans(made.to(tl.float8e4nv).to(tl.uint8, bitcast=True))
    tl.store(turned + column[:, None].to(tl.int64) * rows + row[None, :], other_way, mask=tl.trans(here))


@triton.jit
def _over(values, scale, row, rows, STRIDE: tl.constexpr):
    """Over the scale, inside e4m3; NaN stays NaN."""
    factor = tl.div_rn(1.0, tl.load(scale + row * STRIDE, mask=row < rows, other=1.0))
    return tl.clamp(values * factor[:, None], -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _dither(x, threshold):
    """`calibrate.fp8_matmul.dither`."""
    sign_bit = x.to(tl.uint32, bitcast=True) & 0x80000000
    least_power = (sign_bit | 0x3C800000).to(tl.float32, bitcast=True)  # 2^-6
    moved = tl.where(tl.abs(x) < 0.015625, least_power, 0.0)
    bits = (x + moved).to(tl.uint32, bitcast=True) + (threshold >> 12)
    return (bits & 0xFFF00000).to(tl.float32, bitcast=True) - moved
