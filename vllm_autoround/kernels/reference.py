"""The oracle: a float32 matmul over what `format.weights` says the weight is. Never optimised; also the CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    scheme: QuantScheme,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``quantize(x) @ dequantize(weight).T + bias`` in float32, returned in the dtype of ``x``.

    Args:
        x: [..., K], any floating dtype; quantized only if the scheme says so.
        weight: of shape [N, K].
        input_scale: [1] float32, the checkpoint's scalar of static activation types.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    values = x.float() if scheme.activations is None else scheme.activations.fake_quantize(x, input_scale)
    out = torch.nn.functional.linear(values, weight.dequantize(), None if bias is None else bias.float())
    return out.to(x.dtype)
