"""What a quantized checkpoint means: weights -> codes, scales and zero points, and back, in float32.

Shapes: N output rows, K input features, G groups along K, g = K / G features sharing a scale. Codes are unsigned; a
weight is ``scale * (code - zero_point)`` and a symmetric scheme's zero point is 2^(bits-1) everywhere, so that one
formula serves both. Scales may be negative: the larger extreme of a symmetric group, whatever its sign, lands on code
0, the end of the range that has one more code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_autoround.format import packing
from vllm_autoround.format.scheme import QuantScheme

MIN_SCALE = 1e-5  # magnitude; keeps W/s finite in an all-zero group (auto-round, data_type/int.py)


def group_bounds(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each group, widened to include 0: [N, K] -> two [N, G] float32."""
    grouped = _grouped(weight.float(), scheme)
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def scale_and_zero_point(low: Tensor, high: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale and zero point that cover [low, high], low <= 0 <= high.

    Args:
        low, high: [N, G] float32 bounds of each group.
        dtype: the type that scales are stored in; the result is rounded to it.

    Returns:
        scale [N, G] float32 (values of ``dtype``) and zero point [N, G] float32 (whole numbers, 0 to max_code).
    """
    if scheme.symmetric:
        scale = torch.where(high >= -low, high, low) / -scheme.zero_code
    else:
        scale = (high - low) / scheme.max_code
    scale = torch.where(scale < 0, scale.clamp(max=-MIN_SCALE), scale.clamp(min=MIN_SCALE)).to(dtype).float()
    if scheme.symmetric:
        return scale, torch.full_like(scale, scheme.zero_code)
    # Rounding the scale down may push the zero point past the last code; hence the clamp.
    return scale, torch.round(-low / scale).clamp(0, scheme.max_code)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """Round to the nearest code: weight [N, K], scale and zero point [N, G] -> codes [N, K] uint8."""
    codes = torch.round(_grouped(weight.float(), scheme) / scale[..., None]) + zero_point[..., None]
    return codes.clamp(0, scheme.max_code).flatten(-2).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """codes [N, K] uint8, scale and zero point [N, G] -> weight [N, K] float32."""
    centred = _grouped(codes.float(), scheme) - zero_point.float()[..., None]
    return (scale.float()[..., None] * centred).flatten(-2)


def _grouped(tensor: Tensor, scheme: QuantScheme) -> Tensor:
    """[N, K] -> [N, G, g]."""
    return tensor.unflatten(-1, (-1, scheme.group_length(tensor.shape[-1])))


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One layer's weight as the checkpoint holds it, unpacked."""

    scheme: QuantScheme
    codes: Tensor  # [N, K] uint8
    scale: Tensor  # [N, G], the dtype it is stored in
    zero_point: Tensor  # [N, G] uint8; a constant in symmetric schemes, where it is not stored

    def dequantize(self) -> Tensor:
        """The weight [N, K] float32 that the checkpoint stands for."""
        return dequantize(self.codes, self.scale, self.zero_point, self.scheme)

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors on disk by suffix (compressed-tensors' pack-quantized layout).

        weight_packed [N, ceil(K*bits/32)] int32, weight_scale [N, G], weight_shape [2] int64 and, if asymmetric,
        weight_zero_point [ceil(N*bits/32), G] int32, packed along N.
        """
        bits = self.scheme.bits
        tensors = {
            "weight_packed": packing.pack(self.codes, bits),
            "weight_scale": self.scale.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if not self.scheme.symmetric:
            tensors["weight_zero_point"] = packing.pack(self.zero_point.T.contiguous(), bits).T.contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        """The inverse of `tensors`.

        Raises:
            KeyError: a tensor that the scheme needs is missing.
            ValueError: a shape that does not fit the scheme.
        """
        rows, columns = tensors["weight_shape"].tolist()
        scale = tensors["weight_scale"]
        if tuple(scale.shape) != (rows, scheme.groups(columns)):
            raise ValueError(f"weight_scale has shape {list(scale.shape)}, expected {[rows, scheme.groups(columns)]}")
        codes = packing.unpack(tensors["weight_packed"], scheme.bits, columns)
        return cls(scheme, codes, scale, unpack_zero_point(tensors.get("weight_zero_point"), scale, scheme))


def unpack_zero_point(words: Tensor | None, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Zero points [N, G] uint8 from their words [ceil(N*bits/32), G] int32, or the constant of a symmetric scheme.

    Args:
        scale: [N, G], whose shape and device the result has.

    Raises:
        KeyError: an asymmetric scheme without words.
    """
    if scheme.symmetric:
        return torch.full_like(scale, scheme.zero_code, dtype=torch.uint8)
    if words is None:
        raise KeyError("weight_zero_point")
    return packing.unpack(words.T.contiguous(), scheme.bits, scale.shape[0]).T.contiguous()
