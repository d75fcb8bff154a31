"""Blocks of one make share a module and memory; others do not."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch

from calibrate.activations import QuantizedInput
from calibrate.blocks import capture_inputs, find_blocks, run_block
from calibrate.workbench import Workbench, WorkingBlock, _make_of_arguments, _make_of_module
from tests.calibrate.conftest import FAMILIES, make_model
from vllm_autoround.format import activations

SAMPLES = torch.randint(2, 128, (2, 24), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_of_one_make_unless_they_attend_differently(family: str) -> None:
    model = make_model(FAMILIES[family]())
    blocks = find_blocks(model)
    captured = capture_inputs(model, blocks, SAMPLES, torch.float32)
    makes = [
        (_make_of_module(block.module), _make_of_arguments(arguments))
        for block, arguments in zip(blocks, captured.arguments, strict=True)
    ]
    assert makes[0] == makes[2]
    assert (makes[0] == makes[1]) is not family.startswith(("gemma2", "gemma3"))
    assert len({hash(make) for make in makes}) <= 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize(
    ("dtype", "compute"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str
)
def test_a_block_loaded_into_anothers_module_is_that_block(
    family: str, dtype: torch.dtype, compute: torch.dtype
) -> None:
    model = make_model(FAMILIES[family]()).to(dtype)
    blocks = find_blocks(model)
    captured = capture_inputs(model, blocks, SAMPLES, compute)
    working = WorkingBlock(blocks[0], captured.arguments[0], CPU, compute)
    module, before = working.module, run_block(working.module, captured.hidden, working.arguments)
    working.load(blocks[2], captured.arguments[2])
    assert working.module is module
    fresh = WorkingBlock(blocks[2], captured.arguments[2], CPU, compute)
    after = run_block(module, captured.hidden, working.arguments)
    assert torch.equal(after, run_block(fresh.module, captured.hidden, fresh.arguments))
    assert not torch.equal(after, before)
    assert all(torch.equal(working.wanted[name], layer.weight) for name, layer in blocks[2].linears().items())


@torch.no_grad()
def test_what_was_fetched_is_taken_in_place_of_the_blocks_own() -> None:
    model = make_model(FAMILIES["llama"]())
    blocks = find_blocks(model)
    captured = capture_inputs(model, blocks, SAMPLES, torch.float32)
    working = WorkingBlock(blocks[0], captured.arguments[0], CPU, torch.float32)
    fetched = {name: tensor * 2 for name, tensor in blocks[2].module.state_dict().items()}
    working.load(blocks[2], captured.arguments[2], fetched)
    assert all(torch.equal(tensor, fetched[name]) for name, tensor in working.module.state_dict().items())
    assert all(torch.equal(working.wanted[name], fetched[f"{name}.weight"]) for name in working.wanted)


def test_a_block_leaves_the_arguments_of_others_alone() -> None:
    block = find_blocks(make_model(FAMILIES["llama"]()))[0]
    arguments = [{"mask": torch.full((1, 24), float(index % 2)).expand(4, 24)} for index in range(3)]
    bench = Workbench(CPU, torch.float32)
    assert [bench.load(block, mine).arguments["mask"].unique().item() for mine in arguments] == [0, 1, 0]


def test_what_is_kept_is_kept_under_its_key_only() -> None:
    model = make_model(FAMILIES["llama"]())
    block = find_blocks(model)[0]
    working = WorkingBlock(block, {}, CPU, torch.float32)
    first = working.keep((1, "a"), lambda: [1])
    assert working.keep((1, "a"), lambda: [2]) is first
    assert working.keep((2, "a"), lambda: [3]) == [3]
    assert working.keep((1, "a"), lambda: [4]) == [4]


def test_closing_frees_what_was_kept_without_the_garbage_collector() -> None:
    block = find_blocks(make_model(FAMILIES["llama"]()))[0]
    bench = Workbench(CPU, torch.float32)
    working = bench.load(block, {})
    working.keep("key", partial(list, [working]))  # holds on to the block, as steps do
    alive = weakref.ref(working.module)
    gc.disable()
    try:
        bench.close()
        del working
        assert alive() is None
    finally:
        gc.enable()


def test_static_scales_change_in_place() -> None:
    model = make_model(FAMILIES["llama"]())
    block = find_blocks(model)[0]
    working = WorkingBlock(block, {}, CPU, torch.float32)
    name, x = "mlp.up_proj", torch.randn(4, 64)
    outputs = []
    for scale in (0.01, 0.1):
        quantized = QuantizedInput(activations.FP8_TENSOR, torch.tensor([scale]))
        with working.quantized_inputs({name: quantized}):
            outputs.append(working.module.get_submodule(name)(x))
            expected = activations.FP8_TENSOR.fake_quantize(x, quantized.scale)
        torch.testing.assert_close(outputs[-1], working.module.get_submodule(name)(expected))
    assert not torch.equal(*outputs)
