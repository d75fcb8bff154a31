"""Where tuning starts: for every group the clips with the least squared error, weighted by the activations.

A grid over the scale, coarse and then finer around the best, costs little beside tuning and is worth a large part of
it; with few bits the full range is far from the best one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from calibrate.rounding import Rounding, Target, group_errors
from vllm_autoround.format.weights import Bounds, Float8, Integer, Mx, NvFp4, WeightType


def search_scales(target: Target, importance: Tensor, *, tuned: bool) -> tuple[Target, Rounding]:
    """The target with the bounds that the clips are relative to, and the best clips.

    The bounds of a symmetric type become +-amax, one of which has a clip of 0 and stays out of it: which of the two
    decides the sign of the scale, so that both signs can be had.

    Args:
        importance: [K] of the input features: the sum of their squares over the calibration data.
        tuned: by steps, from here on.
    """
    if target.type.one_scale:
        return target, Rounding.nearest(target)
    if target.type.symmetric:
        amax = torch.maximum(-target.bounds.low, target.bounds.high)
        target = Target(target.weight, Bounds(-amax, amax), target.type, target.global_scale)
    candidates = Candidates.of(target.type, tuned=tuned)
    return target, Rounding.nearest(target, *_finder(target)(target, importance, candidates))


@dataclass(frozen=True, slots=True)
class Candidates:
    """The clips that are tried."""

    coarse: list[tuple[float, float]]  # low and high; 0 keeps that bound out of the range
    fine: list[list[tuple[float, float]]]  # rounds of steps away from the best so far

    @classmethod
    def of(cls, kind: WeightType, *, tuned: bool) -> Candidates:
        """Those of a weight type; where its scales are coarse, no finer than they are."""
        return cls(_coarse(kind, tuned), _fine(kind))


def best_clips(target: Target, importance: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """For each group the low and high clips [R, C] with the least `group_errors`, the first of them among equals."""
    ones = torch.ones_like(target.bounds.low)
    best = (ones, ones)
    least = group_errors(target, Rounding.nearest(target, *best), importance)

    def attempt(low_clip: Tensor, high_clip: Tensor) -> None:
        nonlocal best, least
        error = group_errors(target, Rounding.nearest(target, low_clip, high_clip), importance)
        won = error < least
        best = (torch.where(won, low_clip, best[0]), torch.where(won, high_clip, best[1]))
        least = torch.where(won, error, least)

    for low_clip, high_clip in candidates.coarse:
        attempt(ones * low_clip, ones * high_clip)
    for steps in candidates.fine:
        start = best
        for low_step, high_step in steps:
            attempt(moved_clip(start[0], low_step), moved_clip(start[1], high_step))
    return best


def moved_clip(clip: Tensor, step: Tensor | float) -> Tensor:
    """A clip of 0 stays out of the range."""
    return torch.where(clip > 0, clip + step, clip)


def _finder(target: Target) -> Callable[[Target, Tensor, Candidates], tuple[Tensor, Tensor]]:
    if target.weight.device.type == "cuda":
        # Triton, which a CPU may be without.
        from calibrate.fused_search import fused_best_clips  # noqa: PLC0415
        from calibrate.kernel_parts import supports  # noqa: PLC0415

        if supports(target):
            return fused_best_clips
    return best_clips


def _coarse(kind: WeightType, tuned: bool) -> list[tuple[float, float]]:
    """Clips to begin with."""
    match kind:
        case Integer(symmetric=False):
            ratios = torch.linspace(0.4, 1.1, 8).tolist()
            return list(product(ratios, ratios))
        case Mx():  # powers of two
            ratios = [0.5, 1.0, 2.0]
        case NvFp4():  # three bits of mantissa; wider ranges are better before tuning and worse after it
            ratios = (torch.linspace(0.6, 1.2, 13) if tuned else torch.linspace(0.5, 1.5, 21)).tolist()
        case Float8():  # the grid is as fine at one scale as at another
            ratios = [1.0]
        case _:
            ratios = torch.linspace(0.4, 1.2, 17).tolist()
    high = [(0.0, ratio) for ratio in ratios]
    return [*high, *((ratio, 0.0) for ratio in ratios)] if kind.signed_scale else high


def _fine(kind: WeightType) -> list[list[tuple[float, float]]]:
    """Rounds of steps."""
    if not isinstance(kind, Integer):
        return []
    if kind.symmetric:
        return [[(step, step) for step in (-0.025, 0.025)], [(step, step) for step in (-0.0125, 0.0125)]]
    around = (-1, 0, 1)
    return [[(size * i, size * j) for i, j in product(around, around) if i or j] for size in (0.05, 0.025)]
