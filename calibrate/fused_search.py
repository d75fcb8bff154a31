"""`calibrate.scale_search.best_clips` as one Triton kernel: the same clips in one pass over the weights.

Weights are read once; all clips are tried on what is in registers. Rows that are longer than a chunk are read again for
each of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibrate.kernel_parts import divide, layout, neighbour_sum, quantize, scale_and_zero, type_constants
from calibrate.rounding import Target
from calibrate.scale_search import Candidates


def fused_best_clips(target: Target, importance: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """`calibrate.scale_search.best_clips` on a GPU."""
    where, bounds = layout(target), target.bounds
    low_clip, high_clip = (torch.empty_like(bound) for bound in bounds)
    coarse, fine = (torch.tensor(clips, device=bounds.low.device) for clips in (candidates.coarse, candidates.fine))
    tensors = (target.weight, importance.float(), bounds.low, bounds.high)
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("the kernel takes contiguous tensors only")
    _search[where.programs](
        *tensors,
        target.global_scale,
        coarse,
        fine,
        low_clip,
        high_clip,
        where.groups,
        target.weight.shape[1],
        **type_constants(target.type),
        **where.constants,
        COARSE=len(candidates.coarse),
        ROUNDS=len(candidates.fine),
        FINE=len(candidates.fine[0]) if candidates.fine else 0,
        num_warps=where.warps,
        enable_fp_fusion=False,
    )
    return low_clip, high_clip


@triton.jit
def _search(
    weight,  # [N, K] bfloat16, float16 or float32, rows of `groups` groups
    importance,  # [K] float32
    low_bound,  # [groups] float32
    high_bound,
    global_scale,  # [1] float32
    coarse,  # [COARSE, 2] float32: low and high clip
    fine,  # [ROUNDS, FINE, 2] float32: steps of them
    low_out,  # [groups] float32
    high_out,
    groups,
    columns,  # K
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
    COARSE: tl.constexpr,
    ROUNDS: tl.constexpr,
    FINE: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    exists = group < groups
    low_b = tl.load(low_bound + group, mask=exists, other=0.0)
    high_b = tl.load(high_bound + group, mask=exists, other=0.0)
    g_scale = 1.0
    if TYPE == "nvfp4":
        g_scale = tl.load(global_scale)
    best_low = tl.full([GROUPS], 1.0, tl.float32)
    best_high = tl.full([GROUPS], 1.0, tl.float32)
    least = tl.full([GROUPS], float("inf"), tl.float32)
    start_low = best_low
    start_high = best_high
    column = tl.arange(0, BLOCK)
    feature = group % (columns // GROUP) * GROUP  # of a group's first weight
    if GROUP <= BLOCK:
        here = exists[:, None] & (column < GROUP)[None, :]
        w = tl.load(weight + group[:, None].to(tl.int64) * GROUP + column[None, :], mask=here, other=0.0)
        w = w.to(tl.float32)
        weigh = tl.load(importance + feature[:, None] + column[None, :], mask=here, other=0.0)
    for trial in range(1 + COARSE + ROUNDS * FINE):
        low_c = start_low
        high_c = start_high
        if (trial > 0) & (trial <= COARSE):
            low_c = tl.zeros_like(low_b) + tl.load(coarse + 2 * (trial - 1))
            high_c = tl.zeros_like(low_b) + tl.load(coarse + 2 * (trial - 1) + 1)
        if FINE > 0:
            step = trial - 1 - COARSE
            # A new round begins at the best so far. Not by `if`: Triton would not carry these from trial to trial, as
            # they are bound to the values of other names at first.
            begins = (trial > COARSE) & (step % FINE == 0)
            start_low = tl.where(begins, best_low, start_low)
            start_high = tl.where(begins, best_high, start_high)
            if trial > COARSE:
                low_c = tl.where(start_low > 0, start_low + tl.load(fine + 2 * step), start_low)
                high_c = tl.where(start_high > 0, start_high + tl.load(fine + 2 * step + 1), start_high)
        scale, zero = scale_and_zero(
            low_b * low_c, high_b * high_c, g_scale, weight.dtype.element_ty, TYPE, HIGHEST, ZERO, TOP_POWER_INVERSE
        )
        errors = tl.zeros([GROUPS, BLOCK], tl.float32)
        for start in tl.static_range(0, GROUP, BLOCK):
            if GROUP > BLOCK:
                here = exists[:, None] & (start + column < GROUP)[None, :]
                at = group[:, None].to(tl.int64) * GROUP + start + column[None, :]
                w = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
                weigh = tl.load(importance + feature[:, None] + start + column[None, :], mask=here, other=0.0)
            position = divide(w, scale)
            value, _ = quantize(position, 0.0 * w, zero, TYPE, HIGHEST, LEAST_POWER, MANTISSA_UNIT, 1.0)
            error = scale[:, None] * value - w
            errors += error * error * weigh
        error_sum = neighbour_sum(errors, BLOCK, LEVELS)
        won = (error_sum < least) | (trial == 0)
        best_low = tl.where(won, low_c, best_low)
        best_high = tl.where(won, high_c, best_high)
        least = tl.where(won, error_sum, least)
    tl.store(low_out + group, best_low, mask=exists)
    tl.store(high_out + group, best_high, mask=exists)
