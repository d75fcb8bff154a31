"""Tuning on a GPU: activations in pinned host memory give what activations on the device give."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from calibrate.blocks import Block, capture_inputs, find_blocks, move_arguments, to_device
from calibrate.config import Recipe
from calibrate.tuning import advance, relative_distance, tune_block
from tests.calibrate.conftest import COMMON, make_model
from vllm_autoround.format.scheme import QuantScheme

pytestmark = pytest.mark.gpu
SAMPLES = torch.randint(2, 128, (16, 64), generator=torch.Generator().manual_seed(1))


def tune(*, pinned: bool) -> tuple[dict[str, torch.Tensor], float]:
    model, device = make_model(tf.LlamaConfig(**COMMON)).bfloat16(), torch.device("cuda")
    block: Block = find_blocks(model)[0]
    captured = capture_inputs(model, find_blocks(model), SAMPLES, torch.bfloat16)
    arguments = move_arguments(captured.arguments[0], device)
    module = to_device(block, device, torch.bfloat16)
    inputs, targets = (captured.hidden.clone().pin_memory() if pinned else captured.hidden.to(device) for _ in range(2))
    advance(module, targets, arguments)
    tuned = tune_block(
        module,
        block.module,
        dict.fromkeys(block.linears(), QuantScheme(bits=3, group_size=32)),
        inputs,
        targets,
        arguments,
        recipe=Recipe(iters=30, batch_size=8, seqlen=64, nsamples=16, lr=None),
        accumulate=1,
        generator=torch.Generator().manual_seed(0),
        on_step=lambda: None,
    )
    advance(module, inputs, arguments)
    return {name: weight.codes.cpu() for name, weight in tuned.weights.items()}, relative_distance(inputs, targets)


def test_pinned_activations_give_the_same_codes() -> None:
    on_device, error = tune(pinned=False)
    from_host, host_error = tune(pinned=True)
    assert error == pytest.approx(host_error, rel=1e-3)
    for name, codes in on_device.items():
        assert torch.equal(codes, from_host[name]), name
