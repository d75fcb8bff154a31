"""Rows of a packed weight, dequantized: what an embedding needs. Plain torch that torch.compile can trace.

Shapes: V rows, K features, W words or bytes a row; scales [R, C] as in `format.weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_autoround.format import packing
from vllm_autoround.format.grids import e2m1_values
from vllm_autoround.format.weights import Float8, Integer, QuantizedWeight


class PackedRows(torch.nn.Module):
    """A weight [V, K], packed as in the checkpoint (FP8: as it is), of which single rows are asked for."""

    group: Tensor
    scale: Tensor
    zero_point: Tensor | None
    packed: Tensor
    word: Tensor
    shift: Tensor
    values: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        type_, (rows, columns) = weight.type, weight.codes.shape
        tile = type_.tile(rows, columns)
        device = weight.codes.device
        features = torch.arange(columns, device=device)
        self.tile_rows = tile.rows
        self.bits = type_.bits
        self.zero = type_.zero
        self.integer = isinstance(type_, Integer)
        self._store("group", features // tile.columns)  # [K]
        self._store("scale", type_.acting_scale(weight.scale, weight.global_scale))  # [R, C] float32
        self._store("zero_point", weight.zero_point)  # [R, C] or None
        if self.integer:
            # One word more, for the codes that straddle two.
            words = torch.nn.functional.pad(packing.pack(weight.codes, type_.bits), (0, 1))
            self._store("packed", words)  # [V, W + 1] int32
            self._store("word", features * type_.bits // 32)  # [K]
            self._store("shift", (features * type_.bits % 32).int())  # [K]
        elif isinstance(type_, Float8) or type_.bits == 8:
            self._store("packed", weight.codes)  # [V, K] float8_e4m3fn
        else:
            self._store("packed", packing.pack_nibbles(weight.codes))  # [V, K/2] uint8
            self._store("values", e2m1_values(torch.arange(16, device=device)))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> rows [..., K] float32, equal to those of `QuantizedWeight.dequantize`."""
        group = (ids // self.tile_rows)[..., None], self.group
        zero = self.zero if self.zero_point is None else self.zero_point[group].float()
        return self.scale[group] * (self._decode(ids) - zero)

    def _decode(self, ids: Tensor) -> Tensor:
        rows = self.packed[ids]
        if self.integer:
            # In 64 bits, so that the upper word can be shifted over the lower one and neither has a sign.
            lower = rows[..., self.word].long() & 0xFFFF_FFFF
            upper = rows[..., self.word + 1].long() << 32
            return (((lower | upper) >> self.shift) & ((1 << self.bits) - 1)).float()
        if self.bits == 8:
            return rows.float()
        return self.values[torch.stack([rows & 15, rows >> 4], dim=-1).flatten(-2).int()]

    def _store(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)
