"""`calibrate.rounding.sign_step` as one Triton kernel: the same bits in one pass over the weights.

A weight costs 14 bytes of traffic: gradient 2, W 2, V 4, running mean 4, W^ 2. What a group costs beside, at most 48
bytes, matters for groups of 16 only.

Three things make the bits the same: divisions are IEEE's (`tl.div_rn`), products and sums are not contracted
(``enable_fp_fusion=False``), and a group is summed in the order of `ordered_sum`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibrate.kernel_parts import (
    clamp,
    divide,
    layout,
    neighbour_sum,
    quantize,
    scale_and_zero,
    sign,
    times_reciprocal,
    type_constants,
)
from calibrate.rounding import MOST_OFFSET, OFFSET_UNIT, Gradients, Rounding, Target


def fused_sign_step(
    target: Target,
    rounding: Rounding,
    means: Gradients | None,
    grad: Tensor,
    rate: Tensor,
    out: Tensor,
    finite: Tensor,
    *,
    momentum: float = 0.0,
    most_clip: float = 1.0,
) -> None:
    """`calibrate.rounding.sign_step` on a GPU."""
    _launch(target, rounding, means, grad, rate, out, finite, momentum=momentum, most_clip=most_clip)


def fused_fake_quantize(target: Target, rounding: Rounding, out: Tensor) -> None:
    """`calibrate.rounding.fake_quantize` on a GPU, into ``out`` [N, K]."""
    _launch(target, rounding, None, None, None, out, None)


def fused_grid_values(target: Target, rounding: Rounding) -> Tensor:
    """`calibrate.rounding.grid_values` on a GPU, in the dtype of W, which has all values of a grid."""
    out = torch.empty_like(target.weight)
    clips = rounding.low_clip.contiguous(), rounding.high_clip.contiguous()
    _launch(target, Rounding(rounding.offset, *clips), None, None, None, out, None, values=True)
    return out


def _launch(
    target: Target,
    rounding: Rounding,
    means: Gradients | None,
    grad: Tensor | None,
    rate: Tensor | None,
    out: Tensor,
    finite: Tensor | None,
    *,
    momentum: float = 0.0,
    most_clip: float = 1.0,
    values: bool = False,
) -> None:
    where = layout(target)
    offset = None if rounding.is_nearest else rounding.offset
    tensors: list[Tensor | None] = [target.weight, grad, offset, None if means is None else means.offset, out]
    tensors += [target.bounds.low, target.bounds.high, rounding.low_clip, rounding.high_clip]
    tensors += [None, None] if means is None else [means.low_clip, means.high_clip]
    tensors += [target.global_scale, rate, finite]
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError("the kernel takes contiguous tensors only")
    _step[where.programs](
        *tensors,
        where.groups,
        **type_constants(target.type),
        **where.constants,
        STEP=grad is not None,
        VALUES=values,
        MOMENTUM=None if means is None else momentum,
        FRESH=1 - momentum,
        MOST_CLIP=most_clip,
        UNIT=OFFSET_UNIT,
        MOST_OFFSET=MOST_OFFSET,
        num_warps=where.warps,
        enable_fp_fusion=False,
    )


@triton.jit
def _step(
    weight,  # [N, K] bfloat16, float16 or float32; as all [N, K], rows of `groups` groups
    grad,  # [N, K]
    offset,  # [N, K] int16; None: 0
    mean,  # [N, K] bfloat16
    out,  # [N, K]
    low_bound,  # [groups] float32, as the next five
    high_bound,
    low_clip,
    high_clip,
    low_mean,
    high_mean,
    global_scale,  # [1] float32
    rate,  # [2] float32
    finite,  # scalar bool
    groups,
    TYPE: tl.constexpr,
    HIGHEST: tl.constexpr,
    ZERO: tl.constexpr,
    LEAST_POWER: tl.constexpr,
    MANTISSA_UNIT: tl.constexpr,
    TOP_POWER_INVERSE: tl.constexpr,
    GROUP: tl.constexpr,  # weights a group
    BLOCK: tl.constexpr,  # of them at once, filled up with zeros
    LEVELS: tl.constexpr,  # log2 of BLOCK
    GROUPS: tl.constexpr,  # groups a program
    STEP: tl.constexpr,  # False: W^ only
    VALUES: tl.constexpr,  # q in place of W^
    MOMENTUM: tl.constexpr,
    FRESH: tl.constexpr,
    MOST_CLIP: tl.constexpr,
    UNIT: tl.constexpr,
    MOST_OFFSET: tl.constexpr,
):
    """One step of `GROUPS` groups; a group longer than BLOCK is walked through twice, its scale known in between."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    exists = group < groups
    column = tl.arange(0, BLOCK)
    low_b = tl.load(low_bound + group, mask=exists, other=0.0)
    high_b = tl.load(high_bound + group, mask=exists, other=0.0)
    low_c = tl.load(low_clip + group, mask=exists, other=0.0)
    high_c = tl.load(high_clip + group, mask=exists, other=0.0)
    g_scale = 1.0
    if TYPE == "nvfp4":
        g_scale = tl.load(global_scale)
    dtype: tl.constexpr = weight.dtype.element_ty

    if STEP:
        offset_rate = tl.load(rate)
        clip_rate = tl.load(rate + 1)
        # What is loaded is loaded before the first division: ptxas moves no load ahead of its branches.
        if MOMENTUM is not None:
            low_m = tl.load(low_mean + group, mask=exists, other=0.0)
            high_m = tl.load(high_mean + group, mask=exists, other=0.0)
        low = low_b * low_c
        high = high_b * high_c
        slopes = tl.zeros([GROUPS, BLOCK], tl.float32)
        zero_slopes = tl.zeros([GROUPS, BLOCK], tl.float32)
        for start in tl.static_range(0, GROUP, BLOCK):
            at = group[:, None].to(tl.int64) * GROUP + start + column[None, :]
            here = exists[:, None] & (start + column < GROUP)[None, :]
            w = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
            v = tl.load(offset + at, mask=here, other=0).to(tl.float32)
            g = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
            if MOMENTUM is not None:
                m = tl.load(mean + at, mask=here, other=0.0).to(tl.float32)
            scale, zero = scale_and_zero(low, high, g_scale, dtype, TYPE, HIGHEST, ZERO, TOP_POWER_INVERSE)
            position = times_reciprocal(w, scale)
            value, inside = quantize(position, v, zero, TYPE, HIGHEST, LEAST_POWER, MANTISSA_UNIT, UNIT)
            slopes += g * (value - tl.where(inside, position, 0.0))
            pull = scale[:, None] * g
            if TYPE == "asymmetric":
                zero_slopes += tl.where(inside, 0.0, -pull)
            pull = tl.where(inside, pull, 0.0)
            if MOMENTUM is not None:
                pull = m * MOMENTUM + pull * FRESH
                tl.store(mean + at, pull.to(tl.bfloat16), mask=here)
            v = clamp(v - offset_rate * sign(pull), -MOST_OFFSET, MOST_OFFSET)
            tl.store(offset + at, v.to(tl.int16), mask=here)

        d_scale = neighbour_sum(slopes, BLOCK, LEVELS)
        if TYPE == "asymmetric":
            d_zero = neighbour_sum(zero_slopes, BLOCK, LEVELS)
            d_high = (d_scale + tl.div_rn(d_zero * low, scale * scale)) * (1 / HIGHEST)
            d_low = -d_high - tl.div_rn(d_zero, scale)
        else:
            above = high >= -low
            d_low = tl.where(above, 0.0, -d_scale)
            d_high = tl.where(above, -d_scale if TYPE == "symmetric" else d_scale, 0.0)
        d_low = d_low * low_b
        d_high = d_high * high_b
        whole = (tl.abs(d_low) < float("inf")) & (tl.abs(d_high) < float("inf"))
        tl.store(finite + tl.zeros_like(group), whole, mask=exists & (whole == 0))
        if MOMENTUM is not None:
            d_low = low_m * MOMENTUM + d_low * FRESH
            d_high = high_m * MOMENTUM + d_high * FRESH
            tl.store(low_mean + group, d_low, mask=exists)
            tl.store(high_mean + group, d_high, mask=exists)
        low_c = clamp(low_c - clip_rate * sign(d_low), 0.0, MOST_CLIP)
        high_c = clamp(high_c - clip_rate * sign(d_high), 0.0, MOST_CLIP)
        tl.store(low_clip + group, low_c, mask=exists)
        tl.store(high_clip + group, high_c, mask=exists)

    if GROUP > BLOCK:
        tl.debug_barrier()  # offsets are read back that other threads may have written
    scale, zero = scale_and_zero(low_b * low_c, high_b * high_c, g_scale, dtype, TYPE, HIGHEST, ZERO, TOP_POWER_INVERSE)
    for start in tl.static_range(0, GROUP, BLOCK):
        at = group[:, None].to(tl.int64) * GROUP + start + column[None, :]
        here = exists[:, None] & (start + column < GROUP)[None, :]
        if not STEP or GROUP > BLOCK:
            w = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
            v = tl.zeros_like(w)
            if offset is not None:
                v = tl.load(offset + at, mask=here, other=0).to(tl.float32)
        position = times_reciprocal(w, scale) if STEP else divide(w, scale)
        value, inside = quantize(position, v, zero, TYPE, HIGHEST, LEAST_POWER, MANTISSA_UNIT, UNIT)
        made = value + zero[:, None] if VALUES else (scale[:, None] * value).to(dtype)
        tl.store(out + at, made.to(out.dtype.element_ty), mask=here)
