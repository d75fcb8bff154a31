"""Integer weights, 2 to 8 bits, symmetric or with zero points, in groups along K or per output row.

Stored codes are unsigned, and a weight is ``scale * (code - zero_point)``; a symmetric type's zero point is 2^(bits-1)
everywhere. Scales may be negative: the larger extreme of a symmetric group, whatever its sign, lands on code 0, the
end of the range that has one more code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_autoround.format import packing
from vllm_autoround.format.errors import SchemeError
from vllm_autoround.format.weights.base import (
    QuantizedWeight,
    TensorSpec,
    Tile,
    WeightType,
    away_from_zero,
    quotient,
    require_dtype,
    require_shape,
)

MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Integer(WeightType):
    """Raises SchemeError for a value outside the supported range."""

    format: ClassVar[str] = "pack-quantized"

    bits: int
    group_size: int | None  # input features sharing one scale; None: one scale per output row
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(f"weight bits must be {MIN_BITS} to {MAX_BITS}, got {self.bits}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise SchemeError(f"group size must be one of {sizes} or -1 for per channel, got {self.group_size}")

    def __str__(self) -> str:
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {group}"

    @property
    def max_code(self) -> int:
        """Largest stored code; codes are unsigned, 0 to max_code."""
        return (1 << self.bits) - 1

    @property
    def zero(self) -> float:
        """The stored code of weight 0 in a symmetric type: 2^(bits-1)."""
        return float(1 << (self.bits - 1))

    def tile(self, rows: int, columns: int) -> Tile:
        return Tile(1, columns if self.group_size is None else self.group_size)

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        if self.group_size is not None and columns % self.group_size:
            fitting = [size for size in GROUP_SIZES if columns % size == 0]
            way_out = f"use a group size of {', '.join(map(str, fitting))}" if fitting else "quantize it per channel"
            raise SchemeError(
                f"{layer}: in_features {columns} is not a multiple of the group size {self.group_size}; "
                f"{way_out}, or ignore the layer"
            )

    def scale_and_zero_point(
        self, low: Tensor, high: Tensor, dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.symmetric:
            return away_from_zero(torch.where(high >= -low, high, low) / -self.zero, dtype), None
        scale = away_from_zero(quotient(high - low, self.max_code), dtype)
        # Rounding the scale down may push the zero point past the last code; hence the clamp.
        return scale, torch.round(-low / scale).clamp(0, self.max_code)

    def round(self, x: Tensor, zero: Tensor | float) -> Tensor:
        # Rounded before the zero point is added: the sum would lose bits of the fraction.
        return (torch.round(x) + zero).clamp(0, self.max_code)

    def within(self, x: Tensor, zero: Tensor | float) -> Tensor:
        code = torch.round(x) + zero
        return code.clamp(0, self.max_code).eq_(code)

    @property
    def signed_scale(self) -> bool:
        return self.symmetric

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()

    def specs(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        factor, (_, groups) = Fraction(32, self.bits), self.tile(rows, columns).tiles(rows, columns)
        along_k = None if self.group_size is None else 1  # a scale per output row is whole on every rank
        words, zero_words = (packing.words_per_row(size, self.bits) for size in (columns, rows))
        specs = {
            "weight_packed": TensorSpec(
                shape=(rows, words), dtype=torch.int32, input_dim=1, output_dim=0, packed_dim=1, pack_factor=factor
            ),
            "weight_scale": TensorSpec(shape=(rows, groups), dtype=dtype, input_dim=along_k, output_dim=0),
            "weight_shape": TensorSpec(shape=(2,), dtype=torch.int64),
        }
        if not self.symmetric:
            specs["weight_zero_point"] = TensorSpec(
                shape=(zero_words, groups),
                dtype=torch.int32,
                input_dim=along_k,
                output_dim=0,
                packed_dim=0,
                pack_factor=factor,
            )
        return specs

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight_packed [N, ceil(K*bits/32)] int32, weight_scale [N, G], weight_shape [2] int64 and, if asymmetric,
        weight_zero_point [ceil(N*bits/32), G] int32, packed along N."""
        tensors = {
            "weight_packed": packing.pack(weight.codes, self.bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if weight.zero_point is not None:
            tensors["weight_zero_point"] = packing.pack(weight.zero_point.T.contiguous(), self.bits).T.contiguous()
        return tensors

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        rows, columns = tensors["weight_shape"].tolist()
        scale = require_shape("weight_scale", tensors["weight_scale"], self.tile(rows, columns).tiles(rows, columns))
        zero_point = None
        if not self.symmetric:
            words = require_dtype("weight_zero_point", tensors["weight_zero_point"], torch.int32)
            require_shape("weight_zero_point", words, (packing.words_per_row(rows, self.bits), scale.shape[1]))
            zero_point = packing.unpack(words.T.contiguous(), self.bits, rows).T.contiguous()
        words = require_dtype("weight_packed", tensors["weight_packed"], torch.int32)
        require_shape("weight_packed", words, (rows, packing.words_per_row(columns, self.bits)))
        codes = packing.unpack(words, self.bits, columns)
        return QuantizedWeight(type=self, codes=codes, scale=scale, zero_point=zero_point)

    def args(self) -> dict[str, Any]:
        grouping = (
            {"strategy": "channel"} if self.group_size is None else {"strategy": "group", "group_size": self.group_size}
        )
        return {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False, **grouping}
