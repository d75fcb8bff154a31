"""FP8 weights: E4M3 with one scale per output row, per layer, or per 128 x 128 block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vllm_autoround.format.grids import E4M3, FloatGrid
from vllm_autoround.format.weights.base import (
    FloatWeightType,
    QuantizedWeight,
    TensorSpec,
    Tile,
    away_from_zero,
    quotient,
    require_dtype,
    require_shape,
)

BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8(FloatWeightType):
    """E4M3 weights; the strategy is that of compressed-tensors."""

    format: ClassVar[str] = "float-quantized"
    bits: ClassVar[int] = 8
    grid: ClassVar[FloatGrid] = E4M3

    strategy: Literal["channel", "tensor", "block"]

    def __str__(self) -> str:
        return f"fp8 per {self.strategy}"

    def tile(self, rows: int, columns: int) -> Tile:
        match self.strategy:
            case "channel":
                return Tile(1, columns)
            case "tensor":
                return Tile(rows, columns)
            case "block":
                return Tile(BLOCK, BLOCK)

    @property
    def one_scale(self) -> bool:
        return self.strategy == "tensor"

    def scale_and_zero_point(
        self, low: Tensor, high: Tensor, dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return away_from_zero(quotient(torch.maximum(-low, high), E4M3.highest), dtype), None

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.float8_e4m3fn)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()

    def specs(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        match self.strategy:
            case "channel":
                scale = TensorSpec(shape=(rows, 1), dtype=dtype, output_dim=0)
            case "tensor":
                scale = TensorSpec(shape=(1,), dtype=dtype)
            case "block":
                tiles = self.tile(rows, columns).tiles(rows, columns)
                scale = TensorSpec(shape=tiles, dtype=dtype, input_dim=1, output_dim=0)
        weight = TensorSpec(shape=(rows, columns), dtype=torch.float8_e4m3fn, input_dim=1, output_dim=0)
        return {"weight": weight, "weight_scale": scale}

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight [N, K] float8_e4m3fn; weight_scale [N, 1], [1] or [N/128, K/128]."""
        scale = weight.scale.flatten() if self.strategy == "tensor" else weight.scale
        return {"weight": weight.codes.contiguous(), "weight_scale": scale.contiguous()}

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        codes = require_dtype("weight", tensors["weight"], torch.float8_e4m3fn)
        scale = tensors["weight_scale"]
        tiles = self.tile(*codes.shape).tiles(*codes.shape)
        if self.strategy != "block":  # [N], [N, 1], [1] and [] are all in use
            scale = scale.reshape(-1, 1)
        return QuantizedWeight(type=self, codes=codes, scale=require_shape("weight_scale", scale, tiles))

    def args(self) -> dict[str, Any]:
        args = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": self.strategy}
        return {**args, "block_structure": [BLOCK, BLOCK]} if self.strategy == "block" else args
