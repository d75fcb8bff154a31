"""The trainable quantizer of one linear layer (SignRound, arXiv:2309.05516; auto-round, data_type/int.py).

With W [N, K] in groups of g along K, group bounds wmin <= 0 <= wmax, and trainable V, alpha, beta:

    low = beta * wmin, high = alpha * wmax        the clipped range gives scale s and zero point z (format.codec)
    code = clamp(round(W / s + V) + z, 0, 2^b - 1)          W^ = s * (code - z)

Gradients, straight through every rounding, from G = dL/dW^, with ``inside`` where the clamp does not bind:

    dV = s * G * inside
    ds = sum over the group of G * (code - z - inside * W / s)
    asymmetric also, through z = -low / s:   dz = sum of G * s * (inside - 1), added to ds and to dlow

V, alpha and beta move by the sign of their gradients only. Shapes: V [N, K], the others [N, G]; all float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_autoround.format import codec
from vllm_autoround.format.codec import MIN_SCALE, QuantizedWeight
from vllm_autoround.format.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class Rounding:
    """The trainable values of one layer, changed in place by `sign_step`."""

    offset: Tensor  # V [N, K]
    low_clip: Tensor  # beta [N, G]
    high_clip: Tensor  # alpha [N, G]

    @classmethod
    def nearest(cls, weight: Tensor, scheme: QuantScheme) -> Rounding:
        """Where tuning starts: round to nearest over the full range."""
        rows, columns = weight.shape
        clip = torch.ones(rows, scheme.groups(columns), device=weight.device)
        return cls(torch.zeros(rows, columns, device=weight.device), clip, clip.clone())


@dataclass(frozen=True, slots=True)
class Target:
    """What one layer's rounding is learned for."""

    weight: Tensor  # W [N, K], the original; scales and dequantized weights are rounded to its dtype
    low: Tensor  # wmin [N, G] float32
    high: Tensor  # wmax [N, G] float32
    scheme: QuantScheme

    @classmethod
    def of(cls, weight: Tensor, scheme: QuantScheme) -> Target:
        """The target of a weight [N, K]."""
        low, high = codec.group_bounds(weight, scheme)
        return cls(weight, low, high, scheme)


def fake_quantize(target: Target, rounding: Rounding) -> Tensor:
    """W^ [N, K] in the dtype of W: the values that the checkpoint will stand for, rounded as it is served."""
    scale, zero, code, _ = _quantize(target, rounding)
    return _dequantize(scale, zero, code, target)


def gradients(target: Target, rounding: Rounding, grad: Tensor) -> Rounding:
    """Gradients of V, beta and alpha from ``grad`` = dL/dW^ [N, K]; formulas in the module's docstring."""
    scheme = target.scheme
    scale, zero, code, inside = _quantize(target, rounding)
    s, z = scale[..., None], zero[..., None]
    w, g = _grouped(target.weight, scheme), _grouped(grad, scheme)
    offset = torch.where(inside, s * g, 0.0).flatten(-2)
    d_scale = (g * (code - z - torch.where(inside, w / s, 0.0))).sum(-1)
    low, high = target.low * rounding.low_clip, target.high * rounding.high_clip
    if scheme.symmetric:
        d_extreme = d_scale / -scheme.zero_code
        d_low, d_high = torch.where(high >= -low, 0.0, d_extreme), torch.where(high >= -low, d_extreme, 0.0)
        floor_binds = torch.where(high >= -low, high, -low) / scheme.zero_code < MIN_SCALE
    else:
        d_zero = torch.where(inside, 0.0, -s * g).sum(-1)
        d_scale = d_scale + d_zero * low / scale.square()
        d_high = d_scale / scheme.max_code
        d_low = -d_high - d_zero / scale
        floor_binds = (high - low) / scheme.max_code < MIN_SCALE
    return Rounding(
        offset,
        torch.where(floor_binds, 0.0, d_low * target.low),
        torch.where(floor_binds, 0.0, d_high * target.high),
    )


def sign_step(target: Target, rounding: Rounding, grad: Tensor, lr: Tensor) -> None:
    """One step of sign gradient descent, in place; the clips stay in [0, 1].

    Args:
        grad: dL/dW^ [N, K].
        lr: scalar tensor.
    """
    grads = gradients(target, rounding, grad)
    rounding.offset.sub_(lr * grads.offset.sign())
    rounding.low_clip.sub_(lr * grads.low_clip.sign()).clamp_(0, 1)
    rounding.high_clip.sub_(lr * grads.high_clip.sign()).clamp_(0, 1)


def freeze(target: Target, rounding: Rounding) -> QuantizedWeight:
    """The layer as it goes to disk; dequantizing it gives `fake_quantize` bit for bit."""
    scale, zero, code, _ = _quantize(target, rounding)
    return QuantizedWeight(
        scheme=target.scheme,
        codes=code.flatten(-2).to(torch.uint8),
        scale=scale.to(target.weight.dtype),
        zero_point=zero.to(torch.uint8),
    )


def _quantize(target: Target, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale [N, G], zero point [N, G], code [N, G, g] float32 and ``inside`` [N, G, g] bool."""
    scheme = target.scheme
    scale, zero = codec.scale_and_zero_point(
        target.low * rounding.low_clip, target.high * rounding.high_clip, scheme, target.weight.dtype
    )
    shifted = _grouped(target.weight, scheme) / scale[..., None] + _grouped(rounding.offset, scheme)
    code = torch.round(shifted) + zero[..., None]
    inside = (code >= 0) & (code <= scheme.max_code)
    return scale, zero, code.clamp(0, scheme.max_code), inside


def _dequantize(scale: Tensor, zero: Tensor, code: Tensor, target: Target) -> Tensor:
    weight = (scale[..., None] * (code - zero[..., None])).flatten(-2)
    return weight.to(target.weight.dtype)


def _grouped(tensor: Tensor, scheme: QuantScheme) -> Tensor:
    """[N, K] -> [N, G, g] float32."""
    return tensor.float().unflatten(-1, (-1, scheme.group_length(tensor.shape[-1])))
