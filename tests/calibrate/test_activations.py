"""Statistics of layer inputs over every batch, and the quantization of inputs while a block is tuned."""

import pytest
import torch
import transformers as tf

from calibrate import blocks as blocks_module
from calibrate.activations import InputStatistics, QuantizedInput, observe_inputs, quantized_inputs_of
from calibrate.blocks import capture_inputs, find_blocks, run_block
from calibrate.linear import make_working, quantized_inputs
from tests.calibrate.conftest import COMMON, make_model
from vllm_autoround.format import activations
from vllm_autoround.format.scheme import QuantScheme

SAMPLES = torch.randint(2, 128, (8, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens_at_once", [1 << 14, 24])
def test_statistics_are_over_every_sample(tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_PART_TOKENS", tokens_at_once)
    model = make_model(tf.LlamaConfig(**COMMON))
    block = find_blocks(model)[0]
    hidden, arguments = capture_inputs(model, [*find_blocks(model)], SAMPLES, torch.float32)
    hidden[3, 5, 7] = 50.0  # an outlier that is in one sample alone, and not in the last
    seen = observe_inputs(block.module, block.linears(), hidden, arguments[0])
    calls: dict[str, list[torch.Tensor]] = {name: [] for name in block.linears()}
    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, name=name: calls[name].append(args[0]))
        for name, layer in block.linears().items()
    ]
    with torch.no_grad():
        run_block(block.module, hidden, arguments[0])
    for hook in hooks:
        hook.remove()
    for name, [x] in calls.items():
        torch.testing.assert_close(seen[name].amax, x.abs().amax())
        torch.testing.assert_close(seen[name].square_sum, x.flatten(0, 1).square().sum(0))


def test_fused_layers_share_their_scalar_and_others_have_their_own() -> None:
    schemes = dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], QuantScheme.parse("NVFP4"))
    schemes |= {"down_proj": QuantScheme.parse("W4A16")}
    statistics = {
        name: InputStatistics(torch.tensor(amax), torch.ones(4))
        for name, amax in zip(schemes, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)
    }
    inputs = quantized_inputs_of(schemes, statistics)
    scales = {name: made.scale.item() for name, made in inputs.items() if made.scale is not None}
    divisor = 448 * 6
    assert scales == pytest.approx(
        {**dict.fromkeys(["q_proj", "k_proj", "v_proj"], divisor / 3), "o_proj": divisor / 4}
    )


def test_inputs_are_quantized_inside_the_context_only_and_gradients_pass() -> None:
    block = make_working(torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False)))
    x = torch.randn(4, 32, requires_grad=True)
    kind = activations.FP8_TENSOR
    scale = kind.calibrated(x.detach().abs().amax() / 2)  # half of the values' range saturates
    plain = block(x)
    with quantized_inputs(block, {"0": QuantizedInput(kind, scale)}):
        out = block(x)
    expected = kind.fake_quantize(x.detach(), scale) @ block[0].weight.T
    torch.testing.assert_close(out, expected)
    assert not torch.equal(out, plain)
    assert torch.equal(block(x), plain)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (out, plain)))
