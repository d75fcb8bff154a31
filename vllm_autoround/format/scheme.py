"""QuantScheme: how one layer is quantized, as a frozen value that is checked once; and the names of all schemes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from vllm_autoround.format import activations
from vllm_autoround.format.activations import ActivationType
from vllm_autoround.format.errors import SchemeError
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, TensorSpec, WeightType

DEFAULT_GROUP_SIZE = 128


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """A weight type and what happens to the activations; None leaves them in 16 bits (or wider)."""

    weights: WeightType
    activations: ActivationType | None = None

    @classmethod
    def parse(cls, name: str, group_size: int | None = None) -> QuantScheme:
        """A scheme by name: ``"W4A16"``, ``"W2A16G64"``, ``"W3A16_ASYM"``, ``"FP8_STATIC"``, ``"NVFP4"`` ...

        Args:
            group_size: of integer weights; -1: per channel; None: what the name says, else 128.

        Raises:
            SchemeError: an unknown name, or a group size that is not supported or contradicts the name.
        """
        match = re.fullmatch(r"W(\d+)A16(?:G(-?\d+))?(_ASYM)?(?:_?G(-?\d+))?", name.upper())
        if match:
            named = [int(size) for size in (match[2], match[4], group_size) if size is not None]
            if len(set(named)) > 1:
                raise SchemeError(f"scheme {name!r} contradicts the group size {named[-1]}; leave one of them out")
            size = named[0] if named else DEFAULT_GROUP_SIZE
            return cls(Integer(bits=int(match[1]), group_size=None if size == -1 else size, symmetric=match[3] is None))
        scheme = NAMED_SCHEMES.get(name.upper())
        if scheme is None:
            raise SchemeError(
                f"unknown scheme {name!r}; known are W2A16 to W8A16, each also with _ASYM and with G64 "
                f"or the like for the group size, {', '.join(NAMED_SCHEMES)}"
            )
        tile = scheme.weights.tile(0, 0).columns
        if group_size is not None and group_size != tile:
            raise SchemeError(f"{name} has no group size to choose, got {group_size}; leave it out")
        return scheme

    def __str__(self) -> str:
        return f"{self.weights}, {self.activations or '16-bit'} activations"

    def check_layer(self, layer: str, rows: int, columns: int) -> None:
        """Raise SchemeError unless the scheme fits a layer [rows, columns]."""
        self.weights.check_layer(layer, rows, columns)

    def specs(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Every tensor of a layer on disk in the compressed-tensors layout, by suffix, its bias aside."""
        specs = self.weights.specs(rows, columns, dtype)
        if self.activations is not None and self.activations.static is not None:
            specs[self.activations.static] = TensorSpec(shape=(1,), dtype=torch.float32)
        return specs


# compressed-tensors' preset names where they exist; FP8_STATIC is auto-round's (FP8 with a scale per output row).
NAMED_SCHEMES = {
    "FP8": QuantScheme(Float8(strategy="tensor"), activations.FP8_TENSOR),
    "FP8_STATIC": QuantScheme(Float8(strategy="channel"), activations.FP8_TENSOR),
    "FP8_DYNAMIC": QuantScheme(Float8(strategy="channel"), activations.FP8_TOKEN),
    "FP8_BLOCK": QuantScheme(Float8(strategy="block"), activations.FP8_GROUP),
    "NVFP4": QuantScheme(NvFp4(), activations.NVFP4),
    "NVFP4A16": QuantScheme(NvFp4()),
    "MXFP4": QuantScheme(Mx(bits=4), activations.MXFP4),
    "MXFP4A16": QuantScheme(Mx(bits=4)),
    "MXFP8": QuantScheme(Mx(bits=8), activations.MXFP8),
    "MXFP8A16": QuantScheme(Mx(bits=8)),
    "W4A8_FP8": QuantScheme(Integer(bits=4, group_size=128), activations.FP8_TOKEN),
    "W4AFP8": QuantScheme(Integer(bits=4, group_size=128), activations.FP8_TOKEN),
}
