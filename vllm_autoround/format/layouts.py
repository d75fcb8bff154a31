"""Layouts: the tensors in which a dialect keeps one quantized layer. Each is read into, and written from, the same
`QuantizedWeight`, so that what a checkpoint means does not depend on its dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight, TensorSpec


class Layout(Protocol):
    """How one layer's weight is written as tensors."""

    def specs(self, scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Every tensor of a layer [rows, columns] by suffix, its bias aside; ``dtype`` is the model's."""
        ...

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The weight's tensors by suffix."""
        ...

    def from_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        """The inverse of `to_tensors`.

        Raises:
            KeyError: a tensor that the scheme needs is missing.
            ValueError: a shape that does not fit the scheme.
        """
        ...


class CompressedTensors:
    """The layout of our own checkpoints, for every weight type; integer codes are dense along K."""

    def specs(self, scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return scheme.specs(rows, columns, dtype)

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return weight.type.to_tensors(weight)

    def from_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        return scheme.weights.from_tensors(tensors)


COMPRESSED_TENSORS = "compressed-tensors"
LAYOUTS: dict[str, Layout] = {COMPRESSED_TENSORS: CompressedTensors()}
