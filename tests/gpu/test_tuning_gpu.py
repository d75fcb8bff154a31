"""Tuning on a GPU: a recorded step, samples in pinned memory and memory used again change nothing."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import Tensor

from calibrate import steps
from calibrate.activations import observe_inputs, quantized_inputs_of
from calibrate.blocks import capture_inputs, find_blocks
from calibrate.chain import advance, relative_distance
from calibrate.config import Recipe
from calibrate.tail import ModelTail
from calibrate.tuning import TunedBlock, mean_squared_error, tune_block
from calibrate.workbench import Workbench
from tests.calibrate.conftest import COMMON
from vllm_autoround.format.scheme import QuantScheme

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SAMPLES = torch.randint(2, 128, (16, 64), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(iters=30, batch_size=2, scale_lr=0.5, momentum=0.7, scale_search=True, kl_last_block=True)
SCHEMES = ["W3A16G32", "W4A16G64_ASYM", "W4A16G-1", "NVFP4", "MXFP4", "FP8", "FP8_BLOCK"]


def tune(
    scheme: str,
    *,
    pinned: bool = False,
    together: bool = True,
    kl: bool = False,
    attention: str = "eager",  # whose backward is deterministic
    recipe: Recipe = RECIPE,
    accumulate: int = 1,
) -> tuple[list[TunedBlock], list[float]]:
    """All blocks of a small model in turn, on one workbench or each on its own; results, and errors after each."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**COMMON, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).bfloat16().eval()
    blocks = find_blocks(model)
    captured = capture_inputs(model, blocks, SAMPLES, torch.bfloat16)
    place = Tensor.pin_memory if pinned else Tensor.cuda
    original, quantized = place(captured.hidden.clone()), place(captured.hidden.clone())
    bench, results, errors = Workbench(CUDA, torch.bfloat16), [], []
    for index, block in enumerate(blocks):
        working = (bench if together else Workbench(CUDA, torch.bfloat16)).load(block, captured.arguments[index])
        advance(working.module, original, working.arguments)
        schemes = dict.fromkeys(block.linears(), QuantScheme.parse(scheme))
        statistics = observe_inputs(working.module, schemes, quantized, working.arguments)
        loss = ModelTail(model, blocks, CUDA, torch.bfloat16).divergence if kl else mean_squared_error
        with working.quantized_inputs(quantized_inputs_of(schemes, statistics)):
            results.append(
                tune_block(
                    working,
                    schemes,
                    quantized,
                    original,
                    recipe=recipe,
                    statistics=statistics,
                    accumulate=accumulate,
                    generator=torch.Generator().manual_seed(index),
                    on_step=lambda: None,
                    loss=loss,
                )
            )
            advance(working.module, quantized, working.arguments)
        errors.append(relative_distance(quantized, original))
    return results, errors


def assert_same(left: list[TunedBlock], right: list[TunedBlock]) -> None:
    for block, (mine, other) in enumerate(zip(left, right, strict=True)):
        for name, weight in mine.weights.items():
            assert torch.equal(weight.codes.float(), other.weights[name].codes.float()), (block, name)
            assert torch.equal(weight.scale.float(), other.weights[name].scale.float()), (block, name)
        assert mine.final_loss == pytest.approx(other.final_loss, rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_recorded_step_used_by_all_blocks_equals_eager_steps_of_each(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, errors = tune(scheme)
    monkeypatch.setattr(steps, "GRAPHED", False)
    eager, _ = tune(scheme, together=False)
    assert_same(recorded, eager)
    assert errors[0] < 0.95 * recorded[0].start_error


def test_one_graph_serves_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[int] = []
    record = steps.Steps._record
    monkeypatch.setattr(steps.Steps, "_record", lambda self: records.append(1) or record(self))
    tune("W4A16G32")
    assert len(records) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_samples_in_pinned_memory_give_the_same(accumulate: int) -> None:
    near, errors = tune("W3A16G32", accumulate=accumulate)
    far, far_errors = tune("W3A16G32", accumulate=accumulate, pinned=True)
    assert_same(near, far)
    assert errors == pytest.approx(far_errors, rel=1e-3)


def test_divergence_of_the_logits_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, _ = tune("W3A16G32", kl=True)
    monkeypatch.setattr(steps, "GRAPHED", False)
    eager, _ = tune("W3A16G32", kl=True, together=False)
    assert_same(recorded, eager)


@pytest.mark.parametrize("scheme", ["W3A16G32", "NVFP4"])
def test_a_compiled_block_tunes_as_well(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, errors = tune(scheme, attention="sdpa")
    monkeypatch.setattr(steps, "COMPILED", True)
    _, compiled = tune(scheme, attention="sdpa")
    assert compiled == pytest.approx(errors, rel=0.1)
