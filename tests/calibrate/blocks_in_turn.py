"""The blocks of a model tuned in turn, as the pipeline does it: shared by the tests on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from torch import Tensor

from calibrate.activations import observe_inputs, quantized_inputs_of
from calibrate.blocks import Block, capture_inputs, find_blocks
from calibrate.chain import relative_distance
from calibrate.clock import Clock
from calibrate.config import Recipe
from calibrate.tail import ModelTail
from calibrate.tuning import TunedBlock, forward_in_fp8, tune_block
from calibrate.verdict import mean_squared_error
from calibrate.workbench import Workbench
from vllm_autoround.format.scheme import QuantScheme

Schemes = Callable[[int, Block], Mapping[str, QuantScheme]]  # number and block -> layer name -> scheme


@dataclass(frozen=True)
class Tuned:
    """What came of each block, and the error of the chain's output after it."""

    blocks: list[TunedBlock]
    errors: list[float]


def everywhere(name: str) -> Schemes:
    return lambda _, block: dict.fromkeys(block.linears(), QuantScheme.parse(name))


def tune_in_turn(
    model: tf.PreTrainedModel,
    samples: Tensor,
    schemes_of: Schemes,
    recipe: Recipe,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    together: bool = True,
    pinned: bool = False,
    accumulate: int = 1,
    compile: bool = False,
    heldout: int = 0,
    real: Tensor | None = None,
) -> Tuned:
    """Tune every block: on one workbench, or each on one of its own."""
    place, blocks = torch.device(device), find_blocks(model)
    captured = capture_inputs(model, blocks, samples, dtype)
    original, quantized = (
        captured.hidden.clone().pin_memory() if pinned else captured.hidden.to(place, copy=True) for _ in range(2)
    )
    shared, results, errors = Workbench(place, dtype, compile=compile), [], []
    for index, block in enumerate(blocks):
        bench = shared if together else Workbench(place, dtype, compile=compile)
        working = bench.load(block, captured.arguments[index])
        working.advance(original)
        schemes = schemes_of(index, block)
        statistics = observe_inputs(
            working.module, schemes, quantized, working.arguments, real=real, second_moments=recipe.weighs_pairs
        )
        last = index == len(blocks) - 1
        divergence = last and recipe.kl_last_block
        with working.quantized_inputs(quantized_inputs_of(schemes, statistics)):
            tuned = tune_block(
                working,
                schemes,
                quantized,
                original,
                real=real,
                recipe=recipe,
                statistics=statistics,
                heldout=heldout,
                accumulate=accumulate,
                generator=torch.Generator().manual_seed(index),
                on_step=lambda: None,
                clock=Clock(place),
                loss=ModelTail(model, blocks, place, dtype).divergence if divergence else mean_squared_error,
            )
            with working.fp8_matmuls(forward_in_fp8(schemes) if tuned.in_fp8 else {}):
                working.advance(quantized)
        results.append(tuned)
        errors.append(relative_distance(quantized, original))
    return Tuned(results, errors)


def assert_same(left: Tuned, right: Tuned) -> None:
    """Every tensor of both, bit for bit; losses may be summed in another order."""
    for index, (mine, other) in enumerate(zip(left.blocks, right.blocks, strict=True)):
        assert mine.weights.keys() == other.weights.keys()
        for name, weight in mine.weights.items():
            for part in ("codes", "scale", "zero_point", "global_scale"):
                got, expected = getattr(weight, part), getattr(other.weights[name], part)
                assert (got is None) is (expected is None), (index, name, part)
                assert got is None or torch.equal(got.float(), expected.float()), (index, name, part)
        assert (mine.final_loss is None) is (other.final_loss is None)
        assert mine.final_loss is None or mine.final_loss == pytest.approx(other.final_loss, rel=1e-5)
        assert mine.layers == other.layers
    assert left.errors == pytest.approx(right.errors, rel=1e-3)
