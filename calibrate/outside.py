"""Quantized layers that are in no block: the embedding and the head. They are not tuned; their scales are searched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrate.activations import InputStatistics, recorded_inputs
from calibrate.config import CalibrationConfig
from calibrate.plan import Plan
from calibrate.tail import ModelTail
from calibrate.tuning import quantize_layer
from vllm_autoround.format.weights import QuantizedWeight


def quantize_embedding(model: PreTrainedModel, plan: Plan, config: CalibrationConfig) -> dict[str, QuantizedWeight]:
    """The input embedding by its full name, if the plan quantizes it."""
    schemes, weights = plan.outside(), {}
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            weight = module.weight.detach().to(plan.device)
            weights[name] = quantize_layer(weight, scheme, None, scale_search=config.tuning.scale_search)
    return weights


@torch.no_grad()
def quantize_heads(
    model: PreTrainedModel, plan: Plan, config: CalibrationConfig, hidden: Tensor
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The linear layers after the blocks by full name, and their activation scales by tensor name.

    Args:
        hidden: [S, T, H], what leaves the last block of the quantized chain.
    """
    schemes = {
        name: scheme for name, scheme in plan.outside().items() if isinstance(model.get_submodule(name), nn.Linear)
    }
    if not schemes:
        return {}, {}
    statistics = _head_statistics(model, plan, hidden, list(schemes))
    weights, scales = {}, {}
    for name, scheme in schemes.items():
        weight = cast(nn.Linear, model.get_submodule(name)).weight.detach().to(plan.device)
        weights[name] = quantize_layer(
            weight, scheme, statistics[name].square_sum, scale_search=config.tuning.scale_search
        )
        if scheme.activations is not None:
            scalar = scheme.activations.calibrated(statistics[name].amax)
            if scalar is not None:
                scales[f"{name}.{scheme.activations.static}"] = scalar.cpu()
    return weights, scales


@contextmanager
def replaced_weight(module: nn.Module, weight: QuantizedWeight) -> Iterator[None]:
    """The module with the dequantized weight inside the context."""
    parameter = cast(Tensor, module.weight)
    original = parameter.data
    parameter.data = weight.dequantize().to(original)
    try:
        yield
    finally:
        parameter.data = original


def _head_statistics(
    model: PreTrainedModel, plan: Plan, hidden: Tensor, names: list[str]
) -> dict[str, InputStatistics]:
    """Statistics of what each of these layers is fed after the blocks."""
    tail = ModelTail(model, plan.blocks, plan.device, plan.compute_dtype)
    seen: dict[str, InputStatistics] = {}
    with recorded_inputs(tail.model, names, seen):
        for index, sample in enumerate(hidden):
            tokens = sample.to(plan.device)
            tail.logits(tokens[None] if plan.real is None else tokens[plan.real[index]][None])
    return seen
