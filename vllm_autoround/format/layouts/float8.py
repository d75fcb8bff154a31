"""The layouts of auto-round's FP8 checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_autoround.format.layouts.base import LayerShapes, matrix
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Float8, QuantizedWeight, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """compressed-tensors' FP8, but for the name of the scales and the shape [N] of one per output row."""

    scale: str = "weight_scale"  # the suffix

    def specs(self, scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        specs = scheme.specs(rows, columns, dtype)
        scale = specs.pop("weight_scale")
        if isinstance(scheme.weights, Float8) and scheme.weights.strategy == "channel":
            scale = replace(scale, shape=(rows,))
        return {**specs, self.scale: scale}

    def size(self, shapes: LayerShapes, scheme: QuantScheme) -> tuple[int, int]:
        return matrix("weight", shapes)

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight [N, K] float8_e4m3fn and its scales: [N], [1] or [N/128, K/128]."""
        if not isinstance(weight.type, Float8):
            raise ValueError(f"this layout holds FP8 weights only, not {weight.type}")
        tensors = weight.type.to_tensors(weight)
        scale = tensors.pop("weight_scale")
        return {**tensors, self.scale: scale.flatten() if weight.type.strategy == "channel" else scale}

    def from_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        return scheme.weights.from_tensors({**tensors, "weight_scale": tensors[self.scale]})
