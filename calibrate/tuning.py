"""Tune one decoder block: sign gradient descent on the rounding of all its linear layers at once.

The loss is the mean squared error between the block's output on the quantized chain's inputs and the original block's
output on the original chain's inputs, or what `Loss` the caller gives. The last iterate is kept; there is no early
stop. Samples that no step sees judge the result: a block that tuning made worse on them goes back to its start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import cast

import torch
from torch import Tensor, nn

from calibrate.activations import InputStatistics, QuantizedInput
from calibrate.blocks import token_parts
from calibrate.chain import NonFiniteError, first_non_finite
from calibrate.clock import Clock
from calibrate.config import FINE_BITS, Recipe
from calibrate.fp8_matmul import fits_fp8, has_fp8, is_exact
from calibrate.gptq import gptq
from calibrate.input_scales import learned_scales, search_input_scales, static_inputs
from calibrate.layer_schemes import fused_groups
from calibrate.layer_state import LayerReport, LayerState
from calibrate.linear import quantized_now
from calibrate.precision import fp8_suffices
from calibrate.rounding import MOST_CLIP, OFFSET_UNIT, Rounding, Target, freeze, targets
from calibrate.scale_descent import descend_scales, descends
from calibrate.scale_search import search_scales
from calibrate.steps import Steps
from calibrate.verdict import Verdict, judge_block, mean_squared_error, sample_losses
from calibrate.workbench import Loss, WorkingBlock
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer, QuantizedWeight, WeightType

_LEAST_TRIED = 2  # samples, so that `search_input_scales` has two halves


@dataclass(frozen=True, slots=True)
class TunedBlock:
    """The result of tuning: what goes to disk, and what the report shows."""

    weights: dict[str, QuantizedWeight]  # by layer name relative to the block
    layers: dict[str, LayerReport]
    start: Verdict
    tuned: Verdict
    heldout: Tensor  # [S', T, H] what the block makes of the held-out samples; of all, if none is held out
    kept_start: bool  # because tuning made the block worse
    final_loss: float | None  # of the last step's samples; None without steps
    in_fp8: bool  # the matrix products of its steps; see also `forward_in_fp8`


def tune_block(
    working: WorkingBlock,
    schemes: Mapping[str, QuantScheme],
    inputs: Tensor,
    outputs: Tensor,
    *,
    real: Tensor | None = None,
    recipe: Recipe,
    statistics: Mapping[str, InputStatistics],
    heldout: int,
    accumulate: int,
    generator: torch.Generator,
    on_step: Callable[[], None],
    clock: Clock,
    loss: Loss = mean_squared_error,
) -> TunedBlock:
    """Learn the rounding of the layers named in ``schemes``; leaves the block with the dequantized weights.

    Static scales by which the block quantizes its inputs are tuned too, in place.

    Args:
        schemes: layer name relative to the block -> scheme; without any, nothing is tuned.
        inputs: [S, T, H], the quantized chain's input of this block.
        outputs: [S, T, H], the original chain's output of this block.
        real: [S, T] bool on the device, the tokens that count; None: all.
        statistics: of the layers' inputs, for the scale search.
        heldout: how many samples, the last ones, are left out of tuning, and judge it; 0: all do both.
        accumulate: minibatches a step.
        generator: draws the minibatches.
        on_step: called after every step.
        clock: is told where the time goes.

    Raises:
        NonFiniteError: a loss, gradient or scale that is not finite.
    """
    judges = slice(len(inputs) - heldout if heldout else 0, None)
    in_fp8 = False

    def judge() -> tuple[Verdict, Tensor]:
        with clock.phase("verdict"), working.fp8_matmuls(forward_in_fp8(schemes) if in_fp8 else {}):
            return judge_block(working, inputs[judges], outputs[judges], None if real is None else real[judges], loss)

    if not schemes:
        start, made = judge()
        _check_start(start, working, inputs[judges])
        return TunedBlock({}, {}, start, start, made, kept_start=False, final_loss=None, in_fp8=False)
    working.module.requires_grad_(False)
    with clock.phase("scale search"):
        starts = _starts(working, schemes, statistics, recipe)
    shape = (recipe.iters, accumulate, recipe.batch_size)
    static = static_inputs(quantized_now(working.module))
    with clock.phase("set-up"):
        layers, steps = _set_up(working, schemes, starts, static, inputs, outputs, real, recipe, shape, loss)
    if recipe.scale_search and static:
        with clock.phase("input scale search"):
            _search_input_scales(working, static, inputs, outputs, real, heldout, loss)
    if recipe.iters:
        with clock.phase("precision"):
            in_fp8 = _in_fp8(working, schemes, steps, inputs[: len(inputs) - heldout], recipe, loss)
    start, made = judge()
    _check_start(start, working, inputs[judges])

    final_loss, values = None, dict[str, Tensor]()
    if recipe.iters:
        order = sample_order(len(inputs) - heldout, shape, generator)
        with clock.phase("steps"), working.fp8_matmuls(schemes if in_fp8 else {}):
            rates = torch.stack([_rates(recipe, scheme.weights) for scheme in schemes.values()], dim=1)
            steps.run(order, rates, on_step, variant="fp8" if in_fp8 else "bf16")
            final_loss = _last_loss(steps, working, inputs)
    if recipe.gptq:
        with clock.phase("gptq"):
            for name, layer in layers.items():
                values[name] = _gptq(name, layer.target, starts[name][1], statistics[name])
    with clock.phase("freeze"):
        frozen = {name: layer.finish(name, values.get(name)) for name, layer in layers.items()}
    tuned = start
    if recipe.beyond_nearest:
        tuned, made = judge()
    kept_start = not tuned.loss <= start.loss  # NaN is worse
    if kept_start:
        steps.restart()
        frozen = {name: layer.finish(name) for name, layer in layers.items()}
        tuned, made = judge()
    weights = {name: weight for name, (weight, _) in frozen.items()}
    reports = {name: report for name, (_, report) in frozen.items()}
    return TunedBlock(weights, reports, start, tuned, made, kept_start, final_loss, in_fp8)


def forward_in_fp8(schemes: Mapping[str, QuantScheme]) -> dict[str, QuantScheme]:
    """The layers of a block in FP8 that multiply in it forward too, also after tuning."""
    return {name: scheme for name, scheme in schemes.items() if is_exact(scheme)}


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
        target, start = search_scales(target, ones if importance is None else importance, tuned=False)
    return freeze(target, start)


def _in_fp8(
    working: WorkingBlock, schemes: Mapping[str, QuantScheme], steps: Steps, inputs: Tensor, recipe: Recipe, loss: Loss
) -> bool:
    """Whether the steps on ``inputs`` [S, T, H] are in FP8.

    "auto" has them so where that is faster and precise enough. Faster it is in compiled code, if many blocks share
    that: the last block's own loss would have a version of its own compiled, which takes longer than its steps.
    """
    if recipe.tuning_precision != "auto":
        return recipe.tuning_precision == "fp8"
    batch = recipe.batch_size
    possible = has_fp8(working.device) and fits_fp8(batch * inputs.shape[1]) and 2 * batch <= len(inputs)
    in_bf16 = next(working.module.parameters()).dtype == torch.bfloat16
    faster = working.compiled and loss is mean_squared_error
    return possible and in_bf16 and faster and fp8_suffices(working, schemes, steps, batch)


def _last_loss(steps: Steps, working: WorkingBlock, inputs: Tensor) -> float:
    """Of the last step, after a look at all of them."""
    losses: list[float] = steps.losses.tolist()
    for step, value in enumerate(losses):
        if not isfinite(value):
            culprit = first_non_finite(working.module, inputs[:1].to(working.device), working.arguments)
            raise NonFiniteError(f"{culprit} gives a value that is not finite; the loss of step {step} is {value}")
    return losses[-1]


def _gptq(name: str, target: Target, start: Rounding, statistics: InputStatistics) -> Tensor:
    try:
        return gptq(target, start, cast(Tensor, statistics.second_moments))
    except ValueError as error:
        raise NonFiniteError(f"{name}: {error}") from error


def _check_start(start: Verdict, working: WorkingBlock, inputs: Tensor) -> None:
    """A block that is not finite before tuning will not be after it, and its outputs must go nowhere."""
    if not isfinite(start.loss):
        working.advance(inputs.clone())  # names the layer
        raise NonFiniteError(f"the loss before tuning is {start.loss}")


@torch.no_grad()
def _starts(
    working: WorkingBlock,
    schemes: Mapping[str, QuantScheme],
    statistics: Mapping[str, InputStatistics],
    recipe: Recipe,
) -> dict[str, tuple[Target, Rounding]]:
    """Where each layer starts; those that vLLM fuses, and that have one weight type, share what is one a layer."""
    starts: dict[str, tuple[Target, Rounding]] = {}
    for group in fused_groups(schemes):
        for kind in dict.fromkeys(schemes[name].weights for name in group):
            names = [name for name in group if schemes[name].weights == kind]
            made = targets([working.wanted[name] for name in names], kind)
            for name, target in zip(names, made, strict=True):
                starts[name] = _start(target, statistics.get(name), recipe)
    return {name: starts[name] for name in schemes}


def _start(target: Target, statistics: InputStatistics | None, recipe: Recipe) -> tuple[Target, Rounding]:
    if not recipe.scale_search:
        return target, Rounding.nearest(target)
    seen = cast(InputStatistics, statistics)
    target, start = search_scales(target, seen.square_sum, tuned=recipe.iters > 0)
    # GPTQ is better on scales that suit each group by itself.
    if recipe.weighs_pairs and not recipe.gptq and descends(target.type):
        start = descend_scales(target, start, cast(Tensor, seen.second_moments))
    return target, start


def _search_input_scales(
    working: WorkingBlock,
    static: Sequence[QuantizedInput],
    inputs: Tensor,
    outputs: Tensor,
    real: Tensor | None,
    heldout: int,
    loss: Loss,
) -> None:
    """On as many samples as the chain takes at once, a shape that code is compiled for anyway; two at least."""
    samples = slice(min(max(len(token_parts(inputs)[0]), _LEAST_TRIED), len(inputs) - heldout))
    near, wanted = inputs[samples].to(working.device), outputs[samples].to(working.device)
    masks = None if real is None else real[samples]
    search_input_scales(static, lambda: sample_losses(working, near.clone(), wanted, masks, loss))


def _set_up(
    working: WorkingBlock,
    schemes: Mapping[str, QuantScheme],
    starts: Mapping[str, tuple[Target, Rounding]],
    static: Sequence[QuantizedInput],
    inputs: Tensor,
    outputs: Tensor,
    real: Tensor | None,
    recipe: Recipe,
    shape: tuple[int, int, int],
    loss: Loss,
) -> tuple[dict[str, LayerState], Steps]:
    """The layers at their start, and the steps that tune them; those of the last block if only values differ."""
    most_clip = MOST_CLIP if recipe.scale_search else 1.0

    def make() -> tuple[dict[str, LayerState], Steps]:
        modules = {name: cast(nn.Linear, working.module.get_submodule(name)) for name in schemes}
        layers = {name: LayerState(modules[name], *starts[name], recipe, most_clip) for name in schemes}
        states = list(layers.values())
        learned = learned_scales(static, recipe)
        return layers, Steps(working, states, inputs, outputs, real, loss, shape, learned)

    # What steps cannot be told again. They hold on to samples and loss, so no other can have the address of these.
    samples = (inputs.data_ptr(), inputs.shape, outputs.data_ptr(), None if real is None else real.data_ptr())
    key = (tuple(schemes.items()), samples, shape, recipe, loss)
    layers, steps = working.keep(key, make)
    for name, layer in layers.items():
        layer.load(*starts[name])
    return layers, steps


def _rates(recipe: Recipe, kind: WeightType) -> Tensor:
    """[steps, 3] float32: learning rates of offsets, in units, of clips, and of static scales of inputs."""
    rates = torch.tensor([recipe.learning_rate(step) for step in range(recipe.iters)], dtype=torch.float64)
    of_inputs = rates * recipe.input_scale_lr
    if isinstance(kind, Integer) and kind.bits >= FINE_BITS:
        rates = rates * recipe.fine_lr
    # Whole units of which the sum is right after every step, so that small rates at the end do not round to nothing.
    sums = (rates.cumsum(0) / OFFSET_UNIT).round()
    return torch.stack([sums.diff(prepend=sums.new_zeros(1)), rates * recipe.scale_lr, of_inputs], dim=1).float()


def sample_order(samples: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Sample numbers [steps, batches, B]; every sample comes once before any comes again."""
    needed = shape[0] * shape[1] * shape[2]
    rounds = [torch.randperm(samples, generator=generator) for _ in range(-(-needed // samples))]
    return torch.cat(rounds)[:needed].reshape(shape)
