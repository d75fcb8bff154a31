"""Where tuning starts: for every group the clips with the least squared error, weighted by the activations.

A grid over the scale, coarse and then finer around the best, costs little beside tuning and is worth a large part of
it; with few bits the full range is far from the best one.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from calibrate.compilation import compiled
from calibrate.rounding import Rounding, Target, group_errors
from vllm_autoround.format.weights import Bounds, Float8, Integer, Mx, NvFp4, WeightType


def search_scales(target: Target, importance: Tensor) -> tuple[Target, Rounding]:
    """The target with the bounds that the clips are relative to, and the best clips.

    The bounds of a symmetric type become +-amax, one of which has a clip of 0 and stays out of it: which of the two
    decides the sign of the scale, so that both signs can be had.

    Args:
        importance: [K] of the input features: the sum of their squares over the calibration data.
    """
    if target.type.one_scale:
        return target, Rounding.nearest(target)
    if target.type.symmetric:
        amax = torch.maximum(-target.bounds.low, target.bounds.high)
        target = Target(target.weight, Bounds(-amax, amax), target.type, target.global_scale)
    device = target.weight.device
    better = _better if device.type == "cpu" else compiled(_better)
    ones = torch.ones_like(target.bounds.low)
    best = Rounding.nearest(target, ones, ones)
    least = group_errors(target, best, importance)
    # Tensors, so that one compilation serves all candidates.
    for low_clip, high_clip in torch.tensor(_coarse(target.type), device=device):
        best, least = better(target, best, least, ones * low_clip, ones * high_clip, importance)
    for steps in _fine(target.type):
        start = best
        for low_step, high_step in torch.tensor(steps, device=device):
            clips = (_move(start.low_clip, low_step), _move(start.high_clip, high_step))
            best, least = better(target, best, least, *clips, importance)
    return target, best


def _better(
    target: Target, best: Rounding, least: Tensor, low_clip: Tensor, high_clip: Tensor, importance: Tensor
) -> tuple[Rounding, Tensor]:
    """For each group the better of the best clips so far, whose errors are ``least``, and these."""
    error = group_errors(target, Rounding(best.offset, low_clip, high_clip), importance)
    won = error < least
    clips = (torch.where(won, low_clip, best.low_clip), torch.where(won, high_clip, best.high_clip))
    return Rounding(best.offset, *clips), torch.where(won, error, least)


def _move(clip: Tensor, step: Tensor) -> Tensor:
    """A clip of 0 stays out of the range."""
    return torch.where(clip > 0, clip + step, clip)


def _coarse(kind: WeightType) -> list[tuple[float, float]]:
    """Clips to begin with; as fine as the type's scales are, where these are coarse."""
    match kind:
        case Integer(symmetric=False):
            ratios = torch.linspace(0.4, 1.1, 8).tolist()
            return list(product(ratios, ratios))
        case Mx():  # powers of two
            ratios = [0.5, 1.0, 2.0]
        case NvFp4():  # three bits of mantissa; wider ranges are better before tuning and worse after it
            ratios = torch.linspace(0.6, 1.2, 13).tolist()
        case Float8():  # the grid is as fine at one scale as at another
            ratios = [1.0]
        case _:
            ratios = torch.linspace(0.4, 1.2, 17).tolist()
    high = [(0.0, ratio) for ratio in ratios]
    return [*high, *((ratio, 0.0) for ratio in ratios)] if kind.signed_scale else high


def _fine(kind: WeightType) -> list[list[tuple[float, float]]]:
    """Rounds of steps away from the best clips so far."""
    if not isinstance(kind, Integer):
        return []
    if kind.symmetric:
        return [[(step, step) for step in (-0.025, 0.025)], [(step, step) for step in (-0.0125, 0.0125)]]
    around = (-1, 0, 1)
    return [[(size * i, size * j) for i, j in product(around, around) if i or j] for size in (0.05, 0.025)]
