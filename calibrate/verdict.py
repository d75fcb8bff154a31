"""How good a block is: what it is tuned on, and what the held-out samples say."""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calibrate.chain import NonFiniteError, relative_distance
from calibrate.workbench import Loss, WorkingBlock


def mean_squared_error(output: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """In float32, over all elements [B, T, H] of the tokens ``real`` [B, T]; None: of all."""
    if real is None:
        return F.mse_loss(output.float(), target.float())
    squares = (output.float() - target.float()).square().mean(-1)
    return torch.where(real, squares, 0.0).sum() / real.sum()


class Verdict(NamedTuple):
    """How good a block is, on the held-out samples."""

    error: float  # relative squared error of its output
    loss: float  # of the objective that it is tuned on


def judge_block(
    working: WorkingBlock, inputs: Tensor, outputs: Tensor, real: Tensor | None, loss: Loss
) -> tuple[Verdict, Tensor]:
    """The block as it is, given its inputs and what should come out, [S, T, H], and what does; NaN if that is not
    finite.

    Args:
        real: [S, T] bool, the tokens that count; None: all.
    """
    made = inputs.clone()
    try:
        losses = sample_losses(working, made, outputs, real, loss)
    except NonFiniteError:
        return Verdict(nan, nan), made
    return Verdict(relative_distance(made, outputs, real), losses.sum().item()), made


@torch.no_grad()
def sample_losses(working: WorkingBlock, hidden: Tensor, outputs: Tensor, real: Tensor | None, loss: Loss) -> Tensor:
    """Each sample's part of the mean loss over all tokens that count, [S] float64.

    Args:
        hidden: [S, T, H], the block's inputs; becomes its outputs.
        outputs: [S, T, H], what should come out.
        real: [S, T] bool, the tokens that count; None: all.
    """
    working.advance(hidden)
    masks = [None] * len(hidden) if real is None else real.split(1)
    samples = zip(hidden.split(1), outputs.split(1), masks, strict=True)
    losses = [loss(mine.to(working.device), theirs.to(working.device), mask) for mine, theirs, mask in samples]
    tokens = torch.ones(len(hidden)) if real is None else real.sum(1)
    return torch.stack(losses).double() * (tokens / tokens.sum()).to(working.device)
