"""Whether FP8 is precise enough to tune a block, measured on the block itself.

A step goes by the signs of the gradient, and the gradient is that of a few samples, so that many signs are wrong
anyway. FP8 does where it turns fewer signs than the choice of a sample, in every layer. In a batch of several both
matter less, and for the same reason: a gradient is a sum over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calibrate.steps import Steps
from calibrate.workbench import WorkingBlock
from vllm_autoround.format.scheme import QuantScheme


def fp8_suffices(working: WorkingBlock, schemes: Mapping[str, QuantScheme], steps: Steps, batch: int) -> bool:
    """Compare gradients of the layers in ``schemes``, as ``steps`` has them, for the first two samples.

    Args:
        batch: samples a step.
    """
    # Where FP8 does, which is nearly everywhere, a bfloat16 step is not worth compiling.
    exact, other = (steps.gradients(torch.tensor([sample]), compiled=False) for sample in range(2))
    with working.fp8_matmuls(schemes):
        # The first one in every place: steps are compiled for whole batches.
        rounded = steps.gradients(torch.zeros(batch, dtype=torch.long), compiled=True)
    return all(
        agreement(mine, fp8) >= agreement(mine, another)
        for mine, fp8, another in zip(exact, rounded, other, strict=True)
    )


def agreement(left: Tensor, right: Tensor) -> float:
    """Share of the entries with the same sign."""
    return (left.sign() == right.sign()).count_nonzero().item() / left.numel()
