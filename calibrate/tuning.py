"""Tune one decoder block: sign gradient descent on the rounding of all its linear layers at once.

The loss is the mean squared error between the block's output on the quantized chain's inputs and the original block's
output on the original chain's inputs. The last iterate is kept; there is no early stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrate.blocks import run_block
from calibrate.config import Recipe
from calibrate.rounding import Rounding, Target, fake_quantize, freeze, sign_step
from vllm_autoround.format.codec import QuantizedWeight
from vllm_autoround.format.scheme import QuantScheme

_EVALUATION_TOKENS = 16_384  # tokens a forward without gradients takes at once


class NonFiniteError(RuntimeError):
    """NaN or infinity where there must be a number; names the layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What tuning did to one layer."""

    weight_error: float  # squared error of the dequantized weight over the squared weight
    moved: float  # share of the codes that differ from rounding to nearest
    scale_min: float
    scale_max: float


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """The result of tuning: what goes to disk, and what the report shows."""

    weights: dict[str, QuantizedWeight]  # by layer name relative to the block
    layers: dict[str, LayerReport]
    rtn_error: float  # relative squared output error, rounded to nearest
    final_loss: float | None  # mean squared error of the last step's samples; None without steps


# A layer shape costs a compilation of each kernel, and a model with several schemes has several times four of them.
@torch._dynamo.config.patch(recompile_limit=128)
@torch.enable_grad()
def tune_block(
    block: nn.Module,
    original: nn.Module,
    schemes: Mapping[str, QuantScheme],
    inputs: Tensor,
    targets: Tensor,
    arguments: dict[str, Any],
    *,
    recipe: Recipe,
    accumulate: int,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> TunedBlock:
    """Learn the rounding of the layers named in ``schemes``; leaves ``block`` with the dequantized weights.

    Args:
        block: on the device, in compute dtype.
        original: the block as loaded, in the model's dtype, whose weights are quantized.
        schemes: layer name relative to the block -> scheme; without any, nothing is tuned.
        inputs: [S, T, H], the quantized chain's input of this block.
        targets: [S, T, H], the original chain's output of this block.
        arguments: the block's other arguments, on its device.
        accumulate: minibatches a step.
        generator: draws the samples of each step.
        on_step: called after every step.

    Raises:
        NonFiniteError: a loss, gradient, output or scale that is not finite, with the layer's name.
    """
    device = next(block.parameters()).device
    layers = {name: _Layer.of(block, original, name, scheme) for name, scheme in schemes.items()}
    if not layers:
        return TunedBlock({}, {}, relative_error(block, inputs, targets, arguments), None)
    kernels = _kernels(device)
    block.requires_grad_(False)
    _install(layers, kernels)
    rtn_error = relative_error(block, inputs, targets, arguments)

    for layer in layers.values():
        layer.module.weight.requires_grad_(True)
    rates = torch.tensor([recipe.learning_rate(step) for step in range(recipe.iters)], device=device)
    losses = torch.zeros(recipe.iters, device=device)  # read once, after the loop: no synchronisation inside
    batches = _minibatches(len(inputs), recipe.batch_size, generator)
    for step in range(recipe.iters):
        for _ in range(accumulate):
            picked = next(batches)
            output = run_block(block, _fetch(inputs, picked, device), arguments)
            loss = F.mse_loss(output.float(), _fetch(targets, picked, device).float())
            loss.backward()
            losses[step] += loss.detach() / accumulate
        _update(layers, rates[step], kernels)
        on_step()
    block.requires_grad_(False)

    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0])
        culprit = _first_non_finite(block, _fetch(inputs, torch.arange(1), device), arguments)
        raise NonFiniteError(f"{culprit} gives a value that is not finite; the loss of step {step} is {losses[step]}")
    weights = {name: _finish(name, layer) for name, layer in layers.items()}
    reports = {name: _layer_report(layer.target, weights[name]) for name, layer in layers.items()}
    return TunedBlock(weights, reports, rtn_error, losses[-1].item() if recipe.iters else None)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One linear layer under tuning."""

    module: nn.Linear
    target: Target
    rounding: Rounding
    finite: Tensor  # scalar bool on the device: every gradient so far was finite

    @classmethod
    def of(cls, block: nn.Module, original: nn.Module, name: str, scheme: QuantScheme) -> _Layer:
        module = cast(nn.Linear, block.get_submodule(name))
        weight = cast(nn.Linear, original.get_submodule(name)).weight.detach().to(module.weight.device, copy=True)
        finite = torch.ones((), dtype=torch.bool, device=weight.device)
        return cls(module, Target.of(weight, scheme), Rounding.nearest(weight, scheme), finite)


@torch.no_grad()
def _install(layers: Mapping[str, _Layer], kernels: _Kernels) -> None:
    """Give every layer the dequantized values of its current rounding."""
    for layer in layers.values():
        layer.module.weight.copy_(kernels.fake_quantize(layer.target, layer.rounding))


@torch.no_grad()
def _update(layers: Mapping[str, _Layer], rate: Tensor, kernels: _Kernels) -> None:
    """One step of sign descent on every layer, from the gradients of its dequantized weight."""
    for layer in layers.values():
        grad = cast(Tensor, layer.module.weight.grad)
        # The sign of NaN is 0: a broken gradient would pass for a finished one.
        layer.finite.logical_and_(torch.stack(grad.aminmax()).isfinite().all())
        kernels.sign_step(layer.target, layer.rounding, grad, rate)
        layer.module.weight.grad = None
    _install(layers, kernels)


@torch.no_grad()
def _finish(name: str, layer: _Layer) -> QuantizedWeight:
    """The layer as it goes to disk, and, rounded as it is served, into the block.

    Raises:
        NonFiniteError: a gradient or a scale that is not finite.
    """
    if not layer.finite:
        raise NonFiniteError(f"{name}: a gradient is not finite")
    weight = freeze(layer.target, layer.rounding)
    if not weight.scale.isfinite().all():
        raise NonFiniteError(f"{name}: a scale is not finite in {weight.scale.dtype}")
    layer.module.weight.copy_(weight.dequantize().to(weight.scale.dtype))
    return weight


@torch.no_grad()
def advance(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> None:
    """Replace the block's input [S, T, H] by its output, in place, in large batches.

    Raises:
        NonFiniteError: an output that is not finite; names the first layer that made one.
    """
    device = next(block.parameters()).device
    for part in _parts(hidden):
        inputs = part.to(device)
        output = run_block(block, inputs, arguments)
        if not output.isfinite().all():
            raise NonFiniteError(f"{_first_non_finite(block, inputs, arguments)} gives a value that is not finite")
        part.copy_(output)


@torch.no_grad()
def relative_error(block: nn.Module, inputs: Tensor, targets: Tensor, arguments: dict[str, Any]) -> float:
    """`relative_distance` of the block's outputs for inputs [S, T, H] from targets [S, T, H]."""
    device = next(block.parameters()).device
    outputs = (run_block(block, part.to(device), arguments) for part in _parts(inputs))
    return _relative_distance(outputs, _parts(targets))


def relative_distance(hidden: Tensor, reference: Tensor) -> float:
    """Squared distance of [S, T, H] from a reference over the reference's squared norm, in float64."""
    return _relative_distance(_parts(hidden), _parts(reference))


def _relative_distance(parts: Iterable[Tensor], references: Iterable[Tensor]) -> float:
    error = norm = 0.0
    for part, reference in zip(parts, references, strict=True):
        expected = reference.to(part.device).float()
        error += (part.float() - expected).square().sum(dtype=torch.float64).item()
        norm += expected.square().sum(dtype=torch.float64).item()
    return error / norm if error else 0.0


def _layer_report(goal: Target, weight: QuantizedWeight) -> LayerReport:
    original = goal.weight.float()
    nearest = freeze(goal, Rounding.nearest(goal.weight, goal.scheme))
    return LayerReport(
        weight_error=((weight.dequantize() - original).square().sum() / original.square().sum()).item(),
        moved=(weight.codes != nearest.codes).float().mean().item(),
        scale_min=weight.scale.min().item(),
        scale_max=weight.scale.max().item(),
    )


@dataclass(frozen=True, slots=True)
class _Kernels:
    fake_quantize: Callable[[Target, Rounding], Tensor]
    sign_step: Callable[[Target, Rounding, Tensor, Tensor], None]


def _kernels(device: torch.device) -> _Kernels:
    """The quantizer and the update: one fused pass each on a GPU, as written on the CPU."""
    if device.type != "cuda":
        return _Kernels(fake_quantize, sign_step)
    return _Kernels(torch.compile(fake_quantize, dynamic=False), torch.compile(sign_step, dynamic=False))


def _minibatches(samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless minibatches of sample indices; every sample comes once before any comes again."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(samples, generator=generator)])
        yield order[:batch_size]
        order = order[batch_size:]


def _fetch(hidden: Tensor, picked: Tensor, device: torch.device) -> Tensor:
    """Samples ``picked`` [B] of hidden [S, T, H] on ``device``: [B, T, H]."""
    if hidden.device == device or device.type == "cpu":
        return hidden[picked.to(hidden.device)]
    batch = torch.empty((len(picked), *hidden.shape[1:]), dtype=hidden.dtype, device=device)
    for row, sample in enumerate(picked.tolist()):
        batch[row].copy_(hidden[sample], non_blocking=True)  # straight from pinned memory, sample by sample
    return batch


def _parts(hidden: Tensor) -> tuple[Tensor, ...]:
    """Views of [S, T, H] of about _EVALUATION_TOKENS tokens each."""
    return hidden.split(max(1, _EVALUATION_TOKENS // hidden.shape[1]))


def _first_non_finite(block: nn.Module, inputs: Tensor, arguments: dict[str, Any]) -> str:
    """Name of the first leaf module of ``block`` whose output is not finite."""
    culprits: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _module, _args, out, name=name: (
                None if not isinstance(out, Tensor) or out.isfinite().all() else culprits.append(name)
            )
        )
        for name, module in block.named_modules()
        if not any(module.children())
    ]
    try:
        run_block(block, inputs, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return culprits[0] if culprits else "the block's own arithmetic"
