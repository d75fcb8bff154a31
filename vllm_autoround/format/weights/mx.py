"""Microscaling weights (OCP MX specification 1.0): E2M1 or E4M3 in groups of 32 along K, a power of two as scale.

The scale's exponent is floor(log2(amax)) minus the element's largest exponent (specification, 6.3), stored in a byte
with a bias of 127 (E8M0). An amax between the largest element and the next power of two saturates; a calibrator may
pass bounds that choose another exponent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_autoround.format import packing
from vllm_autoround.format.grids import E2M1, E4M3, FloatGrid, e2m1_codes, e2m1_values, power_of_two
from vllm_autoround.format.weights.base import (
    FloatWeightType,
    QuantizedWeight,
    TensorSpec,
    Tile,
    require_dtype,
    require_multiple,
    require_shape,
)

GROUP = 32
_BIAS = 127
_LEAST_SCALE = 2.0**-126  # no float32 subnormals
_FORMATS = {4: "mxfp4-pack-quantized", 8: "mxfp8-quantized"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mx(FloatWeightType):
    """MXFP4 or MXFP8."""

    bits: Literal[4, 8]

    def __str__(self) -> str:
        return f"mxfp{self.bits}"

    @property
    def format(self) -> str:
        return _FORMATS[self.bits]

    @property
    def grid(self) -> FloatGrid:
        return E2M1 if self.bits == 4 else E4M3

    def tile(self, rows: int, columns: int) -> Tile:
        return Tile(1, GROUP)

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        require_multiple(layer, columns, GROUP, str(self))

    def scale_and_zero_point(
        self, low: Tensor, high: Tensor, dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        scale = power_of_two(torch.maximum(-low, high)) * 2.0**-self.grid.max_exponent
        return scale.clamp(min=_LEAST_SCALE), None

    def encode(self, values: Tensor) -> Tensor:
        return e2m1_codes(values) if self.bits == 4 else values.to(torch.float8_e4m3fn)

    def decode(self, codes: Tensor) -> Tensor:
        return e2m1_values(codes) if self.bits == 4 else codes.float()

    def stored_scale(self, scale: Tensor, dtype: torch.dtype, global_scale: Tensor | None) -> Tensor:
        return (torch.log2(scale) + _BIAS).round().to(torch.uint8)

    def acting_scale(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:
        return torch.exp2(scale.double() - _BIAS).float()

    def specs(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        scale = TensorSpec(shape=(rows, columns // GROUP), dtype=torch.uint8, input_dim=1, output_dim=0)
        if self.bits == 8:
            weight = TensorSpec(shape=(rows, columns), dtype=torch.float8_e4m3fn, input_dim=1, output_dim=0)
            return {"weight": weight, "weight_scale": scale}
        packed = TensorSpec(
            shape=(rows, columns // 2),
            dtype=torch.uint8,
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            pack_factor=Fraction(2),
        )
        return {"weight_packed": packed, "weight_scale": scale}

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight_packed [N, K/2] uint8 or weight [N, K] float8_e4m3fn; weight_scale [N, K/32] uint8."""
        scale = weight.scale.contiguous()
        if self.bits == 8:
            return {"weight": weight.codes.contiguous(), "weight_scale": scale}
        return {"weight_packed": packing.pack_nibbles(weight.codes), "weight_scale": scale}

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        if self.bits == 8:
            codes = require_dtype("weight", tensors["weight"], torch.float8_e4m3fn)
        else:
            codes = packing.unpack_nibbles(require_dtype("weight_packed", tensors["weight_packed"], torch.uint8))
        scale = require_shape("weight_scale", tensors["weight_scale"], self.tile(*codes.shape).tiles(*codes.shape))
        return QuantizedWeight(type=self, codes=codes, scale=require_dtype("weight_scale", scale, torch.uint8))

    def args(self) -> dict[str, Any]:
        return {
            "num_bits": self.bits,
            "type": "float",
            "symmetric": True,
            "dynamic": False,
            "strategy": "group",
            "group_size": GROUP,
            "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        }
