"""QuantScheme: how one layer is quantized, as a frozen value that is checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_autoround.format.errors import SchemeError

MIN_BITS, MAX_BITS = 2, 8
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """Integer weights under 16-bit (or wider) activations: wNa16.

    Raises:
        SchemeError: a value outside the supported range.
    """

    bits: int
    group_size: int | None  # input features sharing one scale; None: one scale per output row
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise SchemeError(f"weight bits must be {MIN_BITS} to {MAX_BITS}, got {self.bits}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise SchemeError(f"group size must be one of {sizes} or -1 for per channel, got {self.group_size}")

    @classmethod
    def parse(cls, name: str, group_size: int) -> QuantScheme:
        """``"W4A16"`` or ``"W4A16_ASYM"`` with a group size (-1: per channel) -> scheme.

        Raises:
            SchemeError: an unknown name, or a group size that is not supported.
        """
        match = re.fullmatch(r"W(\d+)A16(_ASYM)?", name.upper())
        if not match:
            raise SchemeError(f"unknown scheme {name!r}; known are W2A16 to W8A16, each also with _ASYM")
        return cls(bits=int(match[1]), group_size=None if group_size == -1 else group_size, symmetric=match[2] is None)

    def __str__(self) -> str:
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        return f"W{self.bits}A16 {'symmetric' if self.symmetric else 'asymmetric'} {group}"

    @property
    def max_code(self) -> int:
        """Largest stored code; codes are unsigned, 0 to max_code."""
        return (1 << self.bits) - 1

    @property
    def zero_code(self) -> int:
        """The stored code of weight 0 in a symmetric scheme: 2^(bits-1)."""
        return 1 << (self.bits - 1)

    def group_length(self, in_features: int) -> int:
        """Input features that share one scale in a layer of ``in_features``."""
        return in_features if self.group_size is None else self.group_size

    def groups(self, in_features: int) -> int:
        """Scales per output row of a layer of ``in_features``."""
        return in_features // self.group_length(in_features)

    def check_layer(self, layer: str, in_features: int) -> None:
        """Raise SchemeError unless a layer of ``in_features`` divides into whole groups."""
        if in_features % self.group_length(in_features):
            fitting = [size for size in GROUP_SIZES if in_features % size == 0]
            way_out = f"use a group size of {', '.join(map(str, fitting))}" if fitting else "quantize it per channel"
            raise SchemeError(
                f"{layer}: in_features {in_features} is not a multiple of the group size {self.group_size}; "
                f"{way_out}, or ignore the layer"
            )
