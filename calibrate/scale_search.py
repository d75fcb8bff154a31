"""Where tuning starts: for every group the clips with the least squared error, weighted by the activations.

A fine grid over the scale costs little beside tuning and is worth a large part of it; with few bits the full range is
far from the best one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from calibrate.rounding import Rounding, Target, group_errors
from vllm_autoround.format.weights import Bounds, Float8, Mx, NvFp4, WeightType

_ASYMMETRIC = torch.linspace(0.4, 1.1, 22).tolist()
MOST_CLIP = 2.0  # tuning may widen the range again

Errors = Callable[[Target, Rounding, Tensor], Tensor]


def search_scales(target: Target, importance: Tensor, errors: Errors = group_errors) -> tuple[Target, Rounding]:
    """The target with the bounds that the clips are relative to, and the best clips.

    The bounds of a symmetric type become +-amax, one of which has a clip of 0 and stays out of it: which of the two
    decides the sign of the scale, so that both signs can be had.

    Args:
        importance: [K] of the input features: the sum of their squares over the calibration data.
        errors: `group_errors`, or its compiled form.
    """
    if target.type.one_scale:
        return target, Rounding.nearest(target)
    if target.type.symmetric:
        amax = torch.maximum(-target.bounds.low, target.bounds.high)
        target = Target(target.weight, Bounds(-amax, amax), target.type, target.global_scale)
        ratios = _ratios(target.type)
        candidates = [(0.0, ratio) for ratio in ratios]
        if target.type.signed_scale:
            candidates += [(ratio, 0.0) for ratio in ratios]
    else:
        candidates = list(product(_ASYMMETRIC, _ASYMMETRIC))

    ones = torch.ones_like(target.bounds.low)
    best, least = Rounding.nearest(target, ones, ones), torch.full_like(ones, float("inf"))
    for low_clip, high_clip in candidates:
        # Tensors, so that one compilation serves all candidates.
        candidate = Rounding(best.offset, ones * low_clip, ones * high_clip)
        error = errors(target, candidate, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = Rounding(
            best.offset,
            torch.where(better, candidate.low_clip, best.low_clip),
            torch.where(better, candidate.high_clip, best.high_clip),
        )
    return target, best


def _ratios(kind: WeightType) -> list[float]:
    """What to multiply the full range by: as fine as the type's scales are."""
    match kind:
        case Mx():  # powers of two
            return [0.5, 1.0, 2.0]
        case NvFp4():  # three bits of mantissa
            return torch.linspace(0.6, 1.2, 13).tolist()
        case Float8():  # the grid is as fine at one scale as at another
            return [1.0]
        case _:
            return torch.linspace(0.4, 1.2, 65).tolist()
