"""One linear layer under tuning: its target, its rounding, and the quantizer that moves one towards the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from calibrate.adamw import AdamWStep
from calibrate.chain import NonFiniteError
from calibrate.compilation import compiled
from calibrate.config import Recipe
from calibrate.rounding import Gradients, Rounding, Target, fake_quantize, freeze, grid_values, sign_step
from vllm_autoround.format.weights import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What tuning did to one layer."""

    weight_error: float  # squared error of the dequantized weight over the square of what it is to come near
    moved: float  # share of the values that differ from where tuning started
    scale_min: float
    scale_max: float


class LayerState:
    """A layer's trainable values, in memory that stays where it is while layer after layer is loaded into it."""

    def __init__(self, module: nn.Linear, target: Target, start: Rounding, recipe: Recipe, most_clip: float) -> None:
        """Take over the tensors of ``target``; see `load` for the rest."""
        self.module = module
        self.target = target
        self.rounding = start.clone(torch.float32 if recipe.optimizer == "adamw" else torch.int16)
        self.means = Gradients.means(self.rounding) if recipe.momentum and recipe.optimizer == "signsgd" else None
        self.finite = torch.ones((), dtype=torch.bool, device=target.weight.device)  # every gradient so far was
        self._start = start
        self._quantizer = _quantizer(target, self.rounding, recipe, most_clip)

    @property
    def recordable(self) -> bool:
        """Whether `step` may be part of a CUDA graph."""
        return self._quantizer.recordable

    @torch.no_grad()
    def load(self, target: Target, start: Rounding) -> None:
        """Begin another layer of the same type and shape, whose weight is in place already."""
        for mine, new in zip(self.target.bounds, target.bounds, strict=True):
            mine.copy_(new)
        if self.target.global_scale is not None:
            self.target.global_scale.copy_(cast(Tensor, target.global_scale))
        self._start = start
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Back to the start, in the module too."""
        self.rounding.offset.copy_(self._start.offset)
        self.rounding.low_clip.copy_(self._start.low_clip)
        self.rounding.high_clip.copy_(self._start.high_clip)
        if self.means is not None:
            for mean in (self.means.offset, self.means.low_clip, self.means.high_clip):
                mean.zero_()
        self.finite.fill_(True)
        self._quantizer.restart()
        self._quantizer.install(self.target, self.rounding, self.module.weight)

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """One step of sign descent from the gradient of the module's weight; see `sign_step`."""
        weight = self.module.weight
        grad = cast(Tensor, weight.grad)
        self._quantizer.step(self.target, self.rounding, self.means, grad, rate, weight.data, self.finite)

    @torch.no_grad()
    def finish(self, name: str, values: Tensor | None = None) -> tuple[QuantizedWeight, LayerReport]:
        """The layer as it goes to disk, and, rounded as it is served, into the module; and what tuning did to it.

        Args:
            values: see `freeze`.

        Raises:
            NonFiniteError: a gradient or a scale that is not finite.
        """
        target, kind = self.target, self.target.type
        if values is None:
            values = self._quantizer.values(target, self.rounding)
        weight = freeze(target, self.rounding, values)
        dequantized = weight.dequantize()
        self.module.weight.copy_(dequantized.to(target.weight.dtype))
        moved = (values != self._quantizer.values(target, self._start)).count_nonzero() / values.numel()
        error, norm = (vector_norm(x, dtype=torch.float32) for x in (dequantized - target.weight, target.weight))
        scale = kind.acting_scale(weight.scale, weight.global_scale)
        figures = torch.stack([(error / norm).square(), moved, scale.min(), scale.max(), self.finite.float()]).tolist()
        if not figures.pop():
            raise NonFiniteError(f"{name}: a gradient is not finite")
        if not all(map(isfinite, figures[1:])):
            raise NonFiniteError(f"{name}: a scale is not finite in {weight.scale.dtype}")
        return weight, LayerReport(**dict(zip(LayerReport.__annotations__, figures, strict=True)))


class _Quantizer(NamedTuple):
    """How a layer's values are updated, and how W^ gets into a module's weight."""

    step: Callable[[Target, Rounding, Gradients | None, Tensor, Tensor, Tensor, Tensor], None]
    install: Callable[[Target, Rounding, Tensor], None]
    recordable: bool
    values: Callable[[Target, Rounding], Tensor] = grid_values  # of the type's grid
    restart: Callable[[], None] = lambda: None


def _quantizer(target: Target, rounding: Rounding, recipe: Recipe, most_clip: float) -> _Quantizer:
    """On a GPU one kernel each, or else compiled; on the CPU, and AdamW, as they are written."""
    if recipe.optimizer == "adamw":
        adamw = AdamWStep(rounding)
        return _Quantizer(partial(adamw, most_clip=most_clip), _install, False, restart=adamw.restart)
    step, install, recordable, values = sign_step, _install, False, grid_values
    if target.weight.device.type == "cuda":
        # Triton, which a CPU may be without.
        from calibrate import fused_step, kernel_parts  # noqa: PLC0415

        # Replayed from a CUDA graph, the compiled step of 128 x 128 tiles gave other results than called from Python.
        # Why was not found, so nothing compiled is recorded.
        recordable = kernel_parts.supports(target)
        if recordable:
            step, install = fused_step.fused_sign_step, fused_step.fused_fake_quantize
            values = fused_step.fused_grid_values
        else:
            step, install = compiled(sign_step), compiled(_install)
    return _Quantizer(partial(step, momentum=recipe.momentum, most_clip=most_clip), install, recordable, values)


def _install(target: Target, rounding: Rounding, out: Tensor) -> None:
    out.copy_(fake_quantize(target, rounding))
