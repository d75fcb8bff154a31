"""The trainable quantizer of one linear layer, for every weight type (SignRound, arXiv:2309.05516).

With W [N, K] in groups (tiles that share a scale), group bounds wmin <= 0 <= wmax, and trainable V, alpha, beta:

    low = beta * wmin, high = alpha * wmax            the clipped range gives scale s and zero point z (format.weights)
    q = round(W / s + V * spacing + z), saturating    on the type's grid, whose spacing at W / s is 1 for integers
    W^ = s * (q - z)

Gradients, straight through every rounding, from G = dL/dW^, with ``inside`` where q does not saturate:

    dV = s * G * spacing * inside                     the spacing, which changes no sign, is left out
    ds = sum over the group of G * (q - z - inside * W / s)
    asymmetric also, through z = -low / s:   dz = sum of G * s * (inside - 1), added to ds and to dlow

V, alpha and beta move by the sign of their gradients, or of the running means of these, only. Shapes: V [N, K], the
others [R, C] float32. The running mean of dV is kept in bfloat16.

V is a fixed-point number, an int16 in units of 2^-15, so between -1 and 1 (`OFFSET_UNIT`). No V is ever larger than the
sum of all learning rates. For a rate that falls from 1 / steps to 0 that is (1 + 1 / steps) / 2: enough for every
weight to reach the next value of the grid, which is all that V is for. At three quarters of that rate, which some
recipes have at 4 bits and more, a weight within an eighth of the spacing of a value stays there. Larger rates saturate.
Learning rates are whole numbers of units, 82 on average over 200 steps and 41 over 400, so that V is exact.

auto-round adds V itself, which cannot reach the next value of a floating-point grid where its values are far apart;
in units of the spacing every weight can be rounded up or down.

Everything here is single float32 operations in a stated order, also within sums over a group, so that a kernel can
give the same bits (`calibrate.fused_step`). In steps of sign descent W / s is `times_reciprocal`; what they lead to is
divided, so that a weight between two values goes where everybody rounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_autoround.format.weights import Bounds, QuantizedWeight, Tile, WeightType, store

OFFSET_UNIT = 2.0**-15
MOST_OFFSET = (1 << 15) - 1  # units
MOST_CLIP = 2.0  # after a scale search, which may have found a narrow range that tuning widens again
SUM_CHUNK = 4096  # see `ordered_sum`


@dataclass(frozen=True, slots=True)
class Rounding:
    """The trainable values of one layer, changed in place by `sign_step`."""

    offset: Tensor  # V / OFFSET_UNIT [N, K] int16; float32 under AdamW
    low_clip: Tensor  # beta [R, C]
    high_clip: Tensor  # alpha [R, C]

    @property
    def is_nearest(self) -> bool:
        """The offset is that of `nearest`."""
        return not any(self.offset.stride())

    @classmethod
    def nearest(cls, target: Target, low_clip: Tensor | float = 1.0, high_clip: Tensor | float = 1.0) -> Rounding:
        """Round to nearest over the bounds times the clips; the offset is a view of one 0, to be cloned for tuning."""
        bounds = target.bounds.low
        zero = torch.zeros((), dtype=torch.int16, device=target.weight.device)
        clips = [torch.as_tensor(clip, device=bounds.device).expand_as(bounds) for clip in (low_clip, high_clip)]
        return cls(zero.expand_as(target.weight), *clips)

    def clone(self, offsets: torch.dtype = torch.int16) -> Rounding:
        """With memory of its own, and the offset in this dtype."""
        tensors = (self.offset.to(offsets), self.low_clip, self.high_clip)
        return Rounding(*(t.clone(memory_format=torch.contiguous_format) for t in tensors))


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of the values of a `Rounding`, up to positive factors; or their running means."""

    offset: Tensor  # [N, K] float32; a running mean is bfloat16
    low_clip: Tensor  # [R, C] float32
    high_clip: Tensor  # [R, C] float32

    @classmethod
    def means(cls, rounding: Rounding) -> Gradients:
        """Running means before the first step: 0."""
        return cls(
            torch.zeros_like(rounding.offset, dtype=torch.bfloat16),
            torch.zeros_like(rounding.low_clip),
            torch.zeros_like(rounding.high_clip),
        )

    def blend(self, new: Gradients, momentum: float) -> Gradients:
        """Move running means towards ``new``, in place; returned as they are before they are rounded to bfloat16."""
        pairs = ((self.offset, new.offset), (self.low_clip, new.low_clip), (self.high_clip, new.high_clip))
        blended = Gradients(*(mean.float() * momentum + fresh * (1 - momentum) for mean, fresh in pairs))
        self.offset.copy_(blended.offset)
        self.low_clip.copy_(blended.low_clip)
        self.high_clip.copy_(blended.high_clip)
        return blended


@dataclass(frozen=True, slots=True)
class Target:
    """What one layer's rounding is learned for."""

    weight: Tensor  # W [N, K], see `WorkingBlock.wanted`; scales and dequantized weights are rounded to its dtype
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
    return _weight(target, _quantize(target, rounding))


def gradients(target: Target, rounding: Rounding, grad: Tensor) -> Gradients:
    """Gradients of V, beta and alpha from ``grad`` = dL/dW^ [N, K], up to positive factors; see the module's text."""
    scale, zero, value, inside, position = _quantize(target, rounding, times_reciprocal)
    g = target.tile.split(grad.float())
    pull = scale * g
    offset = target.tile.merge(_only(inside, pull), grad.shape)
    d_scale = ordered_sum(g * ((value - zero) - _only(inside, position)))
    low, high = target.bounds.low * rounding.low_clip, target.bounds.high * rounding.high_clip
    if target.type.symmetric:
        d_low = torch.where(high >= -low, 0.0, -d_scale)
        d_high = torch.where(high >= -low, -d_scale if target.type.signed_scale else d_scale, 0.0)
    else:
        s = scale[:, 0, :, 0]
        d_zero = ordered_sum(_only(1 - inside, -pull))
        d_high = (d_scale + d_zero * low / (s * s)) * (1 / ((1 << target.type.bits) - 1))
        d_low = -d_high - d_zero / s
    return Gradients(offset, d_low * target.bounds.low, d_high * target.bounds.high)


def sign_step(
    target: Target,
    rounding: Rounding,
    means: Gradients | None,
    grad: Tensor,
    rate: Tensor,
    out: Tensor,
    finite: Tensor,
    *,
    momentum: float = 0.0,
    most_clip: float = 1.0,
) -> None:
    """One step of sign gradient descent, in place.

    Args:
        means: running means of the gradients, updated; None without momentum.
        grad: dL/dW^ [N, K].
        rate: [2] float32: of the offset, a whole number of units, and of the clips, which stay in [0, most_clip].
        out: [N, K], gets the next W^.
        finite: scalar bool, becomes False if the gradient is not finite. The sign of NaN would pass for that of 0.
        momentum: share of the mean that a step keeps.
    """
    step = gradients(target, rounding, grad)
    finite.logical_and_(step.low_clip.isfinite().all() & step.high_clip.isfinite().all())
    if means is not None:
        step = means.blend(step, momentum)
    moved = rounding.offset.float() - rate[0] * step.offset.sign()
    rounding.offset.copy_(moved.clamp(-MOST_OFFSET, MOST_OFFSET))
    if not target.type.one_scale:  # it is shared with other layers
        for clip, slope in ((rounding.low_clip, step.low_clip), (rounding.high_clip, step.high_clip)):
            clip.copy_((clip - rate[1] * slope.sign()).clamp(0, most_clip))
    out.copy_(_weight(target, _quantize(target, rounding, times_reciprocal)))


def times_reciprocal(w: Tensor, scale: Tensor) -> Tensor:
    """W / s, up to its last bit; a kernel that divides once a group has fewer instructions."""
    return w * (1 / scale)


def ordered_sum(tiles: Tensor) -> Tensor:
    """[R, rows, C, columns] -> the sum over each tile [R, C], in an order that a kernel can follow.

    Neighbours are added until one number is left: 0 + 1, 2 + 3 ...; rows longer than SUM_CHUNK are added chunk to chunk
    before. Tiles of several rows are summed in any order.
    """
    if tiles.shape[1] > 1:
        return tiles.sum((1, 3))
    values = tiles.squeeze(1)
    if values.shape[-1] > SUM_CHUNK:
        first, *others = F.pad(values, (0, -values.shape[-1] % SUM_CHUNK)).split(SUM_CHUNK, -1)
        values = first
        for chunk in others:
            values = values + chunk
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = F.pad(values, (0, 1))
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


def group_errors(target: Target, rounding: Rounding, importance: Tensor) -> Tensor:
    """Squared error of W^ in each group [R, C], weighted by ``importance`` [K] of the input features."""
    state = _quantize(target, rounding)
    error = state.scale * (state.value - state.zero) - target.tile.split(target.weight.float())
    weights = target.tile.split(importance.float().expand_as(target.weight))
    return ordered_sum(error.square() * weights)


class Grid(NamedTuple):
    """Scale and zero point of every weight, [N, K] float32 each."""

    scale: Tensor
    zero: Tensor


def grid_of(target: Target, rounding: Rounding) -> Grid:
    """What `fake_quantize` scales and shifts every weight by."""
    state = _quantize(target, rounding)
    shape = target.weight.shape
    return Grid(*(target.tile.merge(t.expand_as(state.value), shape) for t in (state.scale, state.zero)))


def grid_values(target: Target, rounding: Rounding) -> Tensor:
    """q [N, K] float32, of the type's grid."""
    return target.tile.merge(_quantize(target, rounding).value, target.weight.shape)


def freeze(target: Target, rounding: Rounding, values: Tensor | None = None) -> QuantizedWeight:
    """The layer as it goes to disk; dequantizing it gives `fake_quantize` bit for bit.

    Args:
        values: q [N, K] of any dtype, if that is known already, or another is wanted than `grid_values`.
    """
    scale, zero = _scale_and_zero_point(target, rounding)
    if values is None:
        values = grid_values(target, rounding)
    # Of its own memory: that of the target may be given to another layer.
    global_scale = None if target.global_scale is None else target.global_scale.clone()
    return store(values, scale, zero, target.type, target.weight.dtype, global_scale)


class _State(NamedTuple):
    """[R, rows, C, columns], or 1 in place of rows and columns for what a group shares; all but one float32."""

    scale: Tensor
    zero: Tensor
    value: Tensor  # q, of the grid
    inside: Tensor  # 1, or 0 where q saturates
    position: Tensor  # W / s


def _quantize(target: Target, rounding: Rounding, divide: Callable[[Tensor, Tensor], Tensor] = torch.div) -> _State:
    kind, tile = target.type, target.tile
    scale, zero = _scale_and_zero_point(target, rounding)
    s = scale[:, None, :, None]
    z = torch.full_like(s, kind.zero) if zero is None else zero[:, None, :, None]
    position = divide(tile.split(target.weight.float()), s)
    moved = position + tile.split(rounding.offset).float() * OFFSET_UNIT * kind.spacing(position)
    return _State(s, z, kind.round(moved, z), kind.within(moved, z), position)


def _scale_and_zero_point(target: Target, rounding: Rounding) -> tuple[Tensor, Tensor | None]:
    low, high = target.bounds.low * rounding.low_clip, target.bounds.high * rounding.high_clip
    return target.type.scale_and_zero_point(low, high, target.weight.dtype, target.global_scale)


def _only(where: Tensor, x: Tensor) -> Tensor:
    """x where ``where`` is 1, else 0, also for infinity; `torch.where` takes several times longer on a CPU."""
    return torch.ops.aten.threshold_backward(x, where, 0.5)  # type: ignore[no-any-return]


def _weight(target: Target, state: _State) -> Tensor:
    """W^ [N, K] in the dtype of W."""
    weight = state.scale * (state.value - state.zero)
    return target.tile.merge(weight, target.weight.shape).to(target.weight.dtype)
