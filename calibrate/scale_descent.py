"""Scales without tuning: what `search_scales` found for every group by itself, made to suit all groups of a row.

With X [T, K] the layer's inputs and H = X^T X, the squared error of the layer's output is, for each row e of W^ - W,

    e H e^T

The search sees the diagonal of H only. Here one group after the other takes those clips, of the search's grid and close
to its own, that make the whole row's error least, given the errors of its other groups: errors that cancel are worth
more than errors that are small. Values are still rounded to nearest. With the damping that is added to H, and on the
samples that H was made of, no row gets worse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, inf

from calibrate.gptq import DAMPING
from calibrate.rounding import Rounding, Target, fake_quantize
from calibrate.scale_search import Candidates, moved_clip
from vllm_autoround.format.weights import Bounds, WeightType

_FEW = 3  # scales to choose from: less than 1 % better, for MXFP4
_SWEEPS = 2  # over all groups of a row
_BLOCK = 256  # features whose groups are tried at once, and then chosen from one after the other
_MOST_TRIED = 1 << 26  # weights at once, some 25 bytes each


def descends(kind: WeightType) -> bool:
    """Whether the search has enough to choose from: no powers of two, no grid as fine at one scale as at another."""
    return len(Candidates.of(kind, tuned=False).coarse) > _FEW


@torch.no_grad()
def descend_scales(target: Target, start: Rounding, hessian: Tensor) -> Rounding:
    """Clips that are no worse than those of ``start`` in the metric of ``hessian``; ``start`` if nothing `descends`.

    Args:
        target: as `search_scales` gives it.
        start: rounding to nearest.
        hessian: H [K, K] float32, symmetric.
    """
    candidates = Candidates.of(target.type, tuned=False)
    if not descends(target.type):
        return start
    h = hessian.clone()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    at_once = max(1, _MOST_TRIED // max(len(candidates.coarse) * _block(target), len(h)))
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
    rounds = (candidates.coarse, *candidates.fine)
    coarse, *fine = (torch.tensor(tried, device=h.device).T[..., None] for tried in rounds)  # [2, T, 1] each
    width, rows = target.tile.columns, slice(None)
    sweeps = _SWEEPS if width < len(h) else 1
    for block in list(range(0, len(h), _block(target))) * sweeps:
        columns = slice(block, block + _block(target))
        groups = slice(columns.start // width, columns.stop // width)
        part = _part(target, rows, columns, groups)
        tried = _errors(part, *(ratio[..., None].expand(-1, *part.bounds.low.shape) for ratio in coarse))
        slopes = error @ h[:, columns]  # e H, kept up to date inside the block
        for group in range(part.bounds.low.shape[1]):
            inner = slice(group * width, (group + 1) * width)
            here, number = slice(block + inner.start, block + inner.stop), groups.start + group
            own, before = h[here, here], error[:, here].clone()
            others = slopes[:, inner] - before @ own
            one = _part(target, rows, here, slice(number, number + 1))
            now = _Choice(before, low_clip[:, number], high_clip[:, number])
            now = _best(now, _Choice(tried[..., inner], *coarse), own, others)
            for steps in fine:
                lows, highs = moved_clip(now.low, steps[0]), moved_clip(now.high, steps[1])
                now = _best(now, _Choice(_errors(one, lows[..., None], highs[..., None]), lows, highs), own, others)
            error[:, here], low_clip[:, number], high_clip[:, number] = now
            slopes += (now.error - before) @ h[here, columns]
    return low_clip, high_clip


class _Choice(NamedTuple):
    """Of one group; or several to choose from, with T in front, and N or 1 clips each."""

    error: Tensor  # W^ - W, [N, G]
    low: Tensor  # [N]
    high: Tensor  # [N]


def _best(now: _Choice, others: _Choice, own: Tensor, slopes: Tensor) -> _Choice:
    """For each row the best, ``now`` among equals.

    Args:
        own: H of the group's features, [G, G].
        slopes: e H of these features, [N, G], from the errors of the other groups.
    """
    error = torch.cat([now.error[None], others.error])
    low, high = (torch.cat([old[None], new.expand(-1, len(old))]) for old, new in zip(now[1:], others[1:], strict=True))
    loss = ((error @ own + 2 * slopes) * error).sum(-1)
    least = torch.where(loss.isfinite(), loss, inf).argmin(0)  # in float16 W^ may be infinite
    row = torch.arange(len(least), device=least.device)
    return _Choice(error[least, row], low[least, row], high[least, row])


def _errors(target: Target, lows: Tensor, highs: Tensor) -> Tensor:
    """W^ - W under clips [T, N, C], [T, N, K] float32."""
    times = len(lows)
    bounds = Bounds(*(bound.repeat(times, 1) for bound in target.bounds))
    stacked = Target(target.weight.repeat(times, 1), bounds, target.type, target.global_scale)
    made = fake_quantize(stacked, Rounding.nearest(stacked, lows.flatten(0, 1), highs.flatten(0, 1)))
    return (made.float() - stacked.weight.float()).unflatten(0, (times, -1))


def _block(target: Target) -> int:
    """Whole groups."""
    width = target.tile.columns
    return max(width, _BLOCK // width * width)


def _part(target: Target, rows: slice, columns: slice, groups: slice) -> Target:
    bounds = Bounds(*(bound[rows, groups] for bound in target.bounds))
    return Target(target.weight[rows, columns], bounds, target.type, target.global_scale)
