"""Tuning on a GPU: a recorded step, samples in pinned memory and memory used again change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean

import pytest
import torch
import transformers as tf

from calibrate import steps
from calibrate.blocks import Block
from calibrate.config import Recipe
from tests.calibrate.blocks_in_turn import Schemes, Tuned, assert_same, everywhere, tune_in_turn
from tests.calibrate.conftest import COMMON, make_model
from vllm_autoround.format.scheme import QuantScheme

pytestmark = pytest.mark.gpu
SAMPLES = torch.randint(2, 128, (16, 64), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(iters=30, lr=0.02, batch_size=2, scale_lr=0.5, momentum=0.7, scale_search=True)
RECORDED = ["W3A16G32", "W4A16G64_ASYM", "W4A16G-1", "NVFP4", "MXFP4", "FP8_STATIC"]
EAGER = ["FP8", "FP8_BLOCK"]  # a scale is shared by several rows, for which the kernel was not made


def tune(
    schemes: str | Schemes,
    *,
    attention: str = "eager",  # whose backward is deterministic
    recipe: Recipe = RECIPE,
    pinned: bool = False,
    together: bool = True,
    accumulate: int = 1,
    compile: bool = False,
) -> Tuned:
    config = tf.LlamaConfig(**{**COMMON, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    config._attn_implementation = attention
    return tune_in_turn(
        make_model(config).bfloat16(),
        SAMPLES,
        everywhere(schemes) if isinstance(schemes, str) else schemes,
        recipe,
        device="cuda",
        dtype=torch.bfloat16,
        together=together,
        pinned=pinned,
        accumulate=accumulate,
        compile=compile,
    )


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[steps.Steps]]:
    """Whose steps were recorded."""
    recorded: list[steps.Steps] = []
    record = steps.Steps._record
    monkeypatch.setattr(steps.Steps, "_record", lambda self: recorded.append(self) or record(self))
    yield recorded
    recorded.clear()  # graphs hold memory


@pytest.mark.parametrize("scheme", RECORDED)
def test_a_recorded_step_used_by_all_blocks_equals_eager_steps_of_each(
    scheme: str, recordings: list[steps.Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = tune(scheme)
    assert len(recordings) == 1
    monkeypatch.setattr(steps, "GRAPHED", False)
    assert_same(recorded, tune(scheme, together=False))
    assert len(recordings) == 1
    assert recorded.errors[0] < 0.97 * recorded.blocks[0].start.error


@pytest.mark.parametrize("compile", [False, True])
def test_static_scales_that_steps_learn_are_recorded_with_them(
    compile: bool, recordings: list[steps.Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, scale_search=False, input_scale_lr=1.0)
    recorded = tune("FP8_STATIC", recipe=recipe, compile=compile)
    assert [len(made._scales) for made in recordings] == [4]
    monkeypatch.setattr(steps, "GRAPHED", False)
    assert_same(recorded, tune("FP8_STATIC", recipe=recipe, compile=compile, together=False))
    unlearned = tune("FP8_STATIC", recipe=replace(recipe, input_scale_lr=0.0), compile=compile)
    assert unlearned.errors != pytest.approx(recorded.errors, rel=1e-4)


@pytest.mark.parametrize("scheme", EAGER)
def test_steps_without_a_kernel_are_not_recorded_and_memory_used_again_changes_nothing(
    scheme: str, recordings: list[steps.Steps]
) -> None:
    together = tune(scheme)
    assert_same(together, tune(scheme, together=False))
    assert not recordings
    # A block whose error is next to nothing may well keep its start.
    assert any(layer.moved > 0 for block in together.blocks for layer in block.layers.values())


def test_one_layer_without_a_kernel_keeps_its_block_from_being_recorded(recordings: list[steps.Steps]) -> None:
    def mixed(index: int, block: Block) -> dict[str, QuantScheme]:
        schemes = dict.fromkeys(block.linears(), QuantScheme.parse("W4A16G32"))
        return schemes | ({"mlp.down_proj": QuantScheme.parse("FP8_BLOCK")} if index == 1 else {})

    together = tune(mixed)
    assert len(recordings) == 2  # before and after the block in the middle
    assert_same(together, tune(mixed, together=False))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_samples_in_pinned_memory_give_the_same(accumulate: int) -> None:
    near = tune("W3A16G32", accumulate=accumulate)
    far = tune("W3A16G32", accumulate=accumulate, pinned=True)
    assert_same(near, far)


def test_divergence_of_the_logits_can_be_recorded(
    recordings: list[steps.Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, kl_last_block=True)
    recorded = tune("W3A16G32", recipe=recipe)
    assert len(recordings) == 2  # the last block has a graph of its own
    monkeypatch.setattr(steps, "GRAPHED", False)
    assert_same(recorded, tune("W3A16G32", recipe=recipe, together=False))


@pytest.mark.parametrize("scheme", ["W3A16G32", "NVFP4", "FP8_STATIC"])
def test_a_compiled_block_tunes_as_well(scheme: str) -> None:
    errors = tune(scheme, attention="sdpa").errors
    assert tune(scheme, attention="sdpa", compile=True).errors == pytest.approx(errors, rel=0.1)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("scheme", ["W3A16G32", "NVFP4", "MXFP4"])
def test_matrix_products_in_fp8_tune_as_well(scheme: str, compile: bool) -> None:
    errors = tune(scheme, attention="sdpa").errors
    recipe = replace(RECIPE, tuning_precision="fp8")
    in_fp8 = tune(scheme, attention="sdpa", recipe=recipe, compile=compile)
    # In the mean of the blocks: of one, single runs differ by as much.
    assert mean(mine / theirs for mine, theirs in zip(in_fp8.errors, errors, strict=True)) < 1.1
    assert all(block.in_fp8 for block in in_fp8.blocks)
    assert in_fp8.errors != errors


def test_dither_goes_on_from_step_to_step_of_a_recording(
    recordings: list[steps.Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, tuning_precision="fp8")
    recorded = tune("W4A16G32", recipe=recipe)
    assert len(recordings) == 1
    monkeypatch.setattr(steps, "GRAPHED", False)
    assert_same(recorded, tune("W4A16G32", recipe=recipe, together=False))


def test_auto_asks_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, tuning_precision="auto")
    assert not any(block.in_fp8 for block in tune("W3A16G32", recipe=recipe).blocks)  # not compiled
    tuned = tune("W3A16G32", attention="sdpa", recipe=recipe, compile=True)
    assert all(block.in_fp8 for block in tuned.blocks)
    answers = iter([True, False, True])
    monkeypatch.setattr("calibrate.tuning.fp8_suffices", lambda *_: next(answers))
    tuned = tune("W3A16G32", attention="sdpa", recipe=recipe, compile=True)
    assert [block.in_fp8 for block in tuned.blocks] == [True, False, True]
    assert tuned.errors == pytest.approx(tune("W3A16G32", attention="sdpa").errors, rel=0.1)
