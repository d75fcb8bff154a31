"""Whether FP8 is precise enough to tune a block, measured on the block itself.

A step's gradient is that of a few samples, so it has an error of that kind anyway. FP8 does where the error that it
adds is the smaller one in every layer: where the gradient of a minibatch in FP8 points closer to its own in bfloat16
than the gradient of another minibatch does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrate.workbench import Loss, WorkingBlock


@torch.enable_grad()
def fp8_suffices(
    working: WorkingBlock,
    names: Collection[str],
    inputs: Tensor,
    outputs: Tensor,
    loss: Loss,
    *,
    real: Tensor | None = None,
) -> bool:
    """Compare gradients of the weights of the layers ``names``.

    Args:
        inputs: [2 * B, T, H], two minibatches on the device.
        outputs: [2 * B, T, H], what should come out for them.
        real: [2 * B, T] bool, the tokens that count; None: all.
    """
    weights = [cast(nn.Linear, working.module.get_submodule(name)).weight.requires_grad_(True) for name in names]
    first, second = (slice(begin, begin + len(inputs) // 2) for begin in (0, len(inputs) // 2))

    def gradients(part: slice) -> tuple[Tensor, ...]:
        error = loss(working.run(inputs[part]), outputs[part], None if real is None else real[part])
        return torch.autograd.grad(error, weights)

    exact, other = gradients(first), gradients(second)
    with working.fp8_matmuls(names):
        rounded = gradients(first)
    for weight in weights:
        weight.requires_grad_(False)
    return all(
        _cosine(mine, fp8) >= _cosine(mine, another) for mine, fp8, another in zip(exact, rounded, other, strict=True)
    )


def _cosine(left: Tensor, right: Tensor) -> float:
    return F.cosine_similarity(left.float().flatten(), right.float().flatten(), dim=0).item()
