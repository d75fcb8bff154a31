"""Divergence from the original, against its definition."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch.distributions import Categorical, kl_divergence

from benchmarks.evaluation import divergence
from tests.calibrate.conftest import COMMON, make_model


@pytest.fixture(scope="module")
def original() -> tf.PreTrainedModel:
    return make_model(tf.LlamaConfig(**COMMON))


def test_a_model_does_not_diverge_from_itself(original: tf.PreTrainedModel) -> None:
    assert divergence(original, original, torch.arange(50).reshape(10, 5)) == 0.0


def test_divergence_is_from_the_original_to_the_model(original: tf.PreTrainedModel) -> None:
    windows = torch.arange(50).reshape(10, 5)  # two parts of the batch that is used
    model = copy.deepcopy(original)
    model.lm_head.weight.data[:25] *= 20
    with torch.no_grad():
        theirs, mine = (Categorical(logits=net(windows).logits) for net in (original, model))
    expected = kl_divergence(theirs, mine).mean().item()
    other_way = kl_divergence(mine, theirs).mean().item()
    assert abs(expected / other_way - 1) > 0.05  # or a mix-up would not show
    assert divergence(model, original, windows) == pytest.approx(expected, rel=1e-5)
