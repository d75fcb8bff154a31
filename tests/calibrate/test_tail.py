"""The model after its blocks: the same logits as the model's, and the divergence that the last block is tuned on."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

from calibrate import tail as tail_module
from calibrate.blocks import capture_inputs, find_blocks, run_block
from calibrate.tail import ModelTail
from tests.calibrate.conftest import COMMON, make_model

SAMPLES = torch.randint(0, 128, (3, 24), generator=torch.Generator().manual_seed(1))


def tail_of(model: tf.PreTrainedModel) -> ModelTail:
    return ModelTail(model, find_blocks(model), torch.device("cpu"), torch.float32)


@torch.no_grad()
def test_the_logits_are_those_of_the_model(family_model: tf.PreTrainedModel) -> None:
    blocks = find_blocks(family_model)
    hidden, arguments = capture_inputs(family_model, blocks, SAMPLES, torch.float32)
    for block, kwargs in zip(blocks, arguments, strict=True):
        hidden = run_block(block.module, hidden, kwargs)
    tail = tail_of(family_model)
    for sample, states in zip(SAMPLES, hidden, strict=True):
        torch.testing.assert_close(tail.logits(states[None]), family_model(sample[None]).logits[0])


def test_the_model_is_left_as_it_was(family_model: tf.PreTrainedModel) -> None:
    before = {name: id(module) for name, module in family_model.named_modules()}
    tail = tail_of(family_model)
    assert {name: id(module) for name, module in family_model.named_modules()} == before
    inside = {id(p) for block in find_blocks(family_model) for p in block.module.parameters()}
    assert not inside & {id(p) for p in tail.model.parameters()}
    blocks = sum(p.numel() for block in find_blocks(family_model) for p in block.module.parameters())
    whole = sum(p.numel() for p in family_model.parameters())
    assert sum(p.numel() for p in tail.model.parameters()) == whole - blocks


ROPE = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic"}, LONG], ids=["dynamic", "longrope"])
def test_nothing_is_asked_of_the_device(rope: dict[str, Any]) -> None:
    """A number read back would stall every step, and cannot be part of a CUDA graph."""
    model = make_model(tf.LlamaConfig(**COMMON, rope_parameters=ROPE | rope))
    target, output = torch.randn(2, 1, 24, 64)
    with NoReadBack():
        tail_of(model).divergence(output.requires_grad_(True), target).backward()
    with pytest.raises(AssertionError, match="read back"), NoReadBack():
        model(SAMPLES)  # as a model with such embeddings does


class NoReadBack(TorchDispatchMode):
    """Fails where Python is given the value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "read back"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("logits_at_once", [1 << 26, 128 * 5])
def test_divergence_and_its_gradient(
    family_model: tf.PreTrainedModel, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_module, "_LOGITS", logits_at_once)  # the second cuts the tokens into unequal parts
    tail = tail_of(family_model)
    target = torch.randn(2, 24, 64)
    output = (target + 0.1 * torch.randn(2, 24, 64)).requires_grad_(True)
    loss = tail.divergence(output, target)
    theirs = torch.cat([tail.logits(sample[None]).log_softmax(-1) for sample in target])
    mine = torch.cat([tail.logits(sample[None]).log_softmax(-1) for sample in output])
    expected = F.kl_div(mine, theirs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, output), torch.autograd.grad(expected, output))
    assert tail.divergence(target, target).abs() < 1e-6

    real = torch.arange(24) < torch.tensor([[9], [24]])
    counted = F.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1)[real.flatten()].mean()
    torch.testing.assert_close(tail.divergence(output, target, real), counted)
