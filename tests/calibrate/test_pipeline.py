"""Parts of the pipeline that a whole run does not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibrate.blocks import capture_inputs
from calibrate.config import RECIPES, CalibrationConfig
from calibrate.pipeline import _advance_quantized, _statistics
from calibrate.plan import Plan, compute_dtype, make_plan
from calibrate.source import load_source
from calibrate.workbench import Workbench, WorkingBlock
from tests.calibrate.exports import llama, save_source


def test_held_out_samples_count_for_ranges_alone(tmp_path: Path) -> None:
    """Scales of activations must cover them; what the weights are fitted to must not know them."""
    plan, hidden, working = _first_block(tmp_path, "FP8_STATIC")
    assert plan.heldout == 1
    recipe = replace(RECIPES["gptq"], nsamples=8)
    schemes = plan.schemes(plan.blocks[0])
    plain = _statistics(working, schemes, hidden, plan, recipe)
    outlier = hidden.clone()
    outlier[-1, 3, 5] = 1e4
    widened = _statistics(working, schemes, outlier, plan, recipe)
    name = "self_attn.q_proj"
    assert widened[name].amax > 1.2 * plain[name].amax
    assert torch.equal(widened[name].square_sum, plain[name].square_sum)
    assert torch.equal(widened[name].second_moments, plain[name].second_moments)
    outlier = hidden.clone()
    outlier[0, 3, 5] = 1e4
    assert not torch.equal(
        _statistics(working, schemes, outlier, plan, recipe)[name].square_sum, plain[name].square_sum
    )


@pytest.mark.parametrize(("scheme", "seen"), [("MXFP4", 2), ("W4A16G16", 2), ("FP8_STATIC", 8)])
def test_all_samples_are_looked_at_for_static_scales_only(
    scheme: str, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibrate.pipeline._IMPORTANCE_TOKENS", 2 * 16)
    plan, hidden, working = _first_block(tmp_path, scheme)
    schemes, recipe = plan.schemes(plan.blocks[0]), replace(RECIPES["fast"], nsamples=8)
    outlier = hidden.clone()
    outlier[seen - 1, 3, 5] = 1e4
    unseen = hidden.clone()
    unseen[seen:] = 1e4
    plain, changed, same = (
        _statistics(working, schemes, states, plan, recipe)["self_attn.q_proj"].amax
        for states in (hidden, outlier, unseen)
    )
    assert changed > plain == same


@pytest.mark.parametrize(("scheme", "pairs"), [("W4A16G16", True), ("NVFP4", True), ("MXFP4", False), ("FP8", False)])
def test_second_moments_are_there_for_scales_that_descend(
    scheme: str, pairs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibrate.pipeline._IMPORTANCE_TOKENS", 2 * 16)
    plan, hidden, working = _first_block(tmp_path, scheme)
    recipe = replace(RECIPES["rtn"], nsamples=8)
    seen = _statistics(working, plan.schemes(plan.blocks[0]), hidden, plan, recipe)["self_attn.q_proj"]
    assert (seen.second_moments is not None) == pairs
    if seen.second_moments is not None:
        torch.testing.assert_close(seen.second_moments.diagonal(), seen.square_sum)


def test_what_was_made_for_the_verdict_is_not_made_again_but_for_whole_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, hidden, working = _first_block(tmp_path, "W4A16G16")
    expected = hidden.clone()
    working.advance(expected)
    monkeypatch.setattr("calibrate.blocks._PART_TOKENS", 2 * 16)
    marks = torch.full_like(hidden[:3], 7.0)
    assert _advance_quantized(working, hidden, plan.blocks[0].name, plan, marks) == {}
    torch.testing.assert_close(hidden[:6], expected[:6])
    assert (hidden[6:] == 7).all()


def test_what_was_made_of_all_samples_is_not_made_again(tmp_path: Path) -> None:
    plan, hidden, working = _first_block(tmp_path, "W4A16G16")
    marks = torch.full_like(hidden, 7.0)
    _advance_quantized(working, hidden, plan.blocks[0].name, plan, marks)
    assert (hidden == 7).all()


def _first_block(folder: Path, scheme: str) -> tuple[Plan, Tensor, WorkingBlock]:
    """A plan for 8 samples of 16 tokens, what enters the first block, and the block at work."""
    texts = torch.randint(2, 60, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    config = CalibrationConfig(scheme=scheme, dataset=texts, nsamples=8, seqlen=16, batch_size=1, device="cpu")
    source = load_source(str(save_source(folder / "source", llama())), trust_remote_code=False)
    plan = make_plan(source, folder / "out", config)
    hidden, arguments = capture_inputs(source.model, plan.blocks, plan.samples, torch.float32)
    return plan, hidden, Workbench(plan.device, torch.float32).load(plan.blocks[0], arguments[0])


@pytest.mark.parametrize(
    ("device", "amx", "model", "computes"),
    [
        ("cpu", False, torch.bfloat16, torch.float32),
        ("cpu", True, torch.float16, torch.bfloat16),
        ("cpu", True, torch.float32, torch.float32),
        ("cuda", False, torch.float16, torch.bfloat16),
        ("cuda", False, torch.float32, torch.float32),
    ],
)
def test_blocks_run_in_bfloat16_where_that_is_fast(
    device: str, amx: bool, model: torch.dtype, computes: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibrate.plan.has_amx", lambda: amx)
    assert compute_dtype(torch.device(device), model) == computes
