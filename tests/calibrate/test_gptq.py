"""GPTQ: nearest where features do not interact, a local optimum where they do, and on the grid for every type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibrate import calibrate
from calibrate.chain import NonFiniteError
from calibrate.gptq import gptq
from calibrate.rounding import Rounding, Target, freeze, targets
from tests.calibrate.exports import llama, save_source
from vllm_autoround.format.scheme import QuantScheme

SCHEMES = ["W2A16G32", "W4A16_ASYM_G32", "W3A16", "NVFP4A16", "MXFP4A16", "MXFP8A16", "FP8_STATIC", "FP8_BLOCK"]


def problem(scheme: str, columns: int = 256) -> tuple[Target, Rounding, Tensor]:
    """A weight [48, columns], its nearest rounding, and second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, columns, generator=generator).bfloat16()
    [target] = targets([weight], QuantScheme.parse(scheme).weights)
    x = torch.randn(600, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return target, Rounding.nearest(target), x.T @ x / 600


def loss(target: Target, values: Tensor | None, hessian: Tensor) -> Tensor:
    """Of each row."""
    start = Rounding.nearest(target)
    error = (freeze(target, start, values).dequantize() - target.weight.float()).double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_of_the_grid_and_far_better_than_nearest(scheme: str) -> None:
    target, start, hessian = problem(scheme)
    values = gptq(target, start, hessian)
    weight, nearest = freeze(target, start, values), freeze(target, start)
    assert torch.equal(target.type.decode(weight.codes), values)
    assert torch.equal(weight.scale.float(), nearest.scale.float())
    assert (loss(target, values, hessian) < 0.6 * loss(target, None, hessian)).float().mean() > 0.95


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_interaction_it_is_rounding_to_nearest(scheme: str) -> None:
    target, start, hessian = problem(scheme)
    values = gptq(target, start, hessian.diagonal().diag())
    assert torch.equal(freeze(target, start, values).codes.float(), freeze(target, start).codes.float())


def test_no_single_value_can_be_changed_for_the_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrate.gptq._SWEEPS", 1000)  # until nothing changes
    target, start, hessian = problem("W3A16G32", columns=64)
    values = gptq(target, start, hessian)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    least = loss(target, values, hessian)
    for column in range(64):
        for step in (-1, 1):
            other = values.clone()
            other[:, column] = (other[:, column] + step).clamp(0, 7)
            assert (loss(target, other, hessian) >= least * (1 - 1e-5)).all()


def test_features_that_were_never_seen_are_rounded_to_nearest() -> None:
    target, start, hessian = problem("W4A16G32")
    hessian[:, 10] = hessian[10] = 0
    values = gptq(target, start, hessian)
    assert torch.equal(values[:, 10], target.type.decode(freeze(target, start).codes)[:, 10])
    none = gptq(target, start, torch.zeros_like(hessian))
    assert torch.equal(none, target.type.decode(freeze(target, start).codes))


def test_what_is_no_second_moment_is_refused() -> None:
    target, start, hessian = problem("W4A16G32")
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(target, start, -hessian)


def test_a_layer_whose_inputs_are_refused_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("the inputs' second moments are not positive definite")

    monkeypatch.setattr("calibrate.tuning.gptq", refuse)
    texts = [list(range(2, 18))] * 2
    source = save_source(tmp_path / "source", llama())
    with pytest.raises(NonFiniteError, match=r"model.layers.0: self_attn.q_proj: .* not positive definite"):
        calibrate(source, tmp_path / "out", scheme="W4A16G32", recipe="gptq", dataset=texts, nsamples=2, seqlen=16)
