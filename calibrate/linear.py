"""The linear layers of a block that is worked on: they can quantize their input, and multiply in FP8.

Both are plain attributes that a forward looks at, and not hooks, so that torch.compile sees them change. Compiled,
layers with the same input and the same scale, such as q, k and v, quantize it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrate.activations import QuantizedInput
from calibrate.fp8_matmul import Fp8Products, dithered_fp8_linear, exact_fp8_linear, fits_fp8, fp8_linear


class WorkingLinear(nn.Linear):
    """What `make_working` makes of a layer [N, K]."""

    quantized_input: QuantizedInput | None  # gradients pass straight through, and to a static scale that wants one
    fp8: Fp8Products | None

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        fp8 = self.fp8 if fits_fp8(input.shape[:-1].numel()) else None
        if fp8 is not None and fp8.exact and self.quantized_input is not None:
            return exact_fp8_linear(input, self.weight, self.bias, fp8.row_most, self.quantized_input.type)
        if self.quantized_input is not None:
            input = _fake_quantize(input, self.quantized_input)
        if fp8 is not None and fp8.step is not None:
            return dithered_fp8_linear(input, self.weight, self.bias, fp8.scale, fp8.step)
        if fp8 is not None:
            return fp8_linear(input, self.weight, self.bias, fp8.scale)
        return F.linear(input, self.weight, self.bias)


def make_working(module: nn.Module) -> nn.Module:
    """Turn every plain linear layer of ``module`` into a `WorkingLinear`, in place."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = WorkingLinear
            layer = cast(WorkingLinear, part)
            # Of the instance from the beginning: compiled code that found them elsewhere would be compiled again.
            layer.quantized_input = layer.fp8 = None
    return module


@contextmanager
def quantized_inputs(module: nn.Module, inputs: Mapping[str, QuantizedInput]) -> Iterator[None]:
    """Quantize the inputs of these layers of ``module`` inside the context.

    Raises:
        TypeError: a layer that is no `WorkingLinear`.
    """
    layers = {name: _layer(module, name) for name in inputs}
    for name, layer in layers.items():
        layer.quantized_input = inputs[name]
    try:
        yield
    finally:
        for layer in layers.values():
            layer.quantized_input = None


def quantized_now(module: nn.Module) -> dict[str, QuantizedInput]:
    """How the layers of ``module`` quantize their inputs at the moment, by name; its tensors are theirs."""
    layers = ((name, part) for name, part in module.named_modules() if isinstance(part, WorkingLinear))
    return {name: layer.quantized_input for name, layer in layers if layer.quantized_input is not None}


@contextmanager
def fp8_matmuls(module: nn.Module, products: Mapping[str, Fp8Products]) -> Iterator[None]:
    """Multiply in FP8 inside the context, in these layers of ``module``, where their shapes and classes allow it."""
    found = {name: module.get_submodule(name) for name in products}
    layers = {name: layer for name, layer in found.items() if isinstance(layer, WorkingLinear)}
    before = {name: layer.fp8 for name, layer in layers.items()}
    for name, layer in layers.items():
        if all(map(fits_fp8, layer.weight.shape)):
            layer.fp8 = products[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.fp8 = before[name]


def _layer(module: nn.Module, name: str) -> WorkingLinear:
    layer = module.get_submodule(name)
    if not isinstance(layer, WorkingLinear):
        raise TypeError(f"{name} is a {type(layer).__name__}, whose input cannot be quantized")
    return layer


def _fake_quantize(x: Tensor, how: QuantizedInput) -> Tensor:
    with torch.no_grad():
        values = how.type.fake_quantize(x, how.scale).to(x.dtype)
    if how.scale is not None and how.scale.requires_grad:
        return _Scaled.apply(x, how.scale, values, how.type.grid.highest)  # type: ignore[no-any-return,no-untyped-call]
    return _StraightThrough.apply(x, values)  # type: ignore[no-any-return,no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Scaled(torch.autograd.Function):
    """x^ for x [..., K] and its scale s [1], with the gradients of s clamp(x / s, +-highest): the rounding's passes
    straight through, where x saturates it is all the scale's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, values: Tensor, highest: float) -> Tensor:
        ctx.save_for_backward(x, scale, values)
        ctx.highest = highest
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, scale, values = (tensor.float() for tensor in ctx.saved_tensors)
        inside = x.abs() <= ctx.highest * scale
        of_scale = (grad.float() * (values - torch.where(inside, x, 0.0))).sum().reshape(1) / scale
        return torch.where(inside, grad, 0.0), of_scale, None, None
