"""Tune one decoder block: sign gradient descent on the rounding of all its linear layers at once.

The loss is the mean squared error between the block's output on the quantized chain's inputs and the original block's
output on the original chain's inputs, or what `Loss` the caller gives. The last iterate is kept; there is no early
stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrate.activations import InputStatistics
from calibrate.blocks import run_block, token_parts
from calibrate.config import Recipe
from calibrate.layer_schemes import fused_groups
from calibrate.rounding import Rounding, Target, fake_quantize, freeze, group_errors, sign_step, targets
from calibrate.scale_search import MOST_CLIP, search_scales
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight

Loss = Callable[[Tensor, Tensor], Tensor]  # output and target [B, T, H] -> scalar float32


class NonFiniteError(RuntimeError):
    """NaN or infinity where there must be a number; names the layer."""


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """In float32, over all elements."""
    return F.mse_loss(output.float(), target.float())


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What tuning did to one layer."""

    weight_error: float  # squared error of the dequantized weight over the squared weight
    moved: float  # share of the values that differ from where tuning started
    scale_min: float
    scale_max: float


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """The result of tuning: what goes to disk, and what the report shows."""

    weights: dict[str, QuantizedWeight]  # by layer name relative to the block
    layers: dict[str, LayerReport]
    start_error: float  # relative squared output error before the first step
    final_loss: float | None  # of the last step's samples; None without steps


# A layer shape costs a compilation of each kernel, and a model with several schemes has several times four of them.
@torch._dynamo.config.patch(recompile_limit=256)
@torch.enable_grad()
def tune_block(
    block: nn.Module,
    original: nn.Module,
    schemes: Mapping[str, QuantScheme],
    inputs: Tensor,
    outputs: Tensor,
    arguments: dict[str, Any],
    *,
    recipe: Recipe,
    statistics: Mapping[str, InputStatistics],
    accumulate: int,
    generator: torch.Generator,
    on_step: Callable[[], None],
    loss: Loss = mean_squared_error,
) -> TunedBlock:
    """Learn the rounding of the layers named in ``schemes``; leaves ``block`` with the dequantized weights.

    Args:
        block: on the device, in compute dtype.
        original: the block as loaded, in the model's dtype, whose weights are quantized.
        schemes: layer name relative to the block -> scheme; without any, nothing is tuned.
        inputs: [S, T, H], the quantized chain's input of this block.
        outputs: [S, T, H], the original chain's output of this block.
        arguments: the block's other arguments, on its device.
        statistics: of the layers' inputs, for the scale search.
        accumulate: minibatches a step.
        generator: draws the minibatches.
        on_step: called after every step.

    Raises:
        NonFiniteError: a loss, gradient or scale that is not finite.
    """
    device = next(block.parameters()).device
    kernels = _kernels(device, recipe)
    layers = _layers(block, original, schemes, statistics, recipe, kernels)
    if not layers:
        return TunedBlock({}, {}, relative_error(block, inputs, outputs, arguments), None)
    block.requires_grad_(False)
    _install(layers, kernels)
    start_error = relative_error(block, inputs, outputs, arguments)

    for layer in layers.values():
        layer.module.weight.requires_grad_(True)
    rates = torch.tensor([recipe.learning_rate(step) for step in range(recipe.iters)], device=device)
    losses = torch.zeros(recipe.iters, device=device)  # read once, after the loop: no synchronisation inside
    batches = _minibatches(len(inputs), recipe.batch_size, generator)
    for step in range(recipe.iters):
        for _ in range(accumulate):
            picked = next(batches)
            output = run_block(block, _fetch(inputs, picked, device), arguments)
            error = loss(output, _fetch(outputs, picked, device))
            error.backward()
            losses[step] += error.detach() / accumulate
        _update(layers, rates[step], kernels)
        on_step()
    block.requires_grad_(False)

    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0])
        culprit = _first_non_finite(block, _fetch(inputs, torch.arange(1), device), arguments)
        raise NonFiniteError(f"{culprit} gives a value that is not finite; the loss of step {step} is {losses[step]}")
    weights = {name: _finish(name, layer) for name, layer in layers.items()}
    reports = {name: _layer_report(layer, weights[name]) for name, layer in layers.items()}
    return TunedBlock(weights, reports, start_error, losses[-1].item() if recipe.iters else None)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One linear layer under tuning."""

    module: nn.Linear
    target: Target
    start: Rounding
    rounding: Rounding
    means: Rounding | None  # running means of the gradients
    finite: Tensor  # scalar bool on the device: every gradient so far was finite


def _layers(
    block: nn.Module,
    original: nn.Module,
    schemes: Mapping[str, QuantScheme],
    statistics: Mapping[str, InputStatistics],
    recipe: Recipe,
    kernels: _Kernels,
) -> dict[str, _Layer]:
    """Every layer at its start; those that vLLM fuses, and that have one weight type, share what is one a layer."""
    layers: dict[str, _Layer] = {}
    for group in fused_groups(schemes):
        for kind in dict.fromkeys(schemes[name].weights for name in group):
            names = [name for name in group if schemes[name].weights == kind]
            modules = [cast(nn.Linear, block.get_submodule(name)) for name in names]
            weights = [
                cast(nn.Linear, original.get_submodule(name)).weight.detach().to(module.weight.device, copy=True)
                for name, module in zip(names, modules, strict=True)
            ]
            for name, module, target in zip(names, modules, targets(weights, kind), strict=True):
                start = Rounding.nearest(target)
                if recipe.scale_search:
                    target, start = search_scales(target, statistics[name].square_sum, kernels.group_errors)  # noqa: PLW2901
                rounding = start.clone()
                means = rounding.zeros() if recipe.momentum else None
                finite = torch.ones((), dtype=torch.bool, device=module.weight.device)
                layers[name] = _Layer(module, target, start, rounding, means, finite)
    return {name: layers[name] for name in schemes}


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
        kernels.sign_step(layer.target, layer.rounding, layer.means, grad, rate)
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
    dequantized = weight.dequantize()
    if not dequantized.isfinite().all():
        raise NonFiniteError(f"{name}: a scale is not finite in {weight.scale.dtype}")
    layer.module.weight.copy_(dequantized.to(layer.target.weight.dtype))
    return weight


@torch.no_grad()
def quantize_layer(
    weight: Tensor, scheme: QuantScheme, importance: Tensor | None, *, scale_search: bool
) -> QuantizedWeight:
    """Quantize a weight [N, K] outside the blocks, without tuning.

    Args:
        importance: [K] of the input features; None: all the same.
    """
    [target] = targets([weight], scheme.weights)
    start = Rounding.nearest(target)
    if scale_search:
        ones = torch.ones(weight.shape[1], device=weight.device)
        target, start = search_scales(target, ones if importance is None else importance)
    return freeze(target, start)


@torch.no_grad()
def advance(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> None:
    """Replace the block's input [S, T, H] by its output, in place, in large batches.

    Raises:
        NonFiniteError: an output that is not finite; names the first layer that made one.
    """
    device = next(block.parameters()).device
    for part in token_parts(hidden):
        inputs = part.to(device)
        output = run_block(block, inputs, arguments)
        if not output.isfinite().all():
            raise NonFiniteError(f"{_first_non_finite(block, inputs, arguments)} gives a value that is not finite")
        part.copy_(output)


@torch.no_grad()
def relative_error(block: nn.Module, inputs: Tensor, targets: Tensor, arguments: dict[str, Any]) -> float:
    """`relative_distance` of the block's outputs for inputs [S, T, H] from targets [S, T, H]."""
    device = next(block.parameters()).device
    outputs = (run_block(block, part.to(device), arguments) for part in token_parts(inputs))
    return _relative_distance(outputs, token_parts(targets))


def relative_distance(hidden: Tensor, reference: Tensor) -> float:
    """Squared distance of [S, T, H] from a reference over the reference's squared norm, in float64."""
    return _relative_distance(token_parts(hidden), token_parts(reference))


def _relative_distance(parts: Iterable[Tensor], references: Iterable[Tensor]) -> float:
    error = norm = 0.0
    for part, reference in zip(parts, references, strict=True):
        expected = reference.to(part.device).float()
        error += (part.float() - expected).square().sum(dtype=torch.float64).item()
        norm += expected.square().sum(dtype=torch.float64).item()
    return error / norm if error else 0.0


def _layer_report(layer: _Layer, weight: QuantizedWeight) -> LayerReport:
    original, dequantized = layer.target.weight.float(), weight.dequantize()
    start = freeze(layer.target, layer.start)
    kind = weight.type
    scale = kind.acting_scale(weight.scale, weight.global_scale)
    return LayerReport(
        weight_error=((dequantized - original).square().sum() / original.square().sum()).item(),
        moved=(kind.decode(weight.codes) != kind.decode(start.codes)).float().mean().item(),
        scale_min=scale.min().item(),
        scale_max=scale.max().item(),
    )


@dataclass(frozen=True, slots=True)
class _Kernels:
    fake_quantize: Callable[[Target, Rounding], Tensor]
    sign_step: Callable[[Target, Rounding, Rounding | None, Tensor, Tensor], None]
    group_errors: Callable[[Target, Rounding, Tensor], Tensor]


def _kernels(device: torch.device, recipe: Recipe) -> _Kernels:
    """The quantizer and the update: one fused pass each on a GPU, as written on the CPU."""
    step = partial(
        sign_step,
        scale_lr=recipe.scale_lr,
        momentum=recipe.momentum,
        most_clip=MOST_CLIP if recipe.scale_search else 1.0,
    )
    if device.type != "cuda":
        return _Kernels(fake_quantize, step, group_errors)
    fused = partial(torch.compile, dynamic=False)
    return _Kernels(fused(fake_quantize), fused(step), fused(group_errors))


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
