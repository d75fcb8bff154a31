"""Linear layers that multiply FP8 factors (e4m3) while they are tuned.

Inputs and gradients are scaled by their largest magnitude, weights by one that the caller knows them to stay below. In
the backward pass every factor is rounded to nearest, under one scale a tensor, and products are summed by the tensor
cores in their fast way, less precise than float32 (`torch._scaled_mm`). A step of sign descent asks for the sign of a
sum over many tokens, which the rounding of single factors hardly moves.

In the forward pass, summed in the precise way, weights are another matter. e4m3 rounds W^ about as much as 4 bits do,
and to nearest it would do so to the same side in every step: tuning would learn to make up for what no one will serve.
So there are three ways.

- Of weights that it need not round (`exact_fp8_linear`): MXFP4, if the inputs are too. Two significant bits times a
  power of two fit, if each row has a scale that is a power of two. Only what is below 2^-16 of the most that its row
  holds (of a weight: may hold) can be rounded, by 2^-18 of that.
- With dither (`dithered_fp8_linear`): a weight is rounded up in a share of the steps, the larger the nearer it is to
  the value above, so that what rounding does averages out over the steps, and nothing is left to learn. Inputs are
  rounded to nearest: they are other ones in every step.
- Not in FP8 (`fp8_linear`): weights of more than four bits, for which the noise of single steps is too much
  (`takes_dither`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_autoround.format import activations
from vllm_autoround.format.activations import ActivationType
from vllm_autoround.format.grids import E4M3, power_of_two
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Mx

_E4M3 = torch.float8_e4m3fn
_HIGHEST = torch.finfo(_E4M3).max
_TOP_POWER_INVERSE = 2.0**-8  # of the power of two at or below `_HIGHEST`
_DITHERED_BITS = 4  # of weights; with 6 a block of a tiny model had 1.3 times the error, with 8 more than at its start
_LEAST_POWER = 2.0**E4M3.min_exponent  # below it values are as far apart as they are from it to its double
_DROPPED_BITS = 23 - E4M3.mantissa_bits  # of the mantissa of float32
# Parts of 2^32: multiples of the golden ratio's are spread evenly however many they are; the plastic number's and its
# square's do so in two dimensions.
STEP_UNIT = 2654435769
ROW_UNIT, COLUMN_UNIT = 3242174889, 2447445414
_LEAST = torch.finfo(torch.float32).tiny
_CAPABILITY = (8, 9)  # of a GPU: Ada; Hopper and Blackwell are above


@dataclass(frozen=True, slots=True)
class Fp8Products:
    """How a layer [N, K] multiplies in FP8."""

    exact: bool  # see `is_exact`
    row_most: Tensor  # [N, 1] float32; while it is tuned, the magnitudes of the weight stay below
    scale: Tensor  # [1] float32, `tensor_scale` of the most of all rows
    step: Tensor | None = None  # [1] int64, which dithers a forward that is not exact; None: such a one is not in FP8


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies in FP8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def fits_fp8(size: int) -> bool:
    """Whether a factor may have so many rows or columns."""
    return size > 0 and size % 16 == 0


def is_exact(scheme: QuantScheme) -> bool:
    """Whether e4m3 can stand for the weights and inputs of such a layer, so that its forward may be in FP8 too."""
    return scheme.weights == Mx(bits=4) and scheme.activations == activations.MXFP4


def takes_dither(scheme: QuantScheme) -> bool:
    """Whether the weights are so coarse that the dither of e4m3 is little beside that."""
    return scheme.weights.bits <= _DITHERED_BITS


def tensor_scale(most: Tensor) -> Tensor:
    """[1] float32, with which ``most``, a scalar, becomes the highest value of e4m3."""
    return (most.float() / _HIGHEST).clamp(min=_LEAST).reshape(1)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """x [..., K] times the transpose of weight [N, K] -> [..., N]; its gradients are products of FP8 factors.

    N, K and the number of rows of x fit (`fits_fp8`).

    Args:
        scale: [1] float32, under which e4m3 is to hold ``weight``; what is above it saturates.
    """
    out = _Fp8Backward.apply(x.flatten(0, -2), weight, bias, scale)  # type: ignore[no-untyped-call]
    return out.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def dithered_fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, step: Tensor) -> Tensor:
    """`fp8_linear`, with the forward product in FP8 as well, of a dithered weight.

    Args:
        step: [1] int64, the number of the step; see `dither`.
    """
    out = _DitheredFp8.apply(x.flatten(0, -2), weight, bias, scale, step)  # type: ignore[no-untyped-call]
    return out.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def exact_fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, row_most: Tensor, kind: ActivationType) -> Tensor:
    """x [..., K], quantized, times the transpose of an MXFP4 weight [N, K] -> [..., N], and the gradients, all in FP8.

    N, K and the number of rows of x fit (`fits_fp8`). Gradients pass straight through the quantization.

    Args:
        row_most: [N, 1] float32; no magnitude in a row of ``weight`` reaches the next power of two above.
        kind: how x is quantized, to MXFP4.
    """
    turn = torch.is_grad_enabled() and x.requires_grad
    out = _ExactFp8.apply(x.flatten(0, -2), weight, bias, row_most, kind, turn)  # type: ignore[no-untyped-call]
    return out.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


@torch.library.custom_op("vllm_autoround::rescaled_transpose", mutates_args=())
def rescaled_transpose(rows8: Tensor, scale: Tensor) -> Tensor:
    """[M, K] e4m3 over ``scale`` [M, 1] float32, rounded to nearest -> [K, M] e4m3, contiguous.

    An operator of its own, or torch.compile would make x once more in the backward pass to turn it there.
    """
    return (rows8.float() * (1 / scale)).to(rows8.dtype).t().contiguous()


@rescaled_transpose.register_fake
def _(rows8: Tensor, scale: Tensor) -> Tensor:
    return rows8.new_empty(rows8.shape[::-1])


@rescaled_transpose.register_kernel("cuda")
def _(rows8: Tensor, scale: Tensor) -> Tensor:
    # Triton, which a CPU may be without.
    from calibrate.fused_transpose import fused_rescaled_transpose  # noqa: PLC0415

    return fused_rescaled_transpose(rows8, scale)


@torch.library.custom_op("vllm_autoround::scaled_both_ways", mutates_args=())
def scaled_both_ways(values: Tensor, scale: Tensor, turned_scale: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """[M, K] over ``scale`` -> [M, K] e4m3, and over ``turned_scale`` -> [K, M] e4m3; made of one look at the values.

    Both contiguous, and rounded to nearest; what is above the highest value saturates.

    Args:
        values: finite. What is not shows elsewhere: in the scale of inputs and gradients, their largest magnitude, and
            of a weight in those of its groups, when it is frozen.
        scale: [M, 1] or [1] float32, as ``turned_scale``.
        step: [1] int64, the number of the step; with it the first of the two is rounded by `dither`.
    """
    scaled, turned = (
        (values.float() * (1 / over)).clamp(-_HIGHEST, _HIGHEST).contiguous() for over in (scale, turned_scale)
    )
    return (scaled if step is None else dither(scaled, step)).to(_E4M3), turned.to(_E4M3).t().contiguous()


@scaled_both_ways.register_fake
def _(values: Tensor, scale: Tensor, turned_scale: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape, dtype=_E4M3), values.new_empty(values.shape[::-1], dtype=_E4M3)


@scaled_both_ways.register_kernel("cuda")
def _(values: Tensor, scale: Tensor, turned_scale: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    # Triton, which a CPU may be without.
    from calibrate.fused_transpose import fused_scaled_both_ways  # noqa: PLC0415

    return fused_scaled_both_ways(values, scale, turned_scale, step)


def dither(x: Tensor, step: Tensor) -> Tensor:
    """[M, K] float32, finite and inside, rounded to values of e4m3: up in a share of the steps, by how near up is.

    Entries have thresholds of their own, a lattice over row, column and step of three irrational shares (a Kronecker
    sequence): spread evenly over the steps, so that the mean of n steps is nearer x than with random ones, over every
    row and over every column, for a multiplication and an addition each. What e4m3 has stays as it is.

    Args:
        step: [1] int64, the number of the step.
    """
    row, column = (torch.arange(size, device=x.device) for size in x.shape)
    threshold = (row[:, None] * ROW_UNIT + column * COLUMN_UNIT + step * STEP_UNIT) & 0xFFFFFFFF
    moved = torch.where(x.abs() < _LEAST_POWER, x.sign() * _LEAST_POWER, 0.0)  # to where the spacing is the bits'
    # Sign and magnitude: up is outwards.
    bits = (x + moved).view(torch.int32) + (threshold >> (32 - _DROPPED_BITS)).int()
    return (bits & (-1 << _DROPPED_BITS)).view(torch.float32) - moved


class _Fp8Backward(torch.autograd.Function):
    """[M, K], [N, K] and [N] or None -> [M, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        needed = ctx.needs_input_grad
        x_scale = tensor_scale(x.abs().amax())
        turned_x = (_to_fp8(x, x_scale).t().contiguous(), x_scale) if needed[1] else None
        turned_weight = (_to_fp8(weight, scale).t().contiguous(), scale) if needed[0] else None
        return *_gradients(grad, turned_x, turned_weight, bias=needed[2]), None


class _DitheredFp8(torch.autograd.Function):
    """The same, with a forward product of FP8 factors, the weight dithered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, step: Tensor) -> Tensor:
        x_scale = tensor_scale(x.abs().amax())
        x8, turned_x = scaled_both_ways(x.contiguous(), x_scale, x_scale, None)
        weight8, turned_weight = scaled_both_ways(weight.contiguous(), scale, scale, step)
        ctx.save_for_backward(turned_x, x_scale, turned_weight, scale)
        out = torch._scaled_mm(x8, weight8.t(), scale_a=x_scale, scale_b=scale, out_dtype=x.dtype, use_fast_accum=False)
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_saved_gradients(ctx, grad), None, None


class _ExactFp8(torch.autograd.Function):
    """The same of factors that e4m3 holds exactly; the first is quantized here. ``turn``: it needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, row_most: Tensor, kind: ActivationType, turn: bool
    ) -> Tensor:
        # No quantized value has a larger power of two than the largest value. Found by way of the largest of each
        # group, as in quantizing, it costs nothing more when compiled.
        row_amax = kind.groups(x).abs().amax(-1, keepdim=True).amax(1)
        x_scale, scale = _row_scale(row_amax), _row_scale(row_most)
        x8 = (kind.fake_quantize(x, None).float() / x_scale).to(_E4M3).contiguous()
        x_largest, largest = x_scale.amax().reshape(1), scale.amax().reshape(1)
        if turn:
            weight8, turned_weight = scaled_both_ways(weight, scale, largest, None)
        else:
            weight8, turned_weight = (weight.float() / scale).to(_E4M3).contiguous(), None
        ctx.save_for_backward(rescaled_transpose(x8, x_largest / x_scale), x_largest, turned_weight, largest)
        out = torch._scaled_mm(
            x8, weight8.t(), scale_a=x_scale, scale_b=scale.t(), out_dtype=x.dtype, use_fast_accum=False
        )
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_saved_gradients(ctx, grad), None, None, None


def _saved_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """`_gradients` of the turned factors and their scales that a forward saved."""
    turned_x, x_scale, turned_weight, scale = ctx.saved_tensors
    needed = ctx.needs_input_grad
    x = (turned_x, x_scale) if needed[1] else None
    weight = (turned_weight, scale) if needed[0] else None
    return _gradients(grad, x, weight, bias=needed[2])


def _gradients(
    grad: Tensor, x: tuple[Tensor, Tensor] | None, weight: tuple[Tensor, Tensor] | None, *, bias: bool
) -> tuple[Tensor | None, ...]:
    """Of x [M, K], weight [N, K] and bias [N] from ``grad`` [M, N]; None where it is not needed.

    Args:
        x: turned, [K, M] e4m3, and its scale; None: the weight needs no gradient.
        weight: turned, [K, N] e4m3, and its scale; None: x needs no gradient.
    """
    grad_scale = tensor_scale(grad.abs().amax())
    grad8 = _to_fp8(grad, grad_scale)
    of_x = of_weight = None
    # The second factor of `_scaled_mm` must lie column by column.
    if weight is not None:
        turned, scale = weight
        of_x = torch._scaled_mm(
            grad8, turned.t(), scale_a=grad_scale, scale_b=scale, out_dtype=grad.dtype, use_fast_accum=True
        )
    if x is not None:
        turned, scale = x
        of_weight = torch._scaled_mm(
            grad8.t().contiguous(),
            turned.t(),
            scale_a=grad_scale,
            scale_b=scale,
            out_dtype=grad.dtype,
            use_fast_accum=True,
        )
    return of_x, of_weight, grad.sum(0) if bias else None


def _to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """The values over the scale as e4m3, row by row in memory."""
    return (x.float() / scale).clamp(-_HIGHEST, _HIGHEST).to(_E4M3).contiguous()


def _row_scale(row_most: Tensor) -> Tensor:
    """Powers of two [M, 1] float32 under which e4m3 holds rows [M, K] of two significant bits.

    Args:
        row_most: [M, 1]; no magnitude in a row reaches the next power of two above.
    """
    return (power_of_two(row_most.float()) * _TOP_POWER_INVERSE).clamp(min=_LEAST)
