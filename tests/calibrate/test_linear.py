"""Working linear layers: input quantization and FP8 products, also under torch.compile, which must see both change."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from calibrate.activations import QuantizedInput
from calibrate.fp8_matmul import Fp8Products, dither, is_exact, scaled_both_ways, tensor_scale
from calibrate.linear import fp8_matmuls, make_working, quantized_inputs
from calibrate.rounding import MOST_CLIP
from vllm_autoround.format import activations
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Mx, quantize

FP8, NVFP4, MXFP4 = activations.FP8_TENSOR, activations.NVFP4, activations.MXFP4


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Or the tests of this file would share one limit of versions of a forward."""
    torch._dynamo.reset()


def block(*, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return make_working(nn.Sequential(nn.Linear(64, 32, bias=bias), nn.SiLU(), nn.Linear(32, 48, bias=bias)))


def products(module: nn.Module, *, exact: bool = False, step: torch.Tensor | None = None) -> dict[str, Fp8Products]:
    made = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            rows = MOST_CLIP * layer.weight.detach().abs().amax(1, keepdim=True).float()
            made[name] = Fp8Products(exact, rows, tensor_scale(rows.amax()), step)
    return made


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
    with fp8_matmuls(module, products(module)):
        rounded = gradients()
    assert torch.equal(rounded[0], exact[0])  # only gradients are
    for mine, theirs in zip(rounded[1:], exact[1:], strict=True):
        error = (mine - theirs).float().norm() / theirs.float().norm()
        # Each factor is rounded by 2^-4 of itself at most, in the mean by 2.6%; two or more such factors in a row.
        assert 0.01 < error < 0.08, error


STEPS = 64


def test_dither_is_right_in_the_mean_over_the_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(48, 80) * torch.exp2(torch.randint(-10, 7, (48, 80)))
    x[0] = torch.tensor([0.0, 1.0, -1.875, 448.0, -(2.0**-9)]).repeat(16)  # what e4m3 has
    rounded = torch.stack([dither(x, torch.tensor([step])) for step in range(STEPS)])
    spacing = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2**-6))) - 3)
    assert torch.equal(rounded.to(torch.float8_e4m3fn).float(), rounded)
    assert torch.equal(rounded[:, 0], x[0].expand(STEPS, -1))
    assert ((rounded - x).abs() < spacing).all()  # to one of the two neighbours
    assert (rounded.unique(dim=0).shape[0]) == STEPS
    # For the golden ratio n times the discrepancy of n multiples was found to be below 2.2 + ln n wherever tried.
    assert ((rounded.double().mean(0) - x).abs() < spacing * (2.2 + torch.tensor(STEPS).log()) / STEPS).all()
    # And over the entries in every step, up to four deviations of as many tosses of a coin.
    up, due = (rounded.abs() > x.abs()).float().mean((1, 2)), (x.abs() / spacing % 1).mean()
    assert ((up - due).abs() < 4 * 0.5 / x.numel() ** 0.5).all()


@pytest.mark.parametrize(("rows", "columns", "most"), [(1, 64, 0.08), (64, 1, 0.08), (16, 16, 0.04)])
def test_dither_rounds_up_as_often_as_due_in_every_part(rows: int, columns: int, most: float) -> None:
    share = 0.37  # of the way from 1 to the next value
    x = torch.full((256, 512), 1 + share / 8)
    for step in range(8):
        up = (dither(x, torch.tensor([step])) > 1).float()
        parts = up.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).mean((1, 3))
        # As many tosses of a coin would be off by .06 and .03 in the mean square, and somewhere by three times that.
        assert (parts - share).abs().max() < most


def test_dithered_factors_saturate_and_the_turned_ones_are_rounded_to_nearest() -> None:
    values = torch.tensor([[600.0, -600.0, 1.03, 2.0**-11]]).bfloat16()
    rows, turned = scaled_both_ways(values, torch.ones(1), torch.ones(1), torch.tensor([0]))
    assert rows.float()[0, :2].tolist() == [448, -448]
    assert turned.float()[:, 0].tolist() == [448, -448, 1, 0]
    assert rows.dtype == turned.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("bias", [False, True])
def test_a_dithered_product_has_the_weight_in_the_mean_over_the_steps(bias: bool) -> None:
    torch.manual_seed(0)
    module, step = make_working(nn.Sequential(nn.Linear(64, 48, bias=bias))).bfloat16(), torch.zeros(1).long()
    weight = module[0].weight
    x = torch.randn(2, 24, 64, dtype=torch.bfloat16, requires_grad=True)
    x_scale = x.detach().abs().max().float() / 448
    rounded = ((x.detach().float() / x_scale).to(torch.float8_e4m3fn).float() * x_scale).bfloat16()
    exact = module(rounded).detach()
    seed = torch.randn_like(exact)

    def run() -> list[torch.Tensor]:
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out, [x, weight], seed)]

    with fp8_matmuls(module, products(module)):
        backward_only = run()
    mean = torch.zeros_like(exact, dtype=torch.float32)
    with fp8_matmuls(module, products(module, step=step)):
        for _ in range(STEPS):
            out, *gradients = run()
            mean += out.float() / STEPS
            step += 1

    def error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
        return ((mine - theirs).float().norm() / theirs.float().norm()).item()

    assert 0.02 < error(out, exact) < 0.06
    # Not more than independent errors would leave, and what bfloat16 does to each product.
    assert error(mean, exact) < error(out, exact) / STEPS**0.5 + 2**-8
    # Gradients know nothing of dither; what is scaled by 1 / s in place of over s may be rounded to the other side.
    for mine, theirs in zip(gradients, backward_only[1:], strict=True):
        assert error(mine, theirs) < 0.01


def test_compiled_code_sees_dither_come_change_and_go() -> None:
    module, step = block().bfloat16(), torch.zeros(1, dtype=torch.long)
    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    plain, outs = run(x), []
    for number in (0, 1, 1):
        step.fill_(number)
        with fp8_matmuls(module, products(module, step=step)):
            outs.append(run(x))
            assert torch.equal(outs[-1], module(x))
            outs[-1].sum().backward()
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2])
    assert torch.equal(run(x), plain)


@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (15, 32), (0, 32)])
def test_shapes_that_the_tensor_cores_do_not_take_stay_as_they_are(rows: int, columns: int) -> None:
    module = make_working(nn.Sequential(nn.Linear(columns, 16, bias=False))).bfloat16()
    x = torch.randn(rows, columns, dtype=torch.bfloat16, requires_grad=True)
    weight, seed = module[0].weight, torch.randn(rows, 16, dtype=torch.bfloat16)
    exact = torch.autograd.grad(module(x), [x, weight], seed)
    with fp8_matmuls(module, products(module)):
        for mine, theirs in zip(torch.autograd.grad(module(x), [x, weight], seed), exact, strict=True):
            assert torch.equal(mine, theirs)


def mxfp4_layer(weight: torch.Tensor, *, bias: bool = False) -> nn.Module:
    layer = nn.Linear(*reversed(weight.shape), bias=bias)
    with torch.no_grad():
        layer.weight.copy_(quantize(weight, Mx(bits=4)).dequantize())
    return make_working(nn.Sequential(layer)).bfloat16()


def wide(rows: int, columns: int) -> torch.Tensor:
    """Groups of 32 that are up to 2^12 apart, rows up to 2^60, one row of zeros, one of zeros but for one value."""
    x = torch.randn(rows, columns)
    x *= torch.exp2(torch.randint(-12, 1, (rows, columns // 32)).repeat_interleave(32, 1))
    x *= torch.exp2(torch.randint(-30, 31, (rows, 1)))
    x[0] = 0
    x[1, 1:] = 0
    return x


def test_which_layers_are_exact_in_fp8() -> None:
    assert [name for name in ("MXFP4", "MXFP4A16", "MXFP8", "NVFP4") if is_exact(QuantScheme.parse(name))] == ["MXFP4"]


@pytest.mark.parametrize("compile", [False, True])
def test_e4m3_holds_mxfp4_factors_exactly(compile: bool) -> None:
    torch.manual_seed(0)
    x, weight, eye = wide(64, 128).bfloat16(), wide(48, 64), torch.eye(64)
    inputs, outputs = mxfp4_layer(torch.eye(128)), mxfp4_layer(weight)
    for module, fed, expected in (
        (inputs, x, MXFP4.fake_quantize(x, None)),
        (outputs, eye.bfloat16(), outputs[0].weight.detach().T.float()),
    ):
        run = torch.compile(module, backend="eager", fullgraph=True) if compile else module
        with quantized_inputs(module, {"0": QuantizedInput(MXFP4, None)}):
            run(fed)  # without FP8: the change must be seen
            with fp8_matmuls(module, products(module, exact=True)):
                assert torch.equal(run(fed).float(), expected)
                if not compile:
                    assert torch.equal(run(fed.T.contiguous().T).float(), expected)  # lies column by column
                    assert run(fed[:0]).shape == (0, expected.shape[1])


@pytest.mark.parametrize("bias", [False, True])
def test_mxfp4_in_fp8_is_the_product_of_the_same_factors(bias: bool) -> None:
    torch.manual_seed(0)
    module = mxfp4_layer(torch.randn(48, 256), bias=bias)
    x = torch.randn(2, 24, 256, dtype=torch.bfloat16, requires_grad=True)
    seed = torch.randn(2, 24, 48, dtype=torch.bfloat16)

    def run() -> list[torch.Tensor]:
        out = module(x)
        return [out, *torch.autograd.grad(out, [x, *module.parameters()], seed)]

    with quantized_inputs(module, {"0": QuantizedInput(MXFP4, None)}):
        plain = run()
        with fp8_matmuls(module, products(module, exact=True)):
            mine = run()
        assert torch.equal(run()[0], plain[0])
    # Both sum in float32, in some order, and round to bfloat16, 2^-9 of a value at most.
    torch.testing.assert_close(mine[0], plain[0], rtol=2**-7, atol=2e-5 * plain[0].abs().max().item())
    for got, theirs in zip(mine[1:], plain[1:], strict=True):
        error = (got - theirs).float().norm() / theirs.float().norm()
        assert error < 0.04, error  # only the gradient that came in was rounded
    assert not torch.equal(mine[1], plain[1])
