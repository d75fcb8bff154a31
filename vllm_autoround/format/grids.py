"""Floating-point element grids: the values that a 4- or 8-bit float can take, and rounding to them.

E2M1 (OCP MX specification 1.0, 5.3.3): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
E4M3 (OCP 8-bit floating point specification, the variant without infinities): up to 448, subnormals of 2^-9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_EXPONENT = 0x7F80_0000  # the exponent bits of a float32


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """Values (1 + m / 2^mantissa_bits) * 2^e with e at least ``min_exponent``, its subnormals, up to ``highest``."""

    mantissa_bits: int
    min_exponent: int
    highest: float

    @property
    def max_exponent(self) -> int:
        """The exponent of ``highest``."""
        return math.frexp(self.highest)[1] - 1

    def spacing(self, x: Tensor) -> Tensor:
        """Distance between the grid's values around each x (float32)."""
        return power_of_two(x.clamp(-self.highest, self.highest)).clamp(min=2.0**self.min_exponent) * (
            2.0**-self.mantissa_bits
        )

    def round(self, x: Tensor) -> Tensor:
        """The nearest value of the grid, ties to even, saturating at ``highest``; float32."""
        clamped = x.clamp(-self.highest, self.highest)
        spacing = self.spacing(clamped)
        return torch.round(clamped / spacing) * spacing


E2M1 = FloatGrid(mantissa_bits=1, min_exponent=0, highest=6.0)
E4M3 = FloatGrid(mantissa_bits=3, min_exponent=-6, highest=448.0)

_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2 |x|) of float32 values, exactly; 0 for zeros and subnormals."""
    return (x.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32)


def e2m1_codes(values: Tensor) -> Tensor:
    """Values of the grid -> codes uint8: the sign in bit 3, the index of the magnitude below it; -0 becomes 0."""
    twice = (values.abs() * 2).to(torch.uint8)  # 0 1 2 3 4 6 8 12
    index = torch.minimum(twice, (twice >> 2) + 4)
    return index | ((values < 0).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """The inverse of `e2m1_codes`: codes uint8 -> values float32."""
    table = torch.tensor([*_E2M1_VALUES, *(-value for value in _E2M1_VALUES)], device=codes.device)
    return table[codes.int()]
