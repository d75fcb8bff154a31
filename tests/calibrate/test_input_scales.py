"""Static scales of inputs: the search finds what is better on all samples, and steps learn as AutoRound's do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calibrate.activations import QuantizedInput
from calibrate.config import Recipe
from calibrate.input_scales import InputScale, learned_scales, search_input_scales, static_inputs
from calibrate.linear import make_working, quantized_inputs
from vllm_autoround.format import activations

FP8, NVFP4, MXFP4 = activations.FP8_TENSOR, activations.NVFP4, activations.MXFP4


def quantized(kind: activations.ActivationType, value: float) -> QuantizedInput:
    return QuantizedInput(kind, torch.tensor([value]))


def losses(static: list[QuantizedInput], best: list[float], *, second_half: float = 1.0) -> Callable[[], Tensor]:
    """Of four samples, least where every scale is its ``best``; of the last two, ``second_half`` as steep."""

    def of() -> Tensor:
        distance = sum(
            (made.scale.log2().double() - torch.tensor(value).log2()).square().sum()
            for made, value in zip(static, best, strict=True)
        )
        return torch.stack([distance, distance, second_half * distance, second_half * distance])

    return of


def test_the_search_widens_each_scale_to_where_the_loss_is_least() -> None:
    static = [quantized(FP8, 0.5), quantized(NVFP4, 8.0), quantized(FP8, 3.0)]
    # The nearest parts of an octave; what NVFP4 stores is a divisor. The last one's range would have to be narrower.
    search_input_scales(static, losses(static, [0.5 * 1.5, 8.0 / 1.25, 2.0]))
    found = [made.scale.item() for made in static]
    assert found == pytest.approx([0.5 * 2**0.5, 8.0 / 2**0.25, 3.0])


def test_a_scale_that_suits_only_half_of_the_samples_stays() -> None:
    static = [quantized(FP8, 0.5)]
    search_input_scales(static, losses(static, [0.75], second_half=-0.5))
    assert static[0].scale.item() == 0.5


def test_a_scale_that_gains_a_trifle_stays() -> None:
    static = [quantized(FP8, 0.5)]
    of = losses(static, [0.5 * 2**0.5])  # .25 at first
    search_input_scales(static, lambda: of() + 200)
    assert static[0].scale.item() == 0.5
    search_input_scales(static, lambda: of() + 50)
    assert static[0].scale.item() == pytest.approx(0.5 * 2**0.5)


def test_one_sample_is_enough_to_search() -> None:
    static = [quantized(FP8, 0.5)]
    of = losses(static, [0.5 * 2**0.75])
    search_input_scales(static, lambda: of()[:1])
    assert static[0].scale.item() == pytest.approx(0.5 * 2**0.75)


def test_a_scale_of_several_layers_counts_once_and_a_dynamic_one_not_at_all() -> None:
    shared = torch.tensor([0.1])
    inputs = {
        "q_proj": QuantizedInput(FP8, shared),
        "k_proj": QuantizedInput(FP8, shared),
        "o_proj": quantized(NVFP4, 2.0),
        "up_proj": QuantizedInput(MXFP4, None),
    }
    static = static_inputs(inputs)
    assert [made.scale for made in static] == [shared, inputs["o_proj"].scale]
    recipe = Recipe(iters=1, batch_size=1, input_scale_lr=1.0)
    assert [learned.scale for learned in learned_scales(static, recipe)] == [shared]
    assert not learned_scales(static, replace(recipe, iters=0))
    assert not learned_scales(static, replace(recipe, input_scale_lr=0.0))


def straight_through(x: Tensor, scale: Tensor) -> Tensor:
    """AutoRound's quant_fp8_sym (auto_round/data_type/fp8.py), as it is differentiated."""
    position = (x / scale).clip(-448, 448)
    rounded = position.to(torch.float8_e4m3fn).float()
    return (position + (rounded - position).detach()) * scale


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_shared_scale_is_autorounds(compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = make_working(torch.nn.ModuleDict({n: torch.nn.Linear(64, 16, bias=False) for n in ("q", "k")}))
    x, scale = torch.randn(24, 64, requires_grad=True), torch.tensor([2.0 / 448])  # some 5 % of the values saturate
    target = torch.randn(24, 32)

    def forward(x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in layers.values()], -1)

    run = torch.compile(forward, backend="aot_eager") if compiled else forward
    with quantized_inputs(layers, dict.fromkeys(layers, QuantizedInput(FP8, scale))):
        plain = run(x)
        assert scale.grad is None
        scale.requires_grad_(True)
        values = run(x)
        (values - target).square().sum().backward()
    mine, x.grad = x.grad, None
    torch.testing.assert_close(values, plain)
    theirs = scale.detach().clone().requires_grad_(True)
    expected = torch.cat([straight_through(x, theirs) @ layer.weight.T for layer in layers.values()], -1)
    (expected - target).square().sum().backward()
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(scale.grad, theirs.grad)
    torch.testing.assert_close(mine, x.grad)
    assert (mine == 0).any()


def test_a_learned_scale_is_a_factor_of_its_start_and_goes_back_to_it() -> None:
    scale = torch.tensor([0.2])
    learned = InputScale(scale, momentum=0.5)
    scale.fill_(0.4)
    learned.load()
    path = []
    # Momentum: the third gradient is smaller than what is left of the mean of the first two.
    for gradient in (4.0, 4.0, -1.0, -16.0, -16.0, -16.0):
        scale.grad = torch.tensor([gradient])
        learned.step(torch.tensor(0.25))
        path.append(scale.item() / 0.4)
    assert path == pytest.approx([0.75, 0.5, 0.25, 0.5, 0.75, 1.0])
    learned.step(torch.tensor(0.25))
    assert scale.item() == pytest.approx(0.4)  # no wider than at the start
    scale.grad = torch.tensor([1e6])
    learned.step(torch.tensor(2.0))
    assert 0 < scale.item() < 1e-3  # and never 0
    learned.restart()
    assert scale.item() == pytest.approx(0.4)
    scale.grad = torch.tensor([-1.0])
    learned.step(torch.tensor(0.25))
    scale.grad = torch.tensor([0.5])
    learned.step(torch.tensor(0.25))
    assert scale.item() == pytest.approx(0.4)  # of the mean, nothing was left but what these two made
