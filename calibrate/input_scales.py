"""Static scales of a block's inputs, tuned: by a search before the steps, or in each of them, as AutoRound does.

The largest magnitude says where they start. What a float grid loses hardly depends on its scale, but
for luck: the largest values may happen to be near grid points. The gradient does not know that. Straight through the
rounding, x^ = s round(x / s) has the slope (x^ - x) / s, and along x^ - x, an error, the loss rises: so whatever s is,
it is to be smaller, until too much saturates. Our own recipes therefore search, and AutoRound's descend as it does
(figures: benchmarks/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from calibrate.activations import QuantizedInput
from calibrate.config import Recipe

_PARTS = 4  # that an octave is tried in
_WORTH = 0.998  # of the loss: less is as likely to be lost as gained on other samples (benchmarks/NOTES.md)
_LEAST = 2.0**-10  # a factor; a scale of 0 would divide by it


class InputScale:
    """One scale for a whole input, learned step by step: a factor in (0, 1] of the scale that it starts from.

    After `act_max_scale` of AutoRound (auto_round/wrapper.py), but one factor for layers that vLLM fuses, as they share
    the scale. By sign descent, whatever the optimizer of the weights. Its memory stays where it is.
    """

    def __init__(self, scale: Tensor, momentum: float) -> None:
        """Args:
        scale: [1] float32, what the layers quantize by; changed in place, and a leaf that gets the gradient.
        momentum: share of the gradients' running mean that a step keeps.
        """
        self.scale = scale
        self._start = scale.clone()
        self._factor, self._mean = torch.ones_like(scale), torch.zeros_like(scale)
        self._momentum = momentum

    @torch.no_grad()
    def load(self) -> None:
        """Start from the scale as it is now."""
        self._start.copy_(self.scale)

    @torch.no_grad()
    def restart(self) -> None:
        """Back to the start."""
        self._factor.fill_(1.0)
        self._mean.zero_()
        self.scale.copy_(self._start)

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """Down the running mean of the gradient by ``rate``, scalar."""
        self._mean.lerp_(cast(Tensor, self.scale.grad), 1 - self._momentum)
        self._factor.sub_(rate * self._mean.sign()).clamp_(_LEAST, 1.0)
        self.scale.copy_(self._start * self._factor)


def static_inputs(inputs: Mapping[str, QuantizedInput]) -> list[QuantizedInput]:
    """Of inputs by layer those with static scales, each scale once."""
    return list({id(made.scale): made for made in inputs.values() if made.scale is not None}.values())


def learned_scales(static: Sequence[QuantizedInput], recipe: Recipe) -> list[InputScale]:
    """Of `static_inputs` what the steps of a recipe learn: not NVFP4's, which only put dynamic ones in range."""
    if not (recipe.iters and recipe.input_scale_lr):
        return []
    momentum = recipe.momentum if recipe.optimizer == "signsgd" else 0.0
    whole = [made for made in static if made.type.group_size is None]
    return [InputScale(cast(Tensor, made.scale), momentum) for made in whole]


@torch.no_grad()
def search_input_scales(static: Sequence[QuantizedInput], losses: Callable[[], Tensor]) -> None:
    """Move the scales of `static_inputs`, one after the other and in place, to where the block's loss is least.

    A float grid at twice the scale is the same grid but for its ends, so an octave has all there is to choose from. It
    is the one upwards, where no value in FP8 saturates that did not before. What is better by luck is so on some
    samples only: a scale moves if both halves of them agree, and for more than a trifle.

    Args:
        losses: of the block as it is, of each sample [S]; at least 2, or there is one half.
    """

    def halves() -> Tensor:
        return torch.stack([half.sum() for half in losses().chunk(2)])

    now = halves()
    for made in static:
        scale = cast(Tensor, made.scale)
        start = best = scale.clone()
        bar = _WORTH * now
        for part in range(1, _PARTS):
            scale.copy_(made.type.widened(start, 2 ** (part / _PARTS)))
            found = halves()
            if (found < bar).all():
                bar = now = found
                best = scale.clone()
        scale.copy_(best)
