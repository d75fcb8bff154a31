"""Weights that make up for the quantization of their inputs: the least squares solution, and never at any price."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrate import calibrate, input_noise
from calibrate.activations import QuantizedInput, observe_inputs, quantized_inputs_of, watched_inputs
from calibrate.blocks import Block, run_block
from calibrate.chain import NonFiniteError
from calibrate.gptq import DAMPING
from calibrate.input_noise import _Noise, make_up
from calibrate.workbench import Workbench, WorkingBlock
from tests.calibrate.conftest import FAMILIES, save_tiny
from vllm_autoround.format import activations
from vllm_autoround.format.scheme import QuantScheme

MXFP4 = QuantizedInput(activations.MXFP4, None)


class Pair(nn.Module):
    """Two layers that are fed the same, and one after them, under names that vLLM fuses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 96, bias=False)
        self.up_proj = nn.Linear(width, 96, bias=False)
        self.down_proj = nn.Linear(96, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def working_block(width: int = 64) -> WorkingBlock:
    torch.manual_seed(0)
    return Workbench(torch.device("cpu"), torch.float32).load(Block("block", Pair(width)), {})


def correlated(samples: int, tokens: int, width: int = 64, seed: int = 1) -> Tensor:
    """[S, T, H] of which a sixteenth of the directions hold most."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 16, width, generator=torch.Generator().manual_seed(9))
    hidden = torch.randn(samples, tokens, width // 16, generator=generator) @ mixing
    return hidden + 0.1 * torch.randn(samples, tokens, width, generator=generator)


def output_errors(working: WorkingBlock, inputs: dict[str, QuantizedInput], hidden: Tensor) -> dict[str, float]:
    """Of each layer with the weights that it is to have and quantized inputs, against the original with others."""
    fed: dict[str, Tensor] = {}
    with torch.no_grad(), watched_inputs(working.module, inputs, fed.__setitem__):
        run_block(working.module, hidden, {})
    errors = {}
    for name, x in fed.items():
        original = working.module.get_submodule(name).weight.detach()
        quantized = inputs[name].type.fake_quantize(x, inputs[name].scale)
        errors[name] = (quantized @ working.wanted[name].T - x @ original.T).square().sum().item()
    return errors


def test_the_change_is_the_least_squares_solution() -> None:
    x, weight = correlated(1, 400)[0].double(), torch.randn(24, 64, dtype=torch.float64)
    quantized = activations.MXFP4.fake_quantize(x.float(), None).double()
    damping = DAMPING * quantized.square().sum(0).mean()
    # Damping as further tokens, of which nothing is to be made.
    tokens = torch.cat([quantized, damping.sqrt() * torch.eye(64, dtype=torch.float64)])
    lost = torch.cat([(x - quantized) @ weight.T, torch.zeros(64, 24, dtype=torch.float64)])
    expected = torch.linalg.lstsq(tokens, lost).solution.T
    found = _Noise.of(x.float(), MXFP4).change(weight.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_features_of_other_blocks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(1, 400)[0], torch.randn(24, 64)
    halves = [_Noise.of(x[:, half], MXFP4).change(weight[:, half]) for half in (slice(32), slice(32, 64))]
    monkeypatch.setattr(input_noise, "_FEATURES", 32)
    torch.testing.assert_close(_Noise.of(x, MXFP4).change(weight), torch.cat(halves, 1))


@pytest.mark.parametrize(("scheme", "gain"), [("MXFP4", 0.8), ("NVFP4", 0.8), ("FP8_STATIC", 0.9)])
def test_outputs_on_other_tokens_get_better(scheme: str, gain: float) -> None:
    working, hidden = working_block(), correlated(8, 256)
    schemes = dict.fromkeys(working.wanted, QuantScheme.parse(scheme))
    inputs = quantized_inputs_of(schemes, observe_inputs(working.module, schemes, hidden, {}))
    others = correlated(4, 256, seed=2)
    before = output_errors(working, inputs, others)
    shares = make_up(working, inputs, hidden)
    after = output_errors(working, inputs, others)
    assert set(shares) == set(working.wanted)
    assert after["down_proj"] < before["down_proj"]  # whose features tell little of each other
    assert all(after[name] < gain * before[name] for name in ("gate_proj", "up_proj"))


def test_what_tells_nothing_of_the_noise_changes_little() -> None:
    """Fewer tokens than features, none of which tells of another: the full change would make things worse."""
    working, inputs = working_block(), {"gate_proj": MXFP4}
    hidden, others = (torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    wanted = working.wanted["gate_proj"]
    original = wanted.clone()
    before = output_errors(working, inputs, others)["gate_proj"]
    share = make_up(working, inputs, hidden)["gate_proj"]
    assert 0 < share < 0.5
    assert output_errors(working, inputs, others)["gate_proj"] < 1.02 * before
    wanted.copy_(original + (wanted - original) / share)
    assert output_errors(working, inputs, others)["gate_proj"] > 1.2 * before


def test_all_parts_of_the_samples_that_are_looked_at_count(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, inputs = correlated(8, 64), {"gate_proj": MXFP4}
    whole, parted, fewer = working_block(), working_block(), working_block()
    make_up(whole, inputs, hidden)
    monkeypatch.setattr(input_noise, "_AT_ONCE", 3 * 64)
    make_up(parted, inputs, hidden)
    torch.testing.assert_close(parted.wanted["gate_proj"], whole.wanted["gate_proj"])
    monkeypatch.setattr(input_noise, "_TOKENS", 8 * 64)
    make_up(fewer, inputs, torch.cat([hidden, 100 * torch.randn(4, 64, 64)]))
    torch.testing.assert_close(fewer.wanted["gate_proj"], whole.wanted["gate_proj"])


def test_one_sample_changes_nothing() -> None:
    working = working_block()
    assert make_up(working, {"up_proj": MXFP4}, correlated(1, 256)) == {"up_proj": 0.0}
    assert torch.equal(working.wanted["up_proj"], working.module.get_submodule("up_proj").weight)


def test_zeros_change_nothing() -> None:
    working = working_block()
    assert make_up(working, {"up_proj": MXFP4}, torch.zeros(4, 16, 64)) == {"up_proj": 0.0}
    assert torch.equal(working.wanted["up_proj"], working.module.get_submodule("up_proj").weight)


def test_layers_that_are_fused_but_quantize_differently_have_noise_of_their_own() -> None:
    hidden, kinds = correlated(8, 64), {"gate_proj": MXFP4, "up_proj": QuantizedInput(activations.MXFP8, None)}
    together, alone = working_block(), {name: working_block() for name in kinds}
    make_up(together, kinds, hidden)
    for name, how in kinds.items():
        make_up(alone[name], {name: how}, hidden)
        torch.testing.assert_close(together.wanted[name], alone[name].wanted[name])


@pytest.mark.parametrize("most", [8 * 64, 6 * 64])  # tokens that count
def test_padding_counts_for_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_noise, "_TOKENS", most)
    hidden = correlated(8, 64)
    padded = torch.cat([hidden, 100 * torch.randn(8, 16, 64)], 1)
    real = torch.arange(80).expand(8, 80) < 64
    plain, masked, careless = (working_block() for _ in range(3))
    make_up(plain, {"gate_proj": MXFP4}, hidden)
    make_up(masked, {"gate_proj": MXFP4}, padded, real)
    make_up(careless, {"gate_proj": MXFP4}, padded)
    torch.testing.assert_close(masked.wanted["gate_proj"], plain.wanted["gate_proj"])
    assert not torch.allclose(careless.wanted["gate_proj"], plain.wanted["gate_proj"], atol=1e-3)


@pytest.mark.parametrize("scheme", ["MXFP4", "FP8_STATIC", "FP8_DYNAMIC"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("sample", [2, 7])  # of those that A is fitted to, and of those that choose t
def test_what_is_not_finite_is_named(sample: int, value: float, scheme: str) -> None:
    working, hidden = working_block(), correlated(8, 64)
    schemes = {"up_proj": QuantScheme.parse(scheme)}
    inputs = quantized_inputs_of(schemes, observe_inputs(working.module, schemes, hidden, {}))
    hidden[sample, 3, 5] = value
    with pytest.raises(NonFiniteError, match="up_proj: an input is not finite"):
        make_up(working, inputs, hidden)


def test_moments_that_are_no_sum_of_squares_change_nothing() -> None:
    """As rounding may leave them."""
    x, weight = correlated(1, 400)[0], torch.randn(24, 64)
    noise = _Noise.of(x, MXFP4)
    noise.second_moments[0][:2, :2] = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
    assert not noise.change(weight).any()


def test_held_out_samples_and_padding_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", FAMILIES["llama"]())
    texts = [[5] * (8 + sample) for sample in range(32)]
    seen = []

    def spy(_: Any, inputs: dict[str, QuantizedInput], hidden: Tensor, real: Tensor) -> dict[str, float]:
        seen.append((list(inputs), len(hidden), real.sum(1).tolist()))
        return {}

    monkeypatch.setattr("calibrate.pipeline.make_up", spy)
    settings: dict[str, Any] = {"scheme": "MXFP4", "layers": {"v_proj": "NVFP4", "o_proj": "W4A16G32"}, "recipe": "rtn"}
    report = calibrate(
        source, tmp_path / "out", dataset=texts, nsamples=32, seqlen=40, pad=True, device="cpu", **settings
    )
    assert report["heldout_samples"] == 2
    names = ["self_attn.q_proj", "self_attn.k_proj", *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    for looked_at, samples, counted in seen:
        assert looked_at == names  # NVFP4 finds its scales for whole rows
        assert samples == len(counted) == 30
        assert len(set(counted)) == 30
        assert set(counted) < set(range(8, 41))


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "light"])
def test_recipes_without_steps_make_up_for_noise(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", FAMILIES["llama"]())
    texts = torch.randint(2, 60, (48, 32), generator=torch.Generator().manual_seed(0)).tolist()

    def errors(out: str) -> list[float]:
        run: dict[str, Any] = {"dataset": texts, "nsamples": 48, "seqlen": 32, "recipe": recipe, "device": "cpu"}
        run |= {"iters": 2} if recipe == "light" else {}
        report = calibrate(source, tmp_path / out, scheme="MXFP4", **run)
        made_up = [block["made_up"] for block in report["blocks"]]
        assert [len(shares) for shares in made_up] == [0 if recipe == "light" or out == "without" else 7] * len(made_up)
        return [block["tuned_loss"] for block in report["blocks"]]

    found = errors("with")
    monkeypatch.setattr("calibrate.pipeline.make_up", lambda *_: {})
    without = errors("without")
    if recipe == "light":
        assert found == without
    else:
        assert sum(found) < sum(without)
