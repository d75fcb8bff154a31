"""What goes into the linear layers of a block: its statistics, and how it is to be quantized."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.blocks import masked_parts, run_block
from calibrate.layer_schemes import fused_groups
from vllm_autoround.format.activations import ActivationType
from vllm_autoround.format.scheme import QuantScheme


@dataclass(slots=True)
class InputStatistics:
    """Of one layer's input features, over every sample."""

    amax: Tensor  # scalar float32
    square_sum: Tensor  # [K] float32
    second_moments: Tensor | None = None  # sum of x^T x, [K, K] float32

    @classmethod
    def of(cls, x: Tensor, *, second_moments: bool = False) -> InputStatistics:
        """Of an input [..., K]."""
        x = x.detach().flatten(0, -2)
        values = x.float()
        return cls(values.abs().amax(), values.square().sum(0), token_products(x, x) if second_moments else None)

    def merge(self, other: InputStatistics) -> None:
        """Take further samples in."""
        self.widen(other)
        self.square_sum += other.square_sum
        if self.second_moments is not None and other.second_moments is not None:
            self.second_moments += other.second_moments

    def widen(self, other: InputStatistics) -> None:
        """Take further samples in for the range only."""
        self.amax = torch.maximum(self.amax, other.amax)


@dataclass(frozen=True, slots=True)
class QuantizedInput:
    """How one layer's input is quantized."""

    type: ActivationType
    scale: Tensor | None  # [1] float32, what the checkpoint stores; None where it stores nothing


@torch.no_grad()
def observe_inputs(
    block: nn.Module,
    names: Collection[str],
    hidden: Tensor,
    arguments: dict[str, Any],
    *,
    real: Tensor | None = None,
    second_moments: bool = False,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of the layers ``names`` over the block's inputs [S, T, H].

    Args:
        real: [S, T] bool, the tokens that count; None: all.
    """
    if not names:
        return {}
    device = next(block.parameters()).device
    seen: dict[str, InputStatistics] = {}
    for part, mask in masked_parts(hidden, real):
        with recorded_inputs(block, names, seen, real=mask, second_moments=second_moments):
            run_block(block, part.to(device), arguments)
    return seen


@contextmanager
def recorded_inputs(
    model: nn.Module,
    names: Collection[str],
    seen: dict[str, InputStatistics],
    *,
    real: Tensor | None = None,
    second_moments: bool = False,
) -> Iterator[None]:
    """Add statistics of everything that these layers are fed inside the context, [B, T, K], to ``seen``, by name.

    Args:
        real: [B, T] bool, the tokens that count; None: all.
    """

    def record(name: str, x: Tensor) -> None:
        statistics = InputStatistics.of(x, second_moments=second_moments)
        if name in seen:
            seen[name].merge(statistics)
        else:
            seen[name] = statistics

    with watched_inputs(model, names, record, real=real):
        yield


@contextmanager
def watched_inputs(
    model: nn.Module, names: Collection[str], record: Callable[[str, Tensor], None], *, real: Tensor | None = None
) -> Iterator[None]:
    """Call ``record`` with the name and the input [tokens, K] of every call of these layers inside the context.

    Args:
        real: [B, T] bool, the tokens that count; None: all.
    """

    def counted(x: Tensor) -> Tensor:
        # Some models hand their layers [B * T, K].
        return x.flatten(0, -2) if real is None else x.reshape(*real.shape, -1)[real.to(x.device)]

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: record(name, counted(args[0])))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def token_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum over tokens of left^T right, [T, J] and [T, K] of one dtype -> [J, K] float32."""
    if left.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.T, right, out_dtype=torch.float32)  # exact products, by the tensor cores
    return left.T.float() @ right.float()


def with_scales(
    inputs: Mapping[str, QuantizedInput], change: Callable[[str, Tensor], Tensor]
) -> dict[str, QuantizedInput]:
    """The same, with what ``change`` makes of each static scale and the name of its first layer; what layers share they
    go on to share."""
    changed: dict[int, Tensor] = {}
    made = {}
    for name, quantized in inputs.items():
        scale = quantized.scale
        if scale is not None and id(scale) not in changed:
            changed[id(scale)] = change(name, scale)
        made[name] = quantized if scale is None else QuantizedInput(quantized.type, changed[id(scale)])
    return made


def quantized_inputs_of(
    schemes: Mapping[str, QuantScheme], statistics: Mapping[str, InputStatistics]
) -> dict[str, QuantizedInput]:
    """The input quantization of every layer that has one; layers that vLLM fuses share their scalar."""
    inputs = {}
    for group in fused_groups(name for name, scheme in schemes.items() if scheme.activations is not None):
        amax = torch.stack([statistics[name].amax for name in group]).amax()
        # One tensor for all that share it: they then quantize the same input once.
        scales = {kind: kind.calibrated(amax) for kind in {schemes[name].activations for name in group} if kind}
        for name in group:
            activations = schemes[name].activations
            assert activations is not None
            inputs[name] = QuantizedInput(activations, scales[activations])
    return inputs
