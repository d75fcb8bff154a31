"""Tuning with AdamW in place of the sign of the gradient (`calibrate.rounding.sign_step`)."""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.rounding import MOST_OFFSET, Gradients, Rounding, Target, fake_quantize, gradients

_EPS = 1e-20  # gradients of a mean squared error may be tiny, and are known up to a factor only


class AdamWStep:
    """torch's AdamW without weight decay, which would pull clips towards 0, on one layer's values."""

    def __init__(self, rounding: Rounding) -> None:
        """Steps for ``rounding``, whose offset is float32 here: it moves by fractions of a unit."""
        offset = {"params": [rounding.offset]}
        clips = {"params": [rounding.low_clip, rounding.high_clip]}
        self._optimizer = torch.optim.AdamW([offset, clips], weight_decay=0.0, eps=_EPS, foreach=False)

    def restart(self) -> None:
        """Forget the running means."""
        self._optimizer.state.clear()

    def __call__(
        self,
        target: Target,
        rounding: Rounding,
        means: Gradients | None,
        grad: Tensor,
        rate: Tensor,
        out: Tensor,
        finite: Tensor,
        *,
        most_clip: float,
    ) -> None:
        """See `sign_step`; ``means`` is not used: the optimizer has its own."""
        slopes = gradients(target, rounding, grad)
        finite.logical_and_(slopes.low_clip.isfinite().all() & slopes.high_clip.isfinite().all())
        rounding.offset.grad = slopes.offset
        if not target.type.one_scale:  # it is shared with other layers
            rounding.low_clip.grad, rounding.high_clip.grad = slopes.low_clip, slopes.high_clip
        for group, lr in zip(self._optimizer.param_groups, rate.tolist(), strict=True):
            group["lr"] = lr
        self._optimizer.step()
        rounding.offset.clamp_(-MOST_OFFSET, MOST_OFFSET)
        for clip in (rounding.low_clip, rounding.high_clip):
            clip.clamp_(0, most_clip)
        out.copy_(fake_quantize(target, rounding))
