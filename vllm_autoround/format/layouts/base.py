"""What every layout has in common: its interface, and sizes read from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer, QuantizedWeight, TensorSpec, WeightType

LayerShapes = Mapping[str, tuple[int, ...]]  # of one layer's tensors, by suffix


class Layout(Protocol):
    """How one layer's weight is written as tensors."""

    def specs(self, scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Every tensor of a layer [rows, columns] by suffix, its bias aside; ``dtype`` is the model's."""
        ...

    def size(self, shapes: LayerShapes, scheme: QuantScheme) -> tuple[int, int]:
        """[rows, columns] of a layer whose tensors have these shapes.

        Where the last word of a row may be partly filled and nothing else tells, it is taken to be full.

        Raises:
            KeyError: a tensor that the scheme needs is missing.
            ValueError: shapes that do not fit the scheme or each other, a ragged last group among them.
        """
        ...

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The weight's tensors by suffix.

        Raises:
            ValueError: a weight that the layout cannot express.
        """
        ...

    def from_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        """The inverse of `to_tensors`.

        Raises:
            KeyError: a tensor that the scheme needs is missing.
            ValueError: a shape that does not fit the scheme, or contents that cannot be what was meant.
        """
        ...


def integer(type_: WeightType) -> Integer:
    """The integer type that a layout of integers is asked to hold; raises ValueError for another."""
    if not isinstance(type_, Integer):
        raise ValueError(f"this layout holds integer weights only, not {type_}")
    return type_


def matrix(suffix: str, shapes: LayerShapes) -> tuple[int, int]:
    """The shape of a tensor that must have two dimensions."""
    shape = shapes[suffix]
    if len(shape) != 2:
        raise ValueError(f"{suffix} has shape {list(shape)}, expected two dimensions")
    return shape[0], shape[1]


def group_columns(type_: Integer, groups: int, least: int, most: int) -> int:
    """Input features of a layer with so many groups, whose words hold ``least`` to ``most`` of them."""
    if type_.group_size is None:
        if groups != 1:
            raise ValueError(f"{groups} scales a row, expected one for {type_}")
        return most
    columns = groups * type_.group_size
    if least <= columns <= most:
        return columns
    if columns - type_.group_size < most < columns:
        raise ValueError(
            f"the last group is ragged: {most} input features in {groups} groups of {type_.group_size}, whose last is "
            f"not full. Readers disagree on such layers; quantize again with a group size that divides {most}, or "
            "leave the layer out"
        )
    raise ValueError(f"the codes of {most} input features do not fit {groups} groups of {type_.group_size} ({type_})")
