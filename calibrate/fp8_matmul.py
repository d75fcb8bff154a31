"""A linear layer whose two backward matrix products are of FP8 factors, for tuning.

Every factor is rounded to e4m3 (gradients too) under one scale a tensor; products are summed by the tensor cores in
their fast way, less precise than float32 (`torch._scaled_mm`). Inputs and gradients are scaled by their
largest magnitude, weights by one that the caller knows them to stay below. A step of sign descent asks for the sign of
a sum over many tokens, which the rounding of single factors hardly moves.

The forward product is that of the factors as they are. e4m3 would round W^ about as much as 4 bits do, and, unlike
noise in a gradient, always to the same side: tuning would learn to make up for what no one will serve.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_E4M3 = torch.float8_e4m3fn
_HIGHEST = torch.finfo(_E4M3).max
_CAPABILITY = (8, 9)  # of a GPU: Ada; Hopper and Blackwell are above


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies in FP8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def fits_fp8(size: int) -> bool:
    """Whether a factor may have so many rows or columns."""
    return size % 16 == 0


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, most: Tensor) -> Tensor:
    """x [..., K] times the transpose of weight [N, K] -> [..., N]; its gradients are products of FP8 factors.

    N and K are multiples of 16; if the number of rows of x is not, the gradients are those of the factors as they are.

    Args:
        most: scalar float32, at least the largest magnitude in ``weight``; what is above it saturates.
    """
    rows = x.flatten(0, -2)
    if not fits_fp8(len(rows)):
        return F.linear(x, weight, bias)
    out = _Fp8Backward.apply(rows, weight, bias, most)  # type: ignore[no-untyped-call]
    return out.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


class _Fp8Backward(torch.autograd.Function):
    """[M, K], [N, K] and [N] or None -> [M, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, most: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, most)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, most = ctx.saved_tensors
        grad8, grad_scale = _to_fp8(grad, grad.abs().amax())
        of_x = of_weight = None
        # The second factor of `_scaled_mm` must lie column by column.
        if ctx.needs_input_grad[0]:
            weight8, scale = _to_fp8(weight, most)
            of_x = torch._scaled_mm(
                grad8,
                weight8.t().contiguous().t(),
                scale_a=grad_scale,
                scale_b=scale,
                out_dtype=grad.dtype,
                use_fast_accum=True,
            )
        if ctx.needs_input_grad[1]:
            x8, scale = _to_fp8(x, x.abs().amax())
            of_weight = torch._scaled_mm(
                grad8.t().contiguous(),
                x8.t().contiguous().t(),
                scale_a=grad_scale,
                scale_b=scale,
                out_dtype=grad.dtype,
                use_fast_accum=True,
            )
        return of_x, of_weight, grad.sum(0) if ctx.needs_input_grad[2] else None, None


def _to_fp8(x: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The values over a scale as e4m3, row by row in memory, and the scale, float32 scalar; ``most`` becomes 448."""
    scale = (most.float() / _HIGHEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-_HIGHEST, _HIGHEST).to(_E4M3).contiguous(), scale
