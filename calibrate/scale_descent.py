"""Scales without tuning: what `search_scales` found for every group by itself, made to suit all groups of a row.

With X [T, K] the layer's inputs and H = X^T X, the squared error of the layer's output is, for each row e of W^ - W,

    e H e^T

The search sees the diagonal of H only. Here one group after the other takes those clips, of all that the search tries,
that make the whole row's error least, given the errors of its other groups: errors that cancel are worth more than
errors that are small. Values are still rounded to nearest. With the damping that is added to H, no row gets worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.gptq import DAMPING
from calibrate.rounding import Rounding, Target, fake_quantize
from calibrate.scale_search import Candidates, moved_clip
from vllm_autoround.format.weights import Bounds

_SWEEPS = 2  # over all groups
_MOST_TRIED = 1 << 24  # weights at once, to bound the memory


@torch.no_grad()
def descend_scales(target: Target, start: Rounding, hessian: Tensor) -> Rounding:
    """Clips that are no worse than those of ``start`` in the metric of ``hessian``.

    ``start`` itself for groups of several rows, and where the search has nothing to choose from.

    Args:
        target: as `search_scales` gives it.
        start: rounding to nearest.
        hessian: H [K, K] float32, symmetric.
    """
    candidates = Candidates.of(target.type, tuned=False)
    tried = len(candidates.coarse)
    if target.tile.rows > 1 or tried == 1:
        return start
    h = hessian.clone()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    at_once = max(1, _MOST_TRIED // (tried * target.tile.columns))
    clips = []
    for first in range(0, len(target.weight), at_once):
        rows = slice(first, first + at_once)
        part = _part(target, rows, slice(None), slice(None))
        clips.append(_descend(part, start.low_clip[rows], start.high_clip[rows], h, candidates))
    return Rounding.nearest(target, *(torch.cat(parts) for parts in zip(*clips, strict=True)))


def _descend(
    target: Target, low_clip: Tensor, high_clip: Tensor, h: Tensor, candidates: Candidates
) -> tuple[Tensor, Tensor]:
    """The clips [N, C] that these become."""
    low_clip, high_clip = low_clip.clone(), high_clip.clone()
    error = _errors(target, low_clip[None], high_clip[None])[0]
    coarse, *fine = (
        torch.tensor(tried, device=h.device).T[..., None] for tried in (candidates.coarse, *candidates.fine)
    )
    width = target.tile.columns
    for group in [*range(low_clip.shape[1])] * _SWEEPS:
        columns = slice(group * width, (group + 1) * width)
        part = _part(target, slice(None), columns, slice(group, group + 1))
        own = h[columns, columns]
        others = error @ h[:, columns] - error[:, columns] @ own
        low, high = low_clip[:, group], high_clip[:, group]
        low, high = _best(part, own, others, _stack(low, coarse[0]), _stack(high, coarse[1]))
        for steps in fine:
            lows, highs = _stack(low, moved_clip(low, steps[0])), _stack(high, moved_clip(high, steps[1]))
            low, high = _best(part, own, others, lows, highs)
        low_clip[:, group], high_clip[:, group] = low, high
        error[:, columns] = _errors(part, low[None, :, None], high[None, :, None])[0]
    return low_clip, high_clip


def _best(part: Target, own: Tensor, others: Tensor, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of one group the best of these clips [T, N], the first of them among equals: [N] each.

    Args:
        own: H of the group's features, [G, G].
        others: e H of these features, [N, G], from the errors of the other groups.
    """
    errors = _errors(part, lows[..., None], highs[..., None])
    least = ((errors @ own + 2 * others) * errors).sum(-1).argmin(0, keepdim=True)
    return lows.gather(0, least)[0], highs.gather(0, least)[0]


def _errors(target: Target, lows: Tensor, highs: Tensor) -> Tensor:
    """W^ - W under clips [T, N, C], [T, N, K] float32."""
    times = len(lows)
    bounds = Bounds(*(bound.repeat(times, 1) for bound in target.bounds))
    stacked = Target(target.weight.repeat(times, 1), bounds, target.type, target.global_scale)
    made = fake_quantize(stacked, Rounding.nearest(stacked, lows.flatten(0, 1), highs.flatten(0, 1)))
    return (made.float() - stacked.weight.float()).unflatten(0, (times, -1))


def _stack(best: Tensor, tried: Tensor) -> Tensor:
    """[N] and [T, N] or [T, 1] -> [1 + T, N]."""
    return torch.cat([best[None], tried.expand(-1, len(best))])


def _part(target: Target, rows: slice, columns: slice, groups: slice) -> Target:
    bounds = Bounds(*(bound[rows, groups] for bound in target.bounds))
    return Target(target.weight[rows, columns], bounds, target.type, target.global_scale)
