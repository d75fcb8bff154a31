"""Making up for the noise of quantized inputs on a GPU, where sums over tokens are the tensor cores'."""

from __future__ import annotations

import pytest
import torch

from calibrate.activations import token_products
from calibrate.blocks import Block
from calibrate.input_noise import make_up
from calibrate.workbench import Workbench
from tests.calibrate.test_input_noise import MXFP4, Pair, correlated

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Products of 16-bit factors are exact in float32; in a sum of 16,384 each addition errs by 2^-23 at most."""
    torch.manual_seed(0)
    left, right = (torch.randn(16_384, 320, device="cuda").to(dtype) for _ in range(2))
    left, right = left[:, 64:192], right[:, :128]
    found = token_products(left, right)
    assert found.dtype == torch.float32
    exact = left.double().T @ right.double()
    most = left.double().abs().T @ right.double().abs()
    assert ((found.double() - exact).abs() <= 16_384 * 2.0**-23 * most).all()
    assert (found.double() - exact).norm() < 1e-4 * exact.norm()


def test_weights_are_those_of_the_cpu() -> None:
    wanted, shares = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        working = Workbench(torch.device(device), torch.bfloat16).load(Block("block", Pair(64).bfloat16()), {})
        before = working.wanted["up_proj"].cpu().float()
        shares.append(make_up(working, {"up_proj": MXFP4}, correlated(8, 256).bfloat16().to(device)))
        wanted.append(working.wanted["up_proj"].cpu().float() - before)
    assert shares[0] == pytest.approx(shares[1], rel=1e-2)
    # Both changes are rounded to bfloat16 with the weight, by up to 2^-9 of it, and sum in orders of their own.
    assert (wanted[0] - wanted[1]).norm() < 0.02 * wanted[0].norm()
