"""Blocks that are fetched to the device, or into pinned memory, before it is their turn."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from calibrate.blocks import Block, BlockInputs, capture_inputs, find_blocks
from calibrate.partial import _on_host
from calibrate.workbench import Workbench, WorkingBlock, _tensors
from tests.calibrate.conftest import COMMON, make_model

pytestmark = pytest.mark.gpu
SAMPLES = torch.randint(2, 128, (2, 64), generator=torch.Generator().manual_seed(1))
GPU = torch.device("cuda")


def blocks_and_inputs() -> tuple[list[Block], BlockInputs]:
    model = make_model(tf.LlamaConfig(**COMMON)).bfloat16()
    return find_blocks(model), capture_inputs(model, find_blocks(model), SAMPLES, torch.bfloat16)


@pytest.mark.parametrize("room", [True, False])
def test_a_fetched_block_is_that_block(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workbench, "_has_room", lambda self, size: room)
    blocks, captured = blocks_and_inputs()
    bench = Workbench(GPU, torch.bfloat16, compile=False)
    bench.load(blocks[0], captured.arguments[0])
    for index in (1, 2):  # the second time into the same memory
        bench.fetch(blocks[index])
        assert bench._fetched is not None
        assert all(tensor.is_cuda if room else tensor.is_pinned() for tensor in bench._fetched[1].values())
        working = bench.load(blocks[index], captured.arguments[index])
        assert bench._fetched is None
        fresh = WorkingBlock(blocks[index], captured.arguments[index], GPU, torch.bfloat16)
        for (name, mine), (_, expected) in zip(_tensors(working.module), _tensors(fresh.module), strict=True):
            assert torch.equal(mine, expected), name
        assert all(torch.equal(working.wanted[name], fresh.wanted[name]) for name in fresh.wanted)


def test_a_block_that_is_fetched_too_late_is_forgotten() -> None:
    blocks, captured = blocks_and_inputs()
    bench = Workbench(GPU, torch.bfloat16, compile=False)
    bench.load(blocks[1], captured.arguments[1])
    bench.fetch(blocks[1])
    assert bench._fetched is None


@pytest.mark.parametrize("tensor", [torch.arange(6.0).reshape(2, 3), torch.tensor(3.0), torch.empty(0, 4)])
def test_what_is_written_comes_by_way_of_pinned_memory(tensor: torch.Tensor) -> None:
    for there in (tensor.to(GPU), tensor.to(GPU).t().contiguous().t() if tensor.ndim == 2 else tensor.to(GPU)):
        here = _on_host(there)
        assert here.is_contiguous()
        assert here.is_pinned() or not here.numel()
        assert torch.equal(here, tensor)
