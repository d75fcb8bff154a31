"""Divergence from the original, against its definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.evaluation import divergence


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_a_model_does_not_diverge_from_itself(original: LlamaForCausalLM) -> None:
    assert divergence(original, original, torch.arange(50).reshape(10, 5)) == 0.0


def test_divergence_is_from_the_original_to_the_model(original: LlamaForCausalLM) -> None:
    windows = torch.arange(50).reshape(10, 5)  # two parts of the batch that is used
    model = copy.deepcopy(original)
    model.lm_head.weight.data[:25] *= 1.5
    with torch.no_grad():
        theirs, mine = (Categorical(logits=net(windows).logits) for net in (original, model))
    expected = kl_divergence(theirs, mine).mean().item()
    other_way = kl_divergence(mine, theirs).mean().item()
    assert abs(expected / other_way - 1) > 0.05  # or a mix-up would not show
    assert divergence(model, original, windows) == pytest.approx(expected, rel=1e-5)
