"""Parts of the pipeline that a whole run does not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from calibrate.blocks import capture_inputs
from calibrate.config import RECIPES, CalibrationConfig
from calibrate.pipeline import _statistics
from calibrate.plan import make_plan
from calibrate.source import load_source
from calibrate.workbench import Workbench
from tests.calibrate.exports import llama, save_source


def test_held_out_samples_count_for_ranges_alone(tmp_path: Path) -> None:
    """Scales of activations must cover them; what the weights are fitted to must not know them."""
    texts = torch.randint(2, 60, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    config = CalibrationConfig(scheme="FP8_STATIC", dataset=texts, nsamples=8, seqlen=16, batch_size=1, device="cpu")
    source = load_source(str(save_source(tmp_path / "source", llama())), trust_remote_code=False)
    plan = make_plan(source, tmp_path / "out", config)
    assert plan.heldout == 1
    hidden, arguments = capture_inputs(source.model, plan.blocks, plan.samples, torch.float32)
    working = Workbench(plan.device, torch.float32).load(plan.blocks[0], arguments[0])
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
