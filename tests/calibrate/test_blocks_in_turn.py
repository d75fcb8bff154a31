"""Blocks tuned one after the other in the same memory: each gets what it gets in memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from calibrate import tuning, workbench
from calibrate.blocks import Block
from calibrate.config import Recipe
from calibrate.steps import Steps
from tests.calibrate.blocks_in_turn import Schemes, assert_same, everywhere, tune_in_turn
from tests.calibrate.conftest import COMMON, FAMILIES, make_model
from vllm_autoround.format.scheme import QuantScheme

SAMPLES = torch.randint(2, 128, (8, 24), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(iters=6, lr=0.02, batch_size=2, scale_lr=0.5, momentum=0.7, scale_search=True)


class Counted:
    """How often each class was made."""

    def __init__(self) -> None:
        self.blocks = self.steps = 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()

    class CountedBlock(workbench.WorkingBlock):
        def __init__(self, *args: object, **settings: object) -> None:
            counted.blocks += 1
            super().__init__(*args, **settings)

    class CountedSteps(Steps):
        def __init__(self, *args: object, **settings: object) -> None:
            counted.steps += 1
            super().__init__(*args, **settings)

    monkeypatch.setattr(workbench, "WorkingBlock", CountedBlock)
    monkeypatch.setattr(tuning, "Steps", CountedSteps)
    return counted


def check(
    made: Counted,
    make: Callable[[], tf.PreTrainedModel],
    schemes: Schemes,
    recipe: Recipe = RECIPE,
    *,
    blocks: int = 1,
    steps: int = 1,
    **samples: Any,
) -> None:
    """Both ways of tuning agree, and the shared one made so many working blocks and so many steps."""
    together = tune_in_turn(make(), SAMPLES, schemes, recipe, **samples)
    assert (made.blocks, made.steps) == (blocks, steps)
    assert_same(together, tune_in_turn(make(), SAMPLES, schemes, recipe, together=False, **samples))
    assert made.blocks - blocks == 3
    assert any(layer.moved > 0 for layer in together.blocks[2].layers.values())


def llama(dtype: torch.dtype = torch.bfloat16, **changes: int) -> Callable[[], tf.PreTrainedModel]:
    return lambda: make_model(tf.LlamaConfig(**{**COMMON, **changes})).to(dtype)


@pytest.mark.parametrize(
    "scheme", ["W3A16G32", "W2A16G16_ASYM", "W4A16G-1", "NVFP4", "MXFP4", "FP8", "FP8_STATIC", "FP8_BLOCK"]
)
def test_every_kind_of_scheme(scheme: str, made: Counted) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # for tiles of 128
    check(made, llama(**wide), everywhere(scheme))


def test_layers_that_are_exact_in_fp8_among_others_that_are_not(made: Counted) -> None:
    """And one that is in some blocks only: what is kept for a layer by name must not be mixed up."""

    def mixed(index: int, block: Block) -> dict[str, QuantScheme]:
        odd = {"mlp.up_proj": QuantScheme.parse("W4A16G32")}
        return everywhere("MXFP4")(index, block) | odd | ({"mlp.down_proj": odd["mlp.up_proj"]} if index == 1 else {})

    plain = replace(RECIPE, iters=3)
    in_fp8 = replace(plain, tuning_precision="fp8")
    check(made, llama(), mixed, in_fp8, dtype=torch.bfloat16, steps=3)
    rounded, exact = (
        tune_in_turn(llama()(), SAMPLES, mixed, recipe, dtype=torch.bfloat16) for recipe in (in_fp8, plain)
    )
    assert rounded.errors == pytest.approx(exact.errors, rel=0.05)
    assert rounded.errors != exact.errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["W4A16G32_ASYM", "NVFP4"])
def test_models_of_another_dtype_than_they_are_computed_in_and_of_the_same(
    dtype: torch.dtype, scheme: str, made: Counted
) -> None:
    check(made, llama(dtype), everywhere(scheme))


@pytest.mark.parametrize("iters", [0, 6])
def test_schemes_that_change_from_block_to_block_and_within_one(iters: int, made: Counted) -> None:
    def mixed(index: int, block: Block) -> dict[str, QuantScheme]:
        schemes = dict.fromkeys(block.linears(), QuantScheme.parse("W4A16G32"))
        if index == 1:
            schemes |= dict.fromkeys(("self_attn.q_proj", "mlp.up_proj"), QuantScheme.parse("NVFP4"))
            del schemes["mlp.down_proj"]
        return schemes

    model, recipe = llama(), replace(RECIPE, iters=iters)
    together = tune_in_turn(model(), SAMPLES, mixed, recipe)
    assert (made.blocks, made.steps) == (1, 3)
    assert_same(together, tune_in_turn(model(), SAMPLES, mixed, recipe, together=False))


def test_a_block_without_schemes_between_others(made: Counted) -> None:
    check(made, llama(), lambda index, block: {} if index == 1 else everywhere("W3A16G32")(index, block))


def test_static_inputs_before_and_after_dynamic_ones(made: Counted) -> None:
    names = ["FP8_STATIC", "FP8_DYNAMIC", "FP8_STATIC"]
    check(made, llama(), lambda index, block: everywhere(names[index])(index, block), steps=3)


def test_the_loss_of_the_last_block(made: Counted) -> None:
    recipe = replace(RECIPE, kl_last_block=True)
    check(made, llama(), everywhere("W3A16G32"), recipe, steps=2)
    with_divergence, without = (tune_in_turn(llama()(), SAMPLES, everywhere("W3A16G32"), r) for r in (recipe, RECIPE))
    assert with_divergence.blocks[1].final_loss == without.blocks[1].final_loss
    assert with_divergence.blocks[2].final_loss != without.blocks[2].final_loss


@pytest.mark.parametrize(
    "recipe", [replace(RECIPE, optimizer="adamw"), replace(RECIPE, iters=0, gptq=True)], ids=["adamw", "gptq"]
)
def test_other_ways_to_round(recipe: Recipe, made: Counted) -> None:
    check(made, llama(), everywhere("W3A16G32"), recipe)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_padded_and_held_out_samples(accumulate: int, made: Counted) -> None:
    lengths = torch.tensor([24, 3, 17, 24, 9, 20, 5, 12])[: len(SAMPLES), None]
    padded = {"real": torch.arange(SAMPLES.shape[1]) < lengths, "heldout": 2, "accumulate": accumulate}
    check(made, llama(), everywhere("W3A16G32"), **padded)


def test_a_block_that_keeps_its_start_leaves_nothing_to_the_next() -> None:
    # Of a type whose scales do not descend, so that the start is the same with steps and without.
    wild = replace(RECIPE, lr=1.0, iters=3)
    rounded = tune_in_turn(llama()(), SAMPLES, everywhere("MXFP4A16"), replace(wild, iters=0), heldout=2)
    kept = tune_in_turn(llama()(), SAMPLES, everywhere("MXFP4A16"), wild, heldout=2)
    assert all(block.kept_start for block in kept.blocks)
    assert kept.errors == pytest.approx(rounded.errors)
    for mine, other in zip(kept.blocks, rounded.blocks, strict=True):
        assert all(torch.equal(weight.codes, other.weights[name].codes) for name, weight in mine.weights.items())


@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_blocks_that_attend_differently_and_layers_with_biases(family: str, made: Counted) -> None:
    makes = 2 if family == "gemma2" else 1
    check(
        made,
        lambda: make_model(FAMILIES[family]()).bfloat16(),
        everywhere("W3A16G32"),
        blocks=makes,
        steps=makes,
    )


def test_blocks_of_different_shapes(made: Counted) -> None:
    def make() -> tf.PreTrainedModel:
        model = make_model(tf.LlamaConfig(**COMMON))
        mlp = model.model.layers[1].mlp
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
            nn.Linear(*shape, bias=False) for shape in ((64, 32), (64, 32), (32, 64))
        )
        return model.bfloat16()

    check(made, make, everywhere("W3A16G32"), blocks=2, steps=2)


def test_more_makes_than_are_remembered(made: Counted) -> None:
    def make() -> tf.PreTrainedModel:
        torch.manual_seed(0)
        model = make_model(tf.LlamaConfig(**{**COMMON, "num_hidden_layers": 5}))
        for index, width in ((1, 32), (2, 64)):
            mlp = model.model.layers[index].mlp
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
                nn.Linear(*shape, bias=False) for shape in ((64, width), (64, width), (width, 64))
            )
        return model.bfloat16()

    together = tune_in_turn(make(), SAMPLES, everywhere("W3A16G32"), RECIPE)
    assert made.blocks == 4  # the first make was forgotten when the third came
    assert_same(together, tune_in_turn(make(), SAMPLES, everywhere("W3A16G32"), RECIPE, together=False))
