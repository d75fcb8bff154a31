"""NVFP4 weights: E2M1 in groups of 16 along K, an E4M3 scale each, and one float32 global scale.

The acting scale is ``scale / global_scale``; the global scale, 448 * 6 / amax of the layer, puts the scale of its
largest group at the top of E4M3. Layers that vLLM fuses must share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_autoround.format import packing
from vllm_autoround.format.grids import E2M1, E4M3, FloatGrid, e2m1_codes, e2m1_values
from vllm_autoround.format.weights.base import (
    FloatWeightType,
    QuantizedWeight,
    TensorSpec,
    Tile,
    quotient,
    require_dtype,
    require_multiple,
    require_shape,
)

GROUP = 16
_LEAST_SCALE = 2.0**-9  # the least positive E4M3 number


def global_scale(amax: Tensor) -> Tensor:
    """448 * 6 / amax, [1] float32, of a largest magnitude (scalar).

    1 where that is not finite: a layer that saw nothing but zeros must not take everything else for overflow.
    """
    divisor = E4M3.highest * E2M1.highest / amax.float()
    return torch.where(divisor.isfinite(), divisor, 1.0).reshape(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NvFp4(FloatWeightType):
    """NVIDIA's two-level 4-bit float."""

    format: ClassVar[str] = "nvfp4-pack-quantized"
    bits: ClassVar[int] = 4
    grid: ClassVar[FloatGrid] = E2M1

    def __str__(self) -> str:
        return "nvfp4"

    def tile(self, rows: int, columns: int) -> Tile:
        return Tile(1, GROUP)

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        require_multiple(layer, columns, GROUP, str(self))

    def global_scale(self, amax: Tensor) -> Tensor | None:
        return global_scale(amax)

    def scale_and_zero_point(
        self, low: Tensor, high: Tensor, dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert global_scale is not None
        # In this order, which decides ties as compressed-tensors does.
        amax = torch.maximum(-low, high)
        scale = E4M3.round(global_scale * quotient(amax, E2M1.highest)).clamp(min=_LEAST_SCALE)
        return scale / global_scale, None

    def encode(self, values: Tensor) -> Tensor:
        return e2m1_codes(values)

    def decode(self, codes: Tensor) -> Tensor:
        return e2m1_values(codes)

    def stored_scale(self, scale: Tensor, dtype: torch.dtype, global_scale: Tensor | None) -> Tensor:
        assert global_scale is not None
        return (scale * global_scale).to(torch.float8_e4m3fn)

    def acting_scale(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:
        assert global_scale is not None
        return scale.float() / global_scale

    def specs(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {
            "weight_packed": TensorSpec(
                shape=(rows, columns // 2),
                dtype=torch.uint8,
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                pack_factor=Fraction(2),
            ),
            "weight_scale": TensorSpec(
                shape=(rows, columns // GROUP), dtype=torch.float8_e4m3fn, input_dim=1, output_dim=0
            ),
            "weight_global_scale": TensorSpec(shape=(1,), dtype=torch.float32),
        }

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight_packed [N, K/2] uint8, weight_scale [N, K/16] float8_e4m3fn, weight_global_scale [1] float32."""
        assert weight.global_scale is not None
        return {
            "weight_packed": packing.pack_nibbles(weight.codes),
            "weight_scale": weight.scale.contiguous(),
            "weight_global_scale": weight.global_scale.float().reshape(1),
        }

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        codes = packing.unpack_nibbles(require_dtype("weight_packed", tensors["weight_packed"], torch.uint8))
        scale = require_shape("weight_scale", tensors["weight_scale"], self.tile(*codes.shape).tiles(*codes.shape))
        require_dtype("weight_scale", scale, torch.float8_e4m3fn)
        divisor = require_shape("weight_global_scale", tensors["weight_global_scale"].float().flatten(), (1,))
        return QuantizedWeight(type=self, codes=codes, scale=scale, global_scale=divisor)

    def args(self) -> dict[str, Any]:
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "dynamic": False,
            "strategy": "tensor_group",
            "group_size": GROUP,
            "scale_dtype": "torch.float8_e4m3fn",
            "zp_dtype": "torch.float8_e4m3fn",
        }
