"""What every weight type has in common: groups, the quantizer's interface, and the tensors of one layer.

Shapes: N output rows, K input features; a group is a tile of the weight that shares a scale. Scales form a matrix
[R, C], R tiles along N and C along K.

A weight stands for ``scale * (value - zero_point)``: ``value`` from the type's grid (whole numbers, E2M1 or E4M3), the
scale as it acts, with any global scale already in it. A new weight type is one subclass of `WeightType` in a file of
its own and one row in `vllm_autoround.format.scheme`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_autoround.format.errors import SchemeError
from vllm_autoround.format.grids import FloatGrid

MIN_SCALE = 1e-5  # magnitude; keeps W/s finite in an all-zero group (auto-round, data_type/int.py)


class Tile(NamedTuple):
    """The shape of one group."""

    rows: int
    columns: int

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """[R, C]: tiles of a weight [rows, columns]; the last ones may be ragged."""
        return -(-rows // self.rows), -(-columns // self.columns)

    def split(self, weight: Tensor) -> Tensor:
        """[N, K] -> [R, tile rows, C, tile columns]; ragged tiles are filled up with zeros."""
        rows, columns = weight.shape
        if rows % self.rows or columns % self.columns:
            weight = F.pad(weight, (0, -columns % self.columns, 0, -rows % self.rows))
        return weight.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))

    def merge(self, tiles: Tensor, shape: torch.Size | tuple[int, int]) -> Tensor:
        """The inverse of `split`: -> [N, K]."""
        return tiles.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


class Bounds(NamedTuple):
    """Least and greatest value of each group, widened to include 0: [R, C] float32 each."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a layer on disk, as a loader must know it to cut it for tensor parallelism."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    input_dim: int | None = None  # the dimension along K; None: the same for every part of K
    output_dim: int | None = None  # the dimension along N
    packed_dim: int | None = None  # the dimension along which several values share an element
    pack_factor: Fraction = Fraction(1)  # values an element

    @property
    def scalar(self) -> bool:
        """One number for the whole layer, so that fused layers have one of it each."""
        return self.input_dim is None and self.output_dim is None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One layer's weight as the checkpoint holds it, unpacked."""

    type: WeightType
    codes: Tensor  # [N, K]: uint8 bit patterns, or float8_e4m3fn
    scale: Tensor  # [R, C], the dtype it is stored in
    zero_point: Tensor | None = None  # [R, C] uint8, of asymmetric integers only
    global_scale: Tensor | None = None  # [1] float32, a divisor, of NVFP4 only

    def dequantize(self) -> Tensor:
        """The weight [N, K] float32 that the checkpoint stands for."""
        tile = self.type.tile(*self.codes.shape)
        values = tile.split(self.type.decode(self.codes))
        scale = self.type.acting_scale(self.scale, self.global_scale)[:, None, :, None]
        zero = self.type.zero if self.zero_point is None else self.zero_point.float()[:, None, :, None]
        return tile.merge(scale * (values - zero), self.codes.shape)


class WeightType(ABC):
    """How the weights of a layer are stored; subclasses are frozen dataclasses."""

    __slots__ = ()

    @property
    @abstractmethod
    def format(self) -> str:
        """compressed-tensors' name of the layout on disk."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one code."""

    @property
    def symmetric(self) -> bool:
        """Whether no zero point is stored."""
        return True

    @property
    def zero(self) -> float:
        """The grid's value of weight 0 where no zero point is stored."""
        return 0.0

    @abstractmethod
    def tile(self, rows: int, columns: int) -> Tile:
        """The group's shape in a layer [rows, columns]."""

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """Raise SchemeError, naming the way out, unless the type fits a layer [rows, columns]."""
        return

    def bounds(self, weight: Tensor) -> Bounds:
        """The range [R, C] of each group of weight [N, K]."""
        tiles = self.tile(*weight.shape).split(weight.float())
        return Bounds(tiles.amin((1, 3)).clamp(max=0), tiles.amax((1, 3)).clamp(min=0))

    def global_scale(self, amax: Tensor) -> Tensor | None:
        """The layer's global scale [1] float32 for its largest magnitude (a scalar), None if the type has none."""
        return None

    # The quantizer. All of it is float32 and works on [R, C] scales or on [R, rows, C, columns] values.

    @abstractmethod
    def scale_and_zero_point(
        self, low: Tensor, high: Tensor, dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The acting scale and the zero point (None: `zero`) that cover [low, high], low <= 0 <= high: [R, C] each.

        Args:
            dtype: of the model; scales are rounded to what they are stored in.
        """

    @abstractmethod
    def round(self, x: Tensor, zero: Tensor | float) -> Tensor:
        """The value of the grid nearest to x = W / s, moved by the zero point, saturating."""

    @abstractmethod
    def within(self, x: Tensor, zero: Tensor | float) -> Tensor:
        """1 where `round` does not saturate, else 0, as for NaN; float32, which is faster on a CPU than bool."""

    def spacing(self, x: Tensor) -> Tensor | float:
        """Distance of the grid's values around x."""
        return 1.0

    @property
    def one_scale(self) -> bool:
        """One scale a layer, which layers that vLLM fuses must share."""
        return False

    @property
    def signed_scale(self) -> bool:
        """The scale has the sign of whichever bound is larger, negated; else it is positive."""
        return False

    # Storage.

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Values of the grid [N, K] float32 -> codes."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The inverse of `encode`."""

    def stored_scale(self, scale: Tensor, dtype: torch.dtype, global_scale: Tensor | None) -> Tensor:
        """An acting scale [R, C] of `scale_and_zero_point`, exactly, as it is stored; here in the model's dtype."""
        return scale.to(dtype)

    def acting_scale(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:
        """The inverse of `stored_scale`: [R, C] float32."""
        return scale.float()

    @abstractmethod
    def specs(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The layer's tensors on disk in the compressed-tensors layout, by suffix; ``dtype`` is the model's."""

    @abstractmethod
    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `specs` describes."""

    @abstractmethod
    def from_tensors(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The inverse of `to_tensors`.

        Raises:
            KeyError: a tensor that the type needs is missing.
            ValueError: a shape that does not fit the type.
        """

    @abstractmethod
    def args(self) -> dict[str, Any]:
        """compressed-tensors' QuantizationArgs."""


class FloatWeightType(WeightType):
    """A weight type whose values are those of a floating-point grid."""

    __slots__ = ()

    @property
    @abstractmethod
    def grid(self) -> FloatGrid:
        """The element type."""

    def round(self, x: Tensor, zero: Tensor | float) -> Tensor:
        return self.grid.round(x)

    def within(self, x: Tensor, zero: Tensor | float) -> Tensor:
        return x.abs().le_(self.grid.highest)

    def spacing(self, x: Tensor) -> Tensor:
        return self.grid.spacing(x)


def quantize(weight: Tensor, type_: WeightType, global_scale: Tensor | None = None) -> QuantizedWeight:
    """Round weight [N, K] to nearest over its full range; scales in the dtype of ``weight`` where the type allows it.

    Args:
        global_scale: [1] float32, shared with other layers; None: the layer's own.
    """
    low, high = type_.bounds(weight)
    if global_scale is None:
        global_scale = type_.global_scale(torch.maximum(-low, high).amax())
    scale, zero = type_.scale_and_zero_point(low, high, weight.dtype, global_scale)
    tile = type_.tile(*weight.shape)
    offset = type_.zero if zero is None else zero[:, None, :, None]
    values = type_.round(tile.split(weight.float()) / scale[:, None, :, None], offset)
    return store(tile.merge(values, weight.shape), scale, zero, type_, weight.dtype, global_scale)


def store(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    type_: WeightType,
    dtype: torch.dtype,
    global_scale: Tensor | None,
) -> QuantizedWeight:
    """Grid values [N, K], acting scale and zero point [R, C] -> the weight as it goes to disk."""
    return QuantizedWeight(
        type=type_,
        codes=type_.encode(values),
        scale=type_.stored_scale(scale, dtype, global_scale),
        zero_point=None if zero is None else zero.to(torch.uint8),
        global_scale=global_scale,
    )


def away_from_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A signed scale with a magnitude of at least MIN_SCALE, rounded to ``dtype``; float32."""
    return torch.where(scale < 0, scale.clamp(max=-MIN_SCALE), scale.clamp(min=MIN_SCALE)).to(dtype).float()


def quotient(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, correctly rounded; by a Python number, torch multiplies by its reciprocal on a GPU."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``tensor``, if it has that shape.

    Raises:
        ValueError: it has another.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor``, if it has that dtype.

    Raises:
        ValueError: it has another.
    """
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    return tensor


def require_multiple(layer: str, columns: int, group: int, name: str) -> None:
    """Raise SchemeError unless ``columns`` input features divide into groups of ``group``."""
    if columns % group:
        raise SchemeError(
            f"{layer}: in_features {columns} is not a multiple of {group}, the group of {name}; ignore the layer or "
            "use a scheme with another group"
        )
