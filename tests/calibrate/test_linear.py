"""Working linear layers: input quantization and FP8 products, also under torch.compile, which must see both change."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from calibrate.activations import QuantizedInput
from calibrate.linear import fp8_matmuls, make_working, quantized_inputs
from vllm_autoround.format import activations

FP8, NVFP4 = activations.FP8_TENSOR, activations.NVFP4


def block(*, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return make_working(nn.Sequential(nn.Linear(64, 32, bias=bias), nn.SiLU(), nn.Linear(32, 48, bias=bias)))


def test_compiled_code_sees_input_quantization_come_change_and_go() -> None:
    module, x = block(), torch.randn(16, 64)
    run = torch.compile(module, backend="eager", fullgraph=True)
    plain = run(x)
    for kind, scale in ((FP8, 0.01), (FP8, 0.1), (NVFP4, 2.0)):
        inputs = {"0": QuantizedInput(kind, torch.tensor([scale]))}
        with quantized_inputs(module, inputs):
            torch.testing.assert_close(run(x), module(x))
            assert not torch.equal(run(x), plain)
    torch.testing.assert_close(run(x), plain)


def test_layers_that_share_a_scale_quantize_their_input_once_a_step() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    layers = make_working(nn.ModuleDict({name: nn.Linear(64, 16, bias=False) for name in ("q", "k", "v")}))
    scale = torch.tensor([0.01])
    # With the partitioner that Inductor has.
    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=lambda graph, _: graph, partition_fn=min_cut_rematerialization_partition
    )
    run = torch.compile(lambda x: torch.cat([layer(x) for layer in layers.values()], -1), backend=backend)
    for scales, roundings in (([scale] * 3, 1), ([scale.clone() for _ in range(3)], 3)):
        with quantized_inputs(layers, {n: QuantizedInput(FP8, s) for n, s in zip(layers, scales, strict=True)}):
            run(torch.randn(16, 64)).sum().backward()
        assert sum("round" in str(node.target) for node in graphs[-1].graph.nodes) == roundings


def test_a_layer_of_another_class_is_refused() -> None:
    class Odd(nn.Linear):
        pass

    module = make_working(nn.Sequential(Odd(64, 32)))
    with pytest.raises(TypeError, match="0 is a Odd"), quantized_inputs(module, {"0": QuantizedInput(FP8, None)}):
        pass


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_in_fp8_are_those_of_rounded_factors(bias: bool) -> None:
    module = block(bias=bias).bfloat16()
    x = torch.randn(2, 24, 64, dtype=torch.bfloat16, requires_grad=True)
    seed = torch.randn(2, 24, 48, dtype=torch.bfloat16)

    def gradients() -> list[torch.Tensor]:
        out = module(x)
        biases = [module[0].bias] if bias else []
        return [out, *torch.autograd.grad(out, [x, module[0].weight, module[2].weight, *biases], seed)]

    exact = gradients()
    most = {name: 2 * module.get_submodule(name).weight.detach().abs().amax() for name in ("0", "2")}
    with fp8_matmuls(module, most):
        rounded = gradients()
    assert torch.equal(rounded[0], exact[0])  # only gradients are
    for mine, theirs in zip(rounded[1:], exact[1:], strict=True):
        error = (mine - theirs).float().norm() / theirs.float().norm()
        # Each factor is rounded by 2^-4 of itself at most, in the mean by 2.6%; two or more such factors in a row.
        assert 0.01 < error < 0.08, error


@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (15, 32)])
def test_shapes_that_the_tensor_cores_do_not_take_stay_as_they_are(rows: int, columns: int) -> None:
    module = make_working(nn.Sequential(nn.Linear(columns, 16, bias=False))).bfloat16()
    x = torch.randn(rows, columns, dtype=torch.bfloat16, requires_grad=True)
    weight, seed = module[0].weight, torch.randn(rows, 16, dtype=torch.bfloat16)
    exact = torch.autograd.grad(module(x), [x, weight], seed)
    with fp8_matmuls(module, {"0": torch.ones(())}):
        for mine, theirs in zip(torch.autograd.grad(module(x), [x, weight], seed), exact, strict=True):
            assert torch.equal(mine, theirs)
