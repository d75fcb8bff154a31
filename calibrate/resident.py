"""The blocks of a quantized model on the device all at once, with integer weights whose scales can be trained.

Device memory: one byte for each weight of a layer under training, and 18 for each of its groups (the scale in 16 bits,
its factor, the gradient and Adam's two means); everything else of the blocks in the compute dtype. While a block runs,
forward or backward, its dequantized weights are there too, and the float32 intermediates of one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calibrate.activations import QuantizedInput
from calibrate.blocks import Block, copy_arguments, to_device
from calibrate.linear import make_working, quantized_inputs
from vllm_autoround.format.weights import QuantizedWeight
from vllm_autoround.format.weights.base import away_from_zero


def rescaled(weight: QuantizedWeight, factor: Tensor) -> QuantizedWeight:
    """An integer weight with its scale times ``factor`` [R, C] float32, in the dtype that scales are stored in."""
    dtype = weight.scale.dtype
    return replace(weight, scale=away_from_zero(weight.scale.float() * factor, dtype).to(dtype))


def served(weight: QuantizedWeight, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """W^ [N, K] of a rescaled weight in ``dtype``, rounded as it is served, with its gradient to ``factor``.

    Straight through the roundings, the gradient is the sum over the group of dL/dW^ * W^ at factor 1. Autograd itself
    would keep several float32 copies of the weight for it; this keeps none.
    """
    return cast(Tensor, _Served.apply(factor, weight, dtype))


class _Served(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        ctx.weight = weight
        return rescaled(weight, factor).dequantize().to(weight.scale.dtype).to(dtype)  # scales are in the model's

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight: QuantizedWeight = ctx.weight
        tile = weight.type.tile(*weight.codes.shape)
        return tile.split(grad.float() * weight.dequantize()).sum((1, 3)), None, None


class ResidentBlock(nn.Module):
    """A quantized block on the device; it runs as it is served, input quantization included."""

    def __init__(
        self,
        block: Block,
        arguments: dict[str, Any],
        weights: Mapping[str, QuantizedWeight],
        inputs: Mapping[str, QuantizedInput],
        trained: Collection[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Bring a block to the device.

        Args:
            arguments: what its forward takes beside the hidden states.
            weights: its quantized layers, by name relative to the block; on any device.
            inputs: how inputs of its layers are quantized.
            trained: the layers, of integer weights, that are held as codes.
        """
        super().__init__()
        self.name = block.name
        self.module = make_working(to_device(block, device, dtype)).requires_grad_(False)
        self.arguments = copy_arguments(arguments, device)
        self.inputs = dict(inputs)
        self.weights = {name: on_device(weights[name], device) for name in weights if name in trained}
        self.factors = {
            name: torch.ones_like(weight.scale, dtype=torch.float32).requires_grad_(True)
            for name, weight in self.weights.items()
        }
        originals = block.linears()
        for name, weight in weights.items():
            layer = cast(nn.Linear, self.module.get_submodule(name))
            if name in self.weights:
                # Nothing but a place for the weights that `forward` makes.
                layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
            else:
                install(layer, weight, originals[name].weight.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        dtype = hidden.dtype
        weights = {f"{name}.weight": served(self.weights[name], f, dtype) for name, f in self.factors.items()}
        with quantized_inputs(self.module, self.inputs):
            return cast(Tensor, functional_call(self.module, weights, (hidden,), self.arguments))

    @torch.no_grad()
    def rescaled_weights(self) -> dict[str, QuantizedWeight]:
        """The layers under training with the scales that they have now."""
        return {name: rescaled(weight, self.factors[name]) for name, weight in self.weights.items()}


@torch.no_grad()
def install(layer: nn.Linear, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Give a layer its weight as it is served: dequantized and rounded to ``dtype``, the model's."""
    layer.weight.copy_(on_device(weight, layer.weight.device).dequantize().to(dtype))


def on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """The same weight with its tensors on ``device``."""
    zero, common = weight.zero_point, weight.global_scale
    return replace(
        weight,
        codes=weight.codes.to(device),
        scale=weight.scale.to(device),
        zero_point=None if zero is None else zero.to(device),
        global_scale=None if common is None else common.to(device),
    )
