"""Training scales after all blocks: the gradient, what may change and what may not, and who judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from calibrate import calibrate
from calibrate.activations import QuantizedInput
from calibrate.blocks import capture_inputs, find_blocks
from calibrate.chain import NonFiniteError, advance
from calibrate.config import RECIPES, CalibrationConfig
from calibrate.end_to_end import TunedScales, tune_scales
from calibrate.kv_cache import observed
from calibrate.linear import make_working, quantized_inputs
from calibrate.plan import make_plan
from calibrate.resident import ResidentBlock, rescaled, served
from calibrate.source import load_source
from calibrate.tail import ModelTail
from calibrate.workbench import Loss
from tests.calibrate.conftest import COMMON, make_model
from tests.conftest import DEMO_MODEL
from vllm_autoround.format.reader import dequantized_state_dict, read_tensors
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight, quantize

CPU = torch.device("cpu")
SAMPLES = torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(1))
RECIPE = replace(RECIPES["rtn"], end_to_end_iters=30, end_to_end_lr=1e-2)
# A model of three kinds of layers, of which those of 2 and 3 bits are trained.
MIXED = {"down_proj": "W4A16G32", "o_proj": "FP8_STATIC", "v_proj": "W3A16_ASYM_G32"}
FIXED = ("down_proj", "o_proj")


class Model:
    """A tiny model whose blocks are resident, rounded to nearest."""

    def __init__(self, scheme: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = make_model(tf.LlamaConfig(**COMMON))
        for parameter in self.model.parameters():  # so that its output distribution is not flat
            parameter.data = (parameter.data * (3.0 if parameter.ndim == 2 else 1.0)).to(dtype)
        blocks = find_blocks(self.model)
        self.inputs, arguments = capture_inputs(self.model, blocks, SAMPLES, torch.float32)
        kind = QuantScheme.parse(scheme).weights
        self.blocks, self.weights = [], dict[str, QuantizedWeight]()
        self.outputs = self.inputs.clone()
        for block, kwargs in zip(blocks, arguments, strict=True):
            weights = {name: quantize(layer.weight.detach(), kind) for name, layer in block.linears().items()}
            self.blocks.append(ResidentBlock(block, kwargs, weights, {}, list(weights), CPU, torch.float32))
            self.weights |= {f"{block.name}.{name}": weight for name, weight in weights.items()}
            advance(block.module.float(), self.outputs, kwargs)
            block.module.to(dtype)
        self.factors = {f"{block.name}.{name}": f for block in self.blocks for name, f in block.factors.items()}
        self.tail = ModelTail(self.model, blocks, CPU, torch.float32)

    def tune(self, recipe: Any = RECIPE, *, heldout: int = 2, loss: Loss | None = None, **kwargs: Any) -> TunedScales:
        return tune_scales(
            self.blocks,
            kwargs.pop("inputs", self.inputs),
            kwargs.pop("outputs", self.outputs),
            loss=loss or self.tail.divergence,
            recipe=recipe,
            heldout=heldout,
            generator=torch.Generator().manual_seed(0),
            on_step=lambda: None,
            **kwargs,
        )


@pytest.mark.parametrize("scheme", ["W2A16G32", "W3A16_ASYM_G32", "W2A16G-1"])
def test_the_gradients_are_those_of_the_whole_model_as_it_is_written(scheme: str) -> None:
    """Also away from factor 1. Float32 scales have no rounding to pass through."""
    mine = Model(scheme)
    generator = torch.Generator().manual_seed(2)
    for factor in mine.factors.values():
        factor.data += 0.2 * torch.rand(factor.shape, generator=generator)
    hidden = mine.inputs[:1]
    for block in mine.blocks:
        hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
    loss = mine.tail.divergence(hidden, mine.outputs[:1])
    found = torch.autograd.grad(loss, mine.factors.values())

    state = {}
    for name, weight in mine.weights.items():
        columns = weight.codes.shape[1] // weight.scale.shape[1]
        zero = weight.type.zero if weight.zero_point is None else weight.zero_point.repeat_interleave(columns, 1)
        scale = (weight.scale * mine.factors[name]).repeat_interleave(columns, 1)
        state[f"{name}.weight"] = scale * (weight.codes.float() - zero)
    logits = functional_call(mine.model, state, (SAMPLES[:1],)).logits[0].log_softmax(-1)
    theirs = mine.model(SAMPLES[:1]).logits[0].log_softmax(-1).detach()
    dense = F.kl_div(logits, theirs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, dense)
    for mine_, expected in zip(found, torch.autograd.grad(dense, mine.factors.values()), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(mine_, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_trained_weight_is_what_the_checkpoint_will_stand_for(dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(8, 64).to(dtype), QuantScheme.parse("W3A16G32").weights)
    factor = 0.5 + torch.rand(8, 2)
    scaled = rescaled(weight, factor)
    assert scaled.scale.dtype == dtype
    assert torch.equal(scaled.codes, weight.codes)
    assert torch.equal(served(weight, factor, torch.float32), scaled.dequantize().to(dtype).float())
    assert torch.equal(rescaled(weight, torch.ones(8, 2)).scale, weight.scale)
    assert (rescaled(weight, torch.zeros(8, 2)).scale != 0).all()


def test_the_divergence_falls_and_only_scales_change() -> None:
    mine = Model("W2A16G32", torch.bfloat16)
    tuned = mine.tune()
    assert not tuned.kept_start
    assert tuned.tuned_loss < 0.99 * tuned.start_loss  # measured: 0.985
    for block, weights in zip(mine.blocks, tuned.weights, strict=True):
        for name, weight in weights.items():
            before = mine.weights[f"{block.name}.{name}"]
            assert torch.equal(weight.codes, before.codes)
            assert weight.scale.dtype == torch.bfloat16
            assert (weight.scale != before.scale).float().mean() > 0.5
            torch.testing.assert_close(weight.scale, before.scale, rtol=0.3, atol=0.0)
    again = Model("W2A16G32", torch.bfloat16).tune()
    assert (again.start_loss, again.tuned_loss) == (tuned.start_loss, tuned.tuned_loss)


def test_what_is_worse_on_the_held_out_samples_is_not_kept() -> None:
    mine = Model("W2A16G32")
    tuned = mine.tune(replace(RECIPE, end_to_end_iters=3, end_to_end_lr=1.0))
    assert tuned.kept_start
    assert tuned.tuned_loss == tuned.start_loss
    for block, weights in zip(mine.blocks, tuned.weights, strict=True):
        for name, weight in weights.items():
            assert torch.equal(weight.scale, mine.weights[f"{block.name}.{name}"].scale)


def test_held_out_samples_judge_and_are_not_trained_on() -> None:
    mine, seen = Model("W2A16G32"), {True: set[int](), False: set[int]()}

    def loss(output: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
        [sample] = [s for s in range(8) if torch.equal(target[0], mine.outputs[s])]
        seen[output.requires_grad].add(sample)
        return mine.tail.divergence(output, target, real)

    mine.tune(heldout=2, loss=loss)
    assert seen == {True: set(range(6)), False: {6, 7}}


def test_rates_fall_linearly_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    class Adam(torch.optim.Adam):
        def step(self, *args: Any) -> None:
            rates.append(self.param_groups[0]["lr"])
            assert self.param_groups[0]["betas"] == (0.9, 0.98)
            super().step(*args)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    Model("W2A16G32").tune(replace(RECIPE, end_to_end_iters=4, end_to_end_lr=0.01))
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_padding_counts_nowhere() -> None:
    real = torch.arange(16) < torch.tensor([16, 9, 12, 16, 3, 16, 5, 16])[:, None]
    plain = Model("W2A16G32")
    result = plain.tune(replace(RECIPE, end_to_end_iters=6), real=real)
    other = Model("W2A16G32")
    inputs, outputs = (torch.where(real[..., None], t, torch.randn(t.shape)) for t in (other.inputs, other.outputs))
    padded = other.tune(replace(RECIPE, end_to_end_iters=6), real=real, inputs=inputs, outputs=outputs)
    assert padded.start_loss == pytest.approx(result.start_loss, rel=1e-5)
    assert padded.tuned_loss == pytest.approx(result.tuned_loss, rel=1e-5)
    # Of the two judges, one has 5 tokens and the other 16.
    output = plain.inputs[6:]
    with torch.no_grad():
        for block in Model("W2A16G32").blocks:
            output = block(output)
    assert result.start_loss == pytest.approx(
        plain.tail.divergence(output, plain.outputs[6:], real[6:]).item(), rel=1e-5
    )


def poison(block: ResidentBlock, layer: str) -> None:
    """Have the gradient of the layer's output be NaN."""
    block.module.get_submodule(layer).register_forward_hook(lambda _m, _a, out: Poison.apply(out))


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: object, grad: Tensor) -> Tensor:
        return torch.full_like(grad, nan)


def test_a_gradient_that_is_not_finite_names_the_layer() -> None:
    mine = Model("W2A16G32")
    poison(mine.blocks[1], "mlp.up_proj")
    with pytest.raises(NonFiniteError, match=r"^model.layers.1: mlp.up_proj: a gradient is not finite"):
        mine.tune()


def test_a_loss_that_is_not_finite_names_the_block() -> None:
    mine = Model("W2A16G32")
    layer = mine.blocks[1].module.get_submodule("mlp.up_proj")
    calls: list[int] = []  # two judges, then steps
    layer.register_forward_hook(lambda _m, _a, out: out * (nan if calls.append(1) or len(calls) > 2 else 1))
    with pytest.raises(NonFiniteError, match=r"^step 0 end to end: model.layers.1 gives a value that is not finite"):
        mine.tune()


def test_an_input_that_is_quantized_when_served_is_quantized_in_training() -> None:
    scheme = QuantScheme.parse("FP8_STATIC")
    assert scheme.activations is not None
    mine = Model("W2A16G32")
    block = mine.blocks[0]
    plain = block(mine.inputs)
    coarse = QuantizedInput(scheme.activations, scheme.activations.calibrated(torch.tensor(1e4)))
    block.inputs = {"mlp.down_proj": coarse}
    loss = block(mine.inputs).square().mean()
    assert not torch.equal(block(mine.inputs), plain)
    again = torch.utils.checkpoint.checkpoint(block, mine.inputs, use_reentrant=False).square().mean()
    for whole, twice in zip(*(torch.autograd.grad(x, block.factors.values()) for x in (loss, again)), strict=True):
        torch.testing.assert_close(twice, whole)


# Whole runs.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Calibrate the demo model in a new folder, which is returned with the settings and the report."""
    settings: dict[str, Any] = {"scheme": "W2A16G32", "layers": MIXED, "kv_cache": "fp8", "nsamples": 17}
    texts = torch.randint(2, 800, (17, 48), generator=torch.Generator().manual_seed(0)).tolist()
    settings |= {"dataset": texts, "seqlen": 48, "batch_size": 1, "iters": 2, "lr": 0.02, "kl_last_block": False}

    def calibrated(**changes: Any) -> tuple[Path, dict[str, Any], dict[str, Any]]:
        out = tmp_path_factory.mktemp("run") / "out"
        with mock.patch("calibrate.plan.has_amx", return_value=False):  # float32
            report = calibrate(DEMO_MODEL, out, **settings | changes)
        return out, settings | changes, report

    return calibrated


@pytest.fixture(scope="module")
def plain(run: Any) -> Any:
    return run()


@pytest.fixture(scope="module")
def trained(run: Any) -> Any:
    return run(end_to_end_iters=20, end_to_end_lr=5e-3)


def test_a_run_with_training_differs_in_the_scales_of_few_bits(plain: Any, trained: Any) -> None:
    assert plain[2]["end_to_end"] is None
    report = trained[2]["end_to_end"]
    assert report["layers"] == 4 * 5
    assert report["tuned_loss"] < 0.6 * report["start_loss"]
    assert not report["kept_start"]
    assert 0 < report["seconds"] < trained[2]["seconds"]
    before, after = (dict(read_tensors(folder, ("",))) for folder in (plain[0], trained[0]))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        few_bits = name.endswith("weight_scale") and not any(layer in name for layer in FIXED)
        if few_bits:
            assert (after[name] != tensor).any(), name
            assert after[name].dtype == tensor.dtype
        elif not name.endswith(("k_scale", "q_scale", "v_scale")):
            assert torch.equal(after[name], tensor), name


def test_what_is_written_is_what_was_judged(trained: Any, tmp_path: Path) -> None:
    """The held-out divergence, and the KV cache's scales, of the checkpoint run block by block."""
    out, settings, report = trained
    source = load_source(str(DEMO_MODEL), trust_remote_code=False)
    plan = make_plan(source, tmp_path / "out", CalibrationConfig(**settings))
    original, arguments = capture_inputs(source.model, plan.blocks, plan.samples, torch.float32)
    hidden, stored = original.clone(), dict(read_tensors(out, ("_scale",)))
    tail = ModelTail(source.model, plan.blocks, CPU, torch.float32)
    weights = {name: t.float() for name, t in dequantized_state_dict(out, torch.bfloat16).items()}
    kind = QuantScheme.parse("FP8_STATIC").activations
    assert kind is not None
    for block, kwargs in zip(plan.blocks, arguments, strict=True):
        module = make_working(block.module.float())
        advance(module, original, kwargs)
        module.load_state_dict({name: weights[f"{block.name}.{name}"] for name in module.state_dict()})
        o_proj = QuantizedInput(kind, stored[f"{block.name}.self_attn.o_proj.input_scale"])
        with quantized_inputs(module, {"self_attn.o_proj": o_proj}), observed(module) as ranges:
            advance(module, hidden, kwargs)
        for name, scale in ranges.scales(module, block.name, per_head=False).items():
            assert torch.equal(stored[name], scale), name
    judges = slice(-plan.heldout, None)
    loss = tail.divergence(hidden[judges], original[judges])
    assert report["end_to_end"]["tuned_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_run_that_training_makes_worse_is_a_run_without(
    plain: Any, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, report = run(end_to_end_iters=3, end_to_end_lr=1.0)
    assert report["end_to_end"]["kept_start"]
    assert report["end_to_end"]["tuned_loss"] == report["end_to_end"]["start_loss"]
    captured = capsys.readouterr()
    assert "after (kept its start)" in captured.out
    assert "WARNING: the scales keep their start" in captured.err
    for path in plain[0].glob("*.safetensors"):
        mine, other = load_file(path), load_file(out / path.name)
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def test_nothing_is_trained_where_no_layer_has_few_bits(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("calibrate.pipeline.train_scales", lambda *_: pytest.fail("trained"))
    _, _, report = run(
        scheme="W4A16G32", layers={"lm_head": "W2A16G32"}, recipe="best", iters=0, nsamples=2, kv_cache=None
    )
    assert report["tuning"]["end_to_end_iters"] == 400
    assert report["end_to_end"] is None
    assert "end to end" not in "".join(capsys.readouterr())


def test_a_layer_under_training_takes_a_byte_a_weight() -> None:
    block = Model("W2A16G32").blocks[0]
    assert all(p.device.type == "meta" for m in block.module.modules() if isinstance(m, nn.Linear) for p in [m.weight])
