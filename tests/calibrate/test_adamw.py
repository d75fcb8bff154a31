"""AdamW on a layer's values, whatever the rates."""

from __future__ import annotations

import pytest
import torch

from calibrate.adamw import AdamWStep
from calibrate.rounding import MOST_OFFSET, Rounding, fake_quantize, targets
from vllm_autoround.format.scheme import QuantScheme


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["W3A16G32", "W4A16G32_ASYM", "NVFP4A16"])
def test_values_stay_in_their_ranges(scheme: str) -> None:
    weight = torch.randn(8, 64).bfloat16()
    [target] = targets([weight], QuantScheme.parse(scheme).weights)
    rounding = Rounding.nearest(target).clone(torch.float32)
    step, out, finite = AdamWStep(rounding), torch.empty_like(weight), torch.tensor(True)
    for _ in range(4):
        grad, rate = torch.randn(8, 64), torch.tensor([0.8 * MOST_OFFSET, 0.9])
        step(target, rounding, None, grad, rate, out, finite, most_clip=1.5)
        assert torch.equal(out, fake_quantize(target, rounding))
    assert finite
    assert rounding.offset.abs().max() == MOST_OFFSET
    for clip in (rounding.low_clip, rounding.high_clip):
        assert 0 <= clip.min() <= clip.max() <= 1.5
