"""The oracle: a float32 matmul over what `format.codec` says the weight is. Never optimised; also the CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_autoround.format import codec, packing
from vllm_autoround.format.scheme import QuantScheme


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: QuantScheme,
    bias: Tensor | None = None,
) -> Tensor:
    """``x @ dequantize(weight).T + bias`` in float32, returned in the dtype of ``x``.

    Args:
        x: [..., K], any floating dtype; never quantized.
        packed: [N, ceil(K*bits/32)] int32.
        scale: [N, G].
        zero_point: [ceil(N*bits/32), G] int32, None in symmetric schemes.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    codes = packing.unpack(packed, scheme.bits, x.shape[-1])
    zeros = codec.unpack_zero_point(zero_point, scale, scheme)
    weight = codec.dequantize(codes, scale, zeros, scheme)
    out = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return out.to(x.dtype)
