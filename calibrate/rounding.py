"""The trainable quantizer of one linear layer, for every weight type (SignRound, arXiv:2309.05516).

With W [N, K] in groups (tiles that share a scale), group bounds wmin <= 0 <= wmax, and trainable V, alpha, beta:

    low = beta * wmin, high = alpha * wmax            the clipped range gives scale s and zero point z (format.weights)
    q = round(W / s + V * spacing + z), saturating    on the type's grid, whose spacing at W / s is 1 for integers
    W^ = s * (q - z)

Gradients, straight through every rounding, from G = dL/dW^, with ``inside`` where q does not saturate:

    dV = s * G * spacing * inside                     the spacing, which changes no sign, is left out
    ds = sum over the group of G * (q - z - inside * W / s)
    asymmetric also, through z = -low / s:   dz = sum of G * s * (inside - 1), added to ds and to dlow

V, alpha and beta move by the sign of their gradients only. Shapes: V [N, K], the others [R, C]; all float32.

auto-round adds V itself, which cannot reach the next value of a floating-point grid where its values are far apart;
in units of the spacing every weight can be rounded up or down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_autoround.format.weights import Bounds, QuantizedWeight, Tile, WeightType, store


@dataclass(frozen=True, slots=True)
class Rounding:
    """The trainable values of one layer, changed in place by `sign_step`; also their gradients, or running means."""

    offset: Tensor  # V [N, K]
    low_clip: Tensor  # beta [R, C]
    high_clip: Tensor  # alpha [R, C]

    @classmethod
    def nearest(cls, target: Target, low_clip: Tensor | float = 1.0, high_clip: Tensor | float = 1.0) -> Rounding:
        """Round to nearest over the bounds times the clips; the offset is a view of one 0, to be cloned for tuning."""
        bounds, zero = target.bounds.low, torch.zeros((), device=target.weight.device)
        clips = [torch.as_tensor(clip, device=bounds.device).expand_as(bounds) for clip in (low_clip, high_clip)]
        return cls(zero.expand_as(target.weight), *clips)

    def clone(self) -> Rounding:
        """With memory of its own."""
        return Rounding(*(t.clone(memory_format=torch.contiguous_format) for t in self._tensors()))

    def zeros(self) -> Rounding:
        """Of the same shapes, all 0."""
        return Rounding(*(torch.zeros(t.shape, device=t.device) for t in self._tensors()))

    def blend(self, new: Rounding, share: float) -> None:
        """Move every value towards ``new`` by ``share`` of the way, in place."""
        for mine, other in zip(self._tensors(), new._tensors(), strict=True):
            mine.lerp_(other, share)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offset, self.low_clip, self.high_clip


@dataclass(frozen=True, slots=True)
class Target:
    """What one layer's rounding is learned for."""

    weight: Tensor  # W [N, K], the original; scales and dequantized weights are rounded to its dtype
    bounds: Bounds  # wmin and wmax, [R, C] float32 each
    type: WeightType
    global_scale: Tensor | None = None  # [1] float32

    @property
    def tile(self) -> Tile:
        """The shape of a group."""
        return self.type.tile(*self.weight.shape)


def targets(weights: list[Tensor], type_: WeightType) -> list[Target]:
    """Targets of layers that vLLM fuses: whatever is one number a layer is the same for all of them."""
    bounds = [type_.bounds(weight) for weight in weights]
    amax = torch.stack([torch.maximum(-low, high).amax() for low, high in bounds]).amax()
    if type_.one_scale:
        shared = Bounds(-amax.reshape(1, 1), amax.reshape(1, 1))
        bounds = [shared] * len(weights)
    return [Target(w, b, type_, type_.global_scale(amax)) for w, b in zip(weights, bounds, strict=True)]


def fake_quantize(target: Target, rounding: Rounding) -> Tensor:
    """W^ [N, K] in the dtype of W: the values that the checkpoint will stand for, rounded as it is served."""
    state = _quantize(target, rounding)
    weight = state.scale * (state.value - state.zero)
    return target.tile.merge(weight, target.weight.shape).to(target.weight.dtype)


def gradients(target: Target, rounding: Rounding, grad: Tensor) -> Rounding:
    """Gradients of V, beta and alpha from ``grad`` = dL/dW^ [N, K], up to positive factors; see the module's text."""
    scale, zero, value, inside, position = _quantize(target, rounding)
    g = target.tile.split(grad.float())
    offset = target.tile.merge(torch.where(inside, scale * g, 0.0), grad.shape)
    d_scale = (g * (value - zero - torch.where(inside, position, 0.0))).sum((1, 3))
    low, high = target.bounds.low * rounding.low_clip, target.bounds.high * rounding.high_clip
    if target.type.symmetric:
        d_low = torch.where(high >= -low, 0.0, -d_scale)
        d_high = torch.where(high >= -low, -d_scale if target.type.signed_scale else d_scale, 0.0)
    else:
        s = scale[:, 0, :, 0]
        d_zero = torch.where(inside, 0.0, -scale * g).sum((1, 3))
        d_high = (d_scale + d_zero * low / s.square()) / ((1 << target.type.bits) - 1)
        d_low = -d_high - d_zero / s
    return Rounding(offset, d_low * target.bounds.low, d_high * target.bounds.high)


def sign_step(
    target: Target,
    rounding: Rounding,
    means: Rounding | None,
    grad: Tensor,
    lr: Tensor,
    *,
    scale_lr: float = 1.0,
    momentum: float = 0.0,
    most_clip: float = 1.0,
) -> None:
    """One step of sign gradient descent, in place.

    Args:
        means: running means of the gradients, updated; None without momentum.
        grad: dL/dW^ [N, K].
        lr: scalar tensor; clips move by ``scale_lr * lr`` and stay in [0, most_clip].
        momentum: share of the mean that a step keeps.
    """
    step = gradients(target, rounding, grad)
    if means is not None:
        means.blend(step, 1 - momentum)
        step = means
    rounding.offset.sub_(lr * step.offset.sign())
    if not target.type.one_scale:  # it is shared with other layers
        rounding.low_clip.sub_(scale_lr * lr * step.low_clip.sign()).clamp_(0, most_clip)
        rounding.high_clip.sub_(scale_lr * lr * step.high_clip.sign()).clamp_(0, most_clip)


def group_errors(target: Target, rounding: Rounding, importance: Tensor) -> Tensor:
    """Squared error of W^ in each group [R, C], weighted by ``importance`` [K] of the input features."""
    state = _quantize(target, rounding)
    error = state.scale * (state.value - state.zero) - target.tile.split(target.weight.float())
    weights = target.tile.split(importance.float().expand_as(target.weight))
    return (error.square() * weights).sum((1, 3))


def freeze(target: Target, rounding: Rounding) -> QuantizedWeight:
    """The layer as it goes to disk; dequantizing it gives `fake_quantize` bit for bit."""
    state = _quantize(target, rounding)
    zero = None if target.type.symmetric else state.zero[:, 0, :, 0]
    values = target.tile.merge(state.value, target.weight.shape)
    return store(values, state.scale[:, 0, :, 0], zero, target.type, target.weight.dtype, target.global_scale)


class _State(NamedTuple):
    """[R, rows, C, columns], or 1 in place of rows and columns for what a group shares; all but one float32."""

    scale: Tensor
    zero: Tensor
    value: Tensor  # q, of the grid
    inside: Tensor  # bool
    position: Tensor  # W / s


def _quantize(target: Target, rounding: Rounding) -> _State:
    kind, tile = target.type, target.tile
    low, high = target.bounds.low * rounding.low_clip, target.bounds.high * rounding.high_clip
    scale, zero = kind.scale_and_zero_point(low, high, target.weight.dtype, target.global_scale)
    s = scale[:, None, :, None]
    z = torch.full_like(s, kind.zero) if zero is None else zero[:, None, :, None]
    position = tile.split(target.weight.float()) / s
    moved = position + tile.split(rounding.offset) * kind.spacing(position)
    return _State(s, z, kind.round(moved, z), kind.within(moved, z), position)
