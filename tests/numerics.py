"""The one error budget: twice what a plain bf16 matmul makes on the same dequantized weight, truth in float64."""

import torch
from torch import Tensor


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Worst row of |out - exact| / |exact|, norms along the last dimension."""
    return ((out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def bf16_budget(x: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor) -> float:
    """Twice the error of ``x @ weight.T + bias`` in bfloat16; x [M, K], weight [N, K], exact [M, N] float64."""
    native = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())
    return 2 * relative_error(native, exact)
