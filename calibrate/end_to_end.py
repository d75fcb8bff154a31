"""After the blocks: the group scales of weights of few bits, trained on the model's output distribution.

Integers and zero points stay as the blocks' tuning left them. Each scale gets a factor, 1 at first, and Adam moves the
factors of all blocks together towards the least KL divergence of the model's logits from the original model's, one
sample a step. Samples that no step sees judge the result: if it is worse there, the scales stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from calibrate.activations import QuantizedInput
from calibrate.chain import NonFiniteError
from calibrate.config import CalibrationConfig, Recipe
from calibrate.plan import Plan
from calibrate.report import EndToEndReport, Progress, Stopwatch
from calibrate.resident import ResidentBlock, on_device
from calibrate.tail import ModelTail
from calibrate.tuning import sample_order
from calibrate.workbench import Loss
from vllm_autoround.format.weights import QuantizedWeight

_BETAS = (0.9, 0.98)
_LEAST_FACTOR = 2.0**-10


class TunedEarlier:
    """A block between its tuning and its writing, with its weights in host memory: those of a whole model, a byte each,
    are not left on a device whose free memory the tuning of later blocks counts on."""

    def __init__(
        self,
        weights: Mapping[str, QuantizedWeight],
        inputs: Mapping[str, QuantizedInput],
        scales: Mapping[str, Tensor],
    ) -> None:
        self.weights: dict[str, QuantizedWeight] = {}  # by layer name relative to the block
        self.inputs = dict(inputs)  # how inputs of its layers are quantized
        self.scales = dict(scales)  # of activations and KV cache, by the tensor's full name
        self.replace(weights)

    def replace(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Have these weights from now on."""
        self.weights |= {name: on_device(weight, torch.device("cpu")) for name, weight in weights.items()}


@dataclass(frozen=True, slots=True)
class TunedScales:
    """The result: what goes to disk, and what the report shows. Losses are those of the held-out samples."""

    weights: list[dict[str, QuantizedWeight]]  # of each block, by layer name relative to it; the trained layers only
    start_loss: float
    tuned_loss: float
    kept_start: bool  # because training made the model worse


def train_scales(
    model: PreTrainedModel,
    plan: Plan,
    config: CalibrationConfig,
    waiting: Sequence[TunedEarlier],
    arguments: Sequence[dict[str, Any]],
    inputs: Tensor,
    outputs: Tensor,
    progress: Progress,
) -> EndToEndReport:
    """Train the scales of all blocks, with the weights of ``waiting`` replaced by the result.

    Args:
        arguments: of each block, what its forward takes beside the hidden states.
        inputs: see `tune_scales`; in host memory, since the device has to hold the model.
        outputs: likewise.

    Raises:
        NonFiniteError: a loss, gradient or scale that is not finite.
    """
    watch, device, dtype = Stopwatch(), plan.device, plan.compute_dtype
    progress.start_end_to_end(config.tuning.end_to_end_iters)
    blocks = [
        ResidentBlock(block, kwargs, done.weights, done.inputs, plan.scales_to_train(block), device, dtype)
        for block, kwargs, done in zip(plan.blocks, arguments, waiting, strict=True)
    ]
    tuned = tune_scales(
        blocks,
        inputs,
        outputs,
        real=plan.real,
        loss=ModelTail(model, plan.blocks, device, dtype).divergence,
        recipe=config.tuning,
        heldout=plan.heldout,
        generator=torch.Generator().manual_seed(config.seed + len(blocks)),  # blocks have those before
        on_step=progress.step,
    )
    for done, weights in zip(waiting, tuned.weights, strict=True):
        done.replace(weights)
    report = EndToEndReport(
        layers=sum(map(len, tuned.weights)),
        start_loss=tuned.start_loss,
        tuned_loss=tuned.tuned_loss,
        kept_start=tuned.kept_start,
        seconds=watch.seconds(),
    )
    progress.finish_end_to_end(report)
    return report


def tune_scales(
    blocks: Sequence[ResidentBlock],
    inputs: Tensor,
    outputs: Tensor,
    *,
    real: Tensor | None = None,
    loss: Loss,
    recipe: Recipe,
    heldout: int,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> TunedScales:
    """Train the scales of all blocks together; at least one layer must be under training.

    Of a sample, only what enters each block is kept for the backward pass; each block runs twice.

    Args:
        inputs: [S, T, H], what enters the first block of the quantized chain; on any device.
        outputs: [S, T, H], what leaves the last block of the original chain; on any device.
        real: [S, T] bool on the blocks' device, the tokens that count; None: all.
        loss: of the hidden states that leave the last block: `ModelTail.divergence`.
        heldout: how many samples, the last ones, are left out of training, and judge it; 0: all do both.
        generator: draws the samples.
        on_step: called after every step.

    Raises:
        NonFiniteError: a loss, gradient or scale that is not finite.
    """
    factors = {f"{block.name}: {name}": factor for block in blocks for name, factor in block.factors.items()}
    device = next(iter(factors.values())).device
    tokens = torch.full((len(inputs),), float(inputs.shape[1])) if real is None else real.sum(1).cpu().float()
    judges = range(len(inputs) - heldout if heldout else 0, len(inputs))

    def loss_of(sample: int) -> Tensor:
        one = slice(sample, sample + 1)
        output = _run(blocks, inputs[one].to(device))
        return loss(output, outputs[one].to(device), None if real is None else real[one])

    @torch.no_grad()
    def judge() -> float:
        losses = torch.tensor([loss_of(sample).item() for sample in judges], dtype=torch.float64)
        share = tokens[judges.start :].double()
        return ((losses * share).sum() / share.sum()).item()

    start = judge()
    if not isfinite(start):
        raise NonFiniteError(_culprit(blocks, inputs[judges.start :][:1].to(device)))
    optimizer = torch.optim.Adam(factors.values(), betas=_BETAS)
    order = sample_order(len(inputs) - heldout, (recipe.end_to_end_iters, 1, 1), generator)
    for step, sample in enumerate(order.flatten().tolist()):
        optimizer.param_groups[0]["lr"] = recipe.end_to_end_lr * (1 - step / recipe.end_to_end_iters)
        error = loss_of(sample)
        if not isfinite(error.item()):
            raise NonFiniteError(f"step {step} end to end: {_culprit(blocks, inputs[sample : sample + 1].to(device))}")
        error.backward()
        _check_gradients(factors)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for factor in factors.values():
                factor.clamp_(min=_LEAST_FACTOR)  # a scale keeps its sign
        on_step()

    tuned = judge()
    kept_start = not tuned <= start  # NaN is worse
    if kept_start:
        tuned = start
        with torch.no_grad():
            for factor in factors.values():
                factor.fill_(1)
    return TunedScales([_finished(block) for block in blocks], start, tuned, kept_start)


def _run(blocks: Sequence[ResidentBlock], hidden: Tensor) -> Tensor:
    """Through all blocks, [B, T, H] -> [B, T, H]."""
    for block in blocks:
        hidden = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)
    return hidden


@torch.no_grad()
def _culprit(blocks: Sequence[ResidentBlock], hidden: Tensor) -> str:
    """Who gives a value that is not finite for these inputs [B, T, H] first."""
    for block in blocks:
        hidden = block(hidden)
        if not hidden.isfinite().all():
            return f"{block.name} gives a value that is not finite"
    return "the model's output distribution is not finite"


def _check_gradients(factors: Mapping[str, Tensor]) -> None:
    bad = [name for name, factor in factors.items() if factor.grad is not None and not factor.grad.isfinite().all()]
    if bad:
        raise NonFiniteError(f"{bad[-1]}: a gradient is not finite")  # backwards, it came from the last one


def _finished(block: ResidentBlock) -> dict[str, QuantizedWeight]:
    weights = block.rescaled_weights()
    for name, weight in weights.items():
        if not weight.scale.isfinite().all():
            raise NonFiniteError(f"{block.name}: {name}: a scale is not finite in {weight.scale.dtype}")
    return weights
