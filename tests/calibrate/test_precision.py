"""FP8 is taken where it turns fewer signs of the gradient than the choice of samples does."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from calibrate import fp8_matmul
from calibrate.blocks import capture_inputs, find_blocks
from calibrate.config import Recipe
from calibrate.layer_state import LayerState
from calibrate.precision import fp8_suffices
from calibrate.rounding import Rounding, targets
from calibrate.steps import Steps
from calibrate.verdict import mean_squared_error
from calibrate.workbench import WorkingBlock
from tests.calibrate.conftest import COMMON, make_model
from vllm_autoround.format.scheme import QuantScheme

SAMPLES = torch.randint(2, 128, (2, 32), generator=torch.Generator().manual_seed(1))
MANY = torch.randint(2, 128, (16, 64), generator=torch.Generator().manual_seed(1))


def suffices(
    samples: torch.Tensor = SAMPLES, outlier: float = 1.0, real: torch.Tensor | None = None, batch: int = 1
) -> bool:
    model = make_model(tf.LlamaConfig(**COMMON)).bfloat16()
    block = find_blocks(model)[0]
    with torch.no_grad():
        block.module.input_layernorm.weight[3] *= outlier
        for name in ("q_proj", "k_proj", "v_proj"):
            block.module.get_submodule(f"self_attn.{name}").weight[:, 3] /= outlier
    hidden, arguments = capture_inputs(model, find_blocks(model), samples, torch.bfloat16)
    working = WorkingBlock(block, arguments[0], torch.device("cpu"), torch.bfloat16)
    working.module.requires_grad_(False)
    with torch.no_grad():
        outputs = working.run(hidden)
    layers, scheme = [], QuantScheme.parse("W4A16G32")
    for name in block.linears():
        [target] = targets([working.wanted[name]], scheme.weights)
        recipe = Recipe(iters=1, batch_size=batch)
        layers.append(LayerState(working.module.get_submodule(name), target, Rounding.nearest(target), recipe, 1.0))
        layers[-1].restart()
    steps = Steps(working, layers, hidden, outputs, real, mean_squared_error, (1, 1, batch))
    return fp8_suffices(working, dict.fromkeys(block.linears(), scheme), steps, batch)


def test_it_suffices_between_samples_that_differ() -> None:
    assert suffices()
    assert suffices(outlier=256.0)


def test_not_between_samples_that_are_the_same() -> None:
    assert not suffices(SAMPLES[:1].expand(2, -1))


def test_not_where_an_outlier_leaves_nothing_of_all_else() -> None:
    assert not suffices(outlier=2.0**20)


def test_whole_batches_are_compared() -> None:
    """What an outlier leaves of a sample's gradient can be enough for that one, and too little for a batch of eight."""
    assert suffices(MANY, outlier=2.0**17)
    assert not suffices(MANY, outlier=2.0**17, batch=8)


def test_not_where_it_loses_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_matmul, "_HIGHEST", 2.0**-12)  # everything becomes 0
    assert not suffices()


def test_padding_has_no_say() -> None:
    """The samples differ in tokens that do not count only, after those that do."""
    samples = SAMPLES[:1].repeat(2, 1)
    samples[1, 16:] = 1
    assert suffices(samples)
    assert not suffices(samples, real=(torch.arange(32) < 16).expand(2, -1))
