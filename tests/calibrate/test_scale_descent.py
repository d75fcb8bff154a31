"""Coordinate descent on scales: no row gets worse, and where features interact most get better."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibrate import calibrate, tuning
from calibrate.gptq import DAMPING
from calibrate.rounding import Rounding, Target, fake_quantize, targets
from calibrate.scale_descent import descend_scales
from calibrate.scale_search import Candidates, search_scales
from tests.calibrate.exports import llama, save_source
from vllm_autoround.format.scheme import QuantScheme

SCHEMES = ["W2A16G32", "W4A16_ASYM_G32", "W3A16", "W4A16G-1", "NVFP4A16"]


def problem(scheme: str, columns: int = 256) -> tuple[Target, Rounding, Tensor]:
    """A weight [48, columns], the start that the search finds, and second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, columns, generator=generator).bfloat16()
    [target] = targets([weight], QuantScheme.parse(scheme).weights)
    x = torch.randn(600, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = x.T @ x / 600
    return *search_scales(target, hessian.diagonal(), tuned=False), hessian


def loss(target: Target, rounding: Rounding, hessian: Tensor) -> Tensor:
    """Of each row, under the damped metric."""
    h = hessian.double() + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    error = fake_quantize(target, rounding).double() - target.weight.double()
    return ((error @ h) * error).sum(1)


@pytest.mark.parametrize(("scheme", "gain"), zip(SCHEMES, [0.9, 0.9, 0.97, 0.97, 0.8], strict=True))
def test_no_row_is_worse_and_together_they_are_better(scheme: str, gain: float) -> None:
    target, start, hessian = problem(scheme, columns=608)  # two blocks and a half
    before, after = (loss(target, r, hessian) for r in (start, descend_scales(target, start, hessian)))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < gain * before.sum()


@pytest.mark.parametrize("scheme", ["W3A16G32", "NVFP4A16"])
def test_no_single_group_can_be_changed_for_the_better(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrate.scale_descent._SWEEPS", 50)  # until nothing changes
    target, start, hessian = problem(scheme, columns=64)
    found = descend_scales(target, start, hessian)
    least = loss(target, found, hessian)
    for group in range(found.low_clip.shape[1]):
        for low, high in Candidates.of(target.type, tuned=False).coarse:
            other = found.clone()
            other.low_clip[:, group], other.high_clip[:, group] = low, high
            assert (loss(target, other, hessian) >= least * (1 - 1e-5)).all()


def test_finer_moves_and_a_second_sweep_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    target, start, hessian = problem("W3A16G32")
    both = loss(target, descend_scales(target, start, hessian), hessian).sum()
    with monkeypatch.context() as patch:
        patch.setattr("calibrate.scale_descent._SWEEPS", 1)
        assert both < loss(target, descend_scales(target, start, hessian), hessian).sum()
    coarse = Candidates(Candidates.of(target.type, tuned=False).coarse, [])
    monkeypatch.setattr(Candidates, "of", lambda kind, tuned: coarse)
    assert both < loss(target, descend_scales(target, start, hessian), hessian).sum()


def test_what_overflows_is_not_chosen() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 64, generator=generator).half()
    weight[0, :2] = torch.tensor([-64000.0, 65000.0])
    x = torch.randn(100, 64, generator=generator)
    [target] = targets([weight], QuantScheme.parse("W4A16G32").weights)
    target, start = search_scales(target, x.square().sum(0), tuned=False)
    assert fake_quantize(target, start).isfinite().all()
    assert fake_quantize(target, descend_scales(target, start, x.T @ x)).isfinite().all()


def test_rows_do_not_depend_on_how_many_are_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target, start, hessian = problem("W4A16G32")
    whole = descend_scales(target, start, hessian)
    monkeypatch.setattr("calibrate.scale_descent._MOST_TRIED", 5 * 256 * 34)
    parted = descend_scales(target, start, hessian)
    assert (whole.high_clip == parted.high_clip).float().mean() > 0.99  # but for the order of sums
    torch.testing.assert_close(loss(target, whole, hessian), loss(target, parted, hessian), rtol=0.02, atol=0)


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_STATIC", "MXFP4"])
def test_where_there_is_nothing_to_choose_from_the_start_stays(scheme: str) -> None:
    target, start, hessian = problem(scheme)
    assert descend_scales(target, start, hessian) is start


def test_features_that_were_never_seen_do_no_harm() -> None:
    target, start, hessian = problem("W4A16G32")
    found = descend_scales(target, start, torch.zeros_like(hessian))
    assert torch.equal(found.high_clip, start.high_clip)


def test_a_recipe_without_steps_descends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source(tmp_path / "source", llama())
    settings = {"scheme": "W3A16G32", "dataset": [[*range(i, i + 32)] for i in range(8)], "seqlen": 32, "nsamples": 8}
    done = calibrate(source, tmp_path / "descended", recipe="rtn", **settings)
    monkeypatch.setattr(tuning, "descend_scales", lambda target, start, hessian: start)
    left = calibrate(source, tmp_path / "searched", recipe="rtn", **settings)
    assert done["blocks"][0]["start_db"] < left["blocks"][0]["start_db"]
