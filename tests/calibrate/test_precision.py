"""FP8 is taken where it adds less error to the gradient than the choice of samples does."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from calibrate import fp8_matmul
from calibrate.blocks import capture_inputs, find_blocks
from calibrate.precision import fp8_suffices
from calibrate.tuning import mean_squared_error
from calibrate.workbench import WorkingBlock
from tests.calibrate.conftest import COMMON, make_model

SAMPLES = torch.randint(2, 128, (2, 32), generator=torch.Generator().manual_seed(1))


def suffices(samples: torch.Tensor = SAMPLES) -> bool:
    model = make_model(tf.LlamaConfig(**COMMON)).bfloat16()
    block = find_blocks(model)[0]
    hidden, arguments = capture_inputs(model, find_blocks(model), samples, torch.bfloat16)
    working = WorkingBlock(block, arguments[0], torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        outputs = working.run(hidden)
        for name in block.linears():
            weight = working.module.get_submodule(name).weight
            weight.copy_((weight * 16).round() / 16)
    return fp8_suffices(working, list(block.linears()), hidden, outputs, mean_squared_error)


def test_it_suffices_between_samples_that_differ() -> None:
    assert suffices()


def test_not_between_samples_that_are_the_same() -> None:
    assert not suffices(SAMPLES[:1].expand(2, -1))


def test_not_where_it_loses_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_matmul, "_HIGHEST", 2.0**-12)  # everything becomes 0
    assert not suffices()
