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
    """Sums of 16,384 products of either sign, about 128 in size, as every partial sum at most: each addition errs by up
    to 2^-23 of that, and such errors add up to 128 times one, 2e-5. Rounded to bfloat16 a sum would be off by 1e-3."""
    torch.manual_seed(0)
    left, right = (torch.randn(16_384, 320, device="cuda").to(dtype) for _ in range(2))
    left, right = left[:, 64:192], right[:, :128]
    found = token_products(left, right)
    assert found.dtype == torch.float32
    exact = left.double().T @ right.double()
    assert (found.double() - exact).norm() < 1e-4 * exact.norm()


def test_weights_are_those_of_the_cpu() -> None:
    wanted, shares = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        working = Workbench(torch.device(device), torch.bfloat16).load(Block("block", Pair(64).bfloat16()), {})
        before = working.wanted["up_proj"].cpu().float()
        shares.append(make_up(working, {"up_proj": MXFP4}, correlated(8, 256).bfloat16().to(device))["up_proj"])
        wanted.append(working.wanted["up_proj"].cpu().float())
        assert (wanted[-1] - before).norm() > 2**-5 * before.norm()
    # Four outputs, each rounded to bfloat16, so by up to 2^-9, are in a share, and as much may be left of what cancels.
    assert shares[0] == pytest.approx(shares[1], rel=8 * 2**-9)
    # Both are rounded to bfloat16, by up to 2^-9 each.
    assert (wanted[0] - wanted[1]).norm() <= 2**-8 * wanted[0].norm()
