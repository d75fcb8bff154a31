"""Whether FP8 is precise enough to tune a block, measured on the block itself.

A step goes by the signs of the gradient, and the gradient is that of a few samples, so that many signs are wrong
anyway. FP8 does where it turns fewer signs than the choice of samples, in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calibrate.steps import Steps
from calibrate.workbench import WorkingBlock
from vllm_autoround.format.scheme import QuantScheme


def fp8_suffices(working: WorkingBlock, schemes: Mapping[str, QuantScheme], steps: Steps, batch: int) -> bool:
    """Compare gradients of the layers in ``schemes``, as ``steps`` has them, for the first two batches of ``batch``.

    Whole batches: what FP8 loses because something else in the tensor is large, no sum over more samples brings back.
    """
    first, second = torch.arange(2 * batch).split(batch)
    working.step.zero_()  # the answer is not to depend on how far another block came
    # Where FP8 does, which is nearly everywhere, a bfloat16 step is not worth compiling.
    exact, other = (steps.gradients(picked, compiled=False) for picked in (first, second))
    with working.fp8_matmuls(schemes):
        rounded = steps.gradients(first, compiled=True)
    return all(
        agreement(mine, fp8) >= agreement(mine, another)
        for mine, fp8, another in zip(exact, rounded, other, strict=True)
    )


def agreement(left: Tensor, right: Tensor) -> float:
    """Share of the entries with the same sign."""
    return (left.sign() == right.sign()).count_nonzero().item() / left.numel()
