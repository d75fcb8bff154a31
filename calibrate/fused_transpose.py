"""What `calibrate.fp8_matmul` turns, `rescaled_transpose` and both `..._both_ways`, as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibrate.kernel_parts import clamp, sign

_ROWS, _COLUMNS = 64, 128  # of a tile


def fused_rescaled_transpose(rows8: Tensor, factor: Tensor) -> Tensor:
    """`calibrate.fp8_matmul.rescaled_transpose` on a GPU, of contiguous tensors."""
    return _launch(rows8.view(torch.uint8), factor, None, None, None)


def fused_rescaled_both_ways(values: Tensor, factor: Tensor, turned_factor: Tensor) -> tuple[Tensor, Tensor]:
    """`calibrate.fp8_matmul.rescaled_both_ways` on a GPU, of contiguous tensors."""
    rows8 = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    return rows8, _launch(values, turned_factor, rows8.view(torch.uint8), factor, None)


def fused_dithered_both_ways(values: Tensor, scale: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """`calibrate.fp8_matmul.dithered_both_ways` on a GPU, of contiguous tensors."""
    rows8 = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    factor = (1 / scale).expand(len(values)).contiguous()
    return rows8, _launch(values, factor, rows8.view(torch.uint8), factor, step)


def _launch(
    source: Tensor, turned_factor: Tensor, rows8: Tensor | None, factor: Tensor | None, step: Tensor | None
) -> Tensor:
    if not all(tensor is None or tensor.is_contiguous() for tensor in (source, turned_factor, factor)):
        raise ValueError("the kernel takes contiguous tensors only")
    rows, columns = source.shape
    turned = torch.empty(columns, rows, dtype=torch.float8_e4m3fn, device=source.device)
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    out = turned.view(torch.uint8)
    _turn[grid](source, turned_factor, out, rows8, factor, step, rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS)
    return turned


@triton.jit
def _turn(
    source,  # [M, K] bytes of e4m3, or floats
    turned_factor,  # [M] float32
    turned,  # [K, M] bytes of e4m3
    rows8,  # [M, K] bytes of e4m3; None: not wanted
    factor,  # [M] float32, for these
    step,  # [1] int64, to dither these; None: they are rounded to nearest
    rows,
    columns,
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
        scaled = values * tl.load(factor + row, mask=row < rows)[:, None]
        if step is not None:
            scaled = _dither(clamp(scaled, -448.0, 448.0), at, tl.load(step))
        tl.store(rows8 + at, scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=here)
    scaled = values * tl.load(turned_factor + row, mask=row < rows)[:, None]
    other_way = tl.trans(scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True))
    tl.store(turned + column[:, None].to(tl.int64) * rows + row[None, :], other_way, mask=tl.trans(here))


@triton.jit
def _dither(x, place, step):
    """`calibrate.fp8_matmul.dither` of the entries at ``place``."""
    mixed = place.to(tl.uint32) * 2654435761
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    threshold = (mixed ^ (mixed >> 15)) + step.to(tl.uint32) * 2654435769
    moved = tl.where(tl.abs(x) < 0.015625, sign(x) * 0.015625, 0.0)
    bits = (x + moved).to(tl.uint32, bitcast=True) + (threshold >> 12)
    return (bits & 0xFFF00000).to(tl.float32, bitcast=True) - moved
