"""What the kernels on groups of weights have in common: which programs take which groups, and the quantizer itself.

The device functions are those of `calibrate.rounding` and `vllm_autoround.format.weights`, number for number: divisions
are IEEE's (`tl.div_rn`), nothing may be contracted (``enable_fp_fusion=False`` at the launch), and a group is summed in
the order of `ordered_sum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from calibrate.rounding import SUM_CHUNK, Target
from vllm_autoround.format.grids import E2M1, FloatGrid
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, WeightType

_PROGRAM_WEIGHTS = 1024  # that a program holds at once, or one chunk of a longer group
_WARP_WEIGHTS = 256


def supports(target: Target) -> bool:
    """Whether groups are rows, or parts of a row of a power of two."""
    rows, columns = target.tile
    width = target.weight.shape[1]
    return rows == 1 and (columns == width or (width % columns == 0 and columns & (columns - 1) == 0))


@dataclass(frozen=True, slots=True)
class Layout:
    """How a launch is cut."""

    groups: int
    programs: tuple[int]
    warps: int
    constants: dict[str, int]


def layout(target: Target) -> Layout:
    """The cut for a target that a kernel `supports`."""
    group, groups = target.tile.columns, target.bounds.low.numel()
    block = min(triton.next_power_of_2(group), SUM_CHUNK)
    per_program = 1 if group > block else max(1, _PROGRAM_WEIGHTS // block)
    constants = {"GROUP": group, "BLOCK": block, "LEVELS": block.bit_length() - 1, "GROUPS": per_program}
    return Layout(groups, (triton.cdiv(groups, per_program),), per_program * block // _WARP_WEIGHTS, constants)


def type_constants(kind: WeightType) -> dict[str, Any]:
    """The type as the kernel knows it."""
    match kind:
        case Integer():
            name = "symmetric" if kind.symmetric else "asymmetric"
            return {"TYPE": name, "HIGHEST": float(kind.max_code), "ZERO": kind.zero} | _grid_constants(E2M1)
        case Float8(grid=grid):
            name = "fp8"
        case NvFp4(grid=grid):
            name = "nvfp4"
        case Mx(grid=grid):
            name = "mx"
        case _:
            raise TypeError(f"no kernel for {kind}")
    return {"TYPE": name, "HIGHEST": grid.highest, "ZERO": 0.0} | _grid_constants(grid)


def _grid_constants(grid: FloatGrid) -> dict[str, float]:
    return {
        "LEAST_POWER": 2.0**grid.min_exponent,
        "MANTISSA_UNIT": 2.0**-grid.mantissa_bits,
        "TOP_POWER_INVERSE": 2.0**-grid.max_exponent,
    }


@triton.jit
def scale_and_zero(
    low,
    high,
    global_scale,
    dtype: tl.constexpr,
    TYPE: tl.constexpr,
    HIGHEST: tl.constexpr,
    ZERO: tl.constexpr,
    TOP_POWER_INVERSE: tl.constexpr,
):
    """`WeightType.scale_and_zero_point` of [GROUPS]."""
    zero = tl.zeros_like(low) + ZERO
    if TYPE == "symmetric":
        scale = _away_from_zero(tl.where(high >= -low, high, low) * (-1 / ZERO), dtype)
    elif TYPE == "asymmetric":
        scale = _away_from_zero(tl.div_rn(high - low, tl.zeros_like(low) + HIGHEST), dtype)
        zero = clamp(_round(tl.div_rn(-low, scale)), 0.0, HIGHEST)
    elif TYPE == "fp8":
        scale = _away_from_zero(tl.div_rn(tl.maximum(-low, high), tl.zeros_like(low) + HIGHEST), dtype)
    elif TYPE == "nvfp4":
        amax = tl.div_rn(tl.maximum(-low, high), tl.zeros_like(low) + HIGHEST)
        scale = _round_to_grid(global_scale * amax, 448.0, 0.015625, 0.125)
        scale = tl.div_rn(tl.maximum(scale, 0.001953125), tl.zeros_like(low) + global_scale)
    else:
        scale = tl.maximum(_power_of_two(tl.maximum(-low, high)) * TOP_POWER_INVERSE, 2.0**-126)
    return scale, zero


@triton.jit
def divide(w, scale):
    """W / s of [GROUPS, BLOCK], as `torch.div`."""
    return tl.div_rn(w, tl.zeros_like(w) + scale[:, None])


@triton.jit
def times_reciprocal(w, scale):
    """W / s of [GROUPS, BLOCK], as `calibrate.rounding.times_reciprocal`."""
    return w * tl.div_rn(tl.zeros_like(scale) + 1.0, scale)[:, None]


@triton.jit
def quantize(
    position,
    v,
    zero,
    TYPE: tl.constexpr,
    HIGHEST: tl.constexpr,
    LEAST_POWER: tl.constexpr,
    MANTISSA_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
):
    """`calibrate.rounding._quantize` of [GROUPS, BLOCK]: the value less the zero point, and inside."""
    if TYPE == "symmetric" or TYPE == "asymmetric":
        nearest = _round(position + v * UNIT)
        value = clamp(nearest, -zero[:, None], HIGHEST - zero[:, None])
        inside = value == nearest
    else:
        moved = position + v * UNIT * _spacing(tl.minimum(tl.abs(position), HIGHEST), LEAST_POWER, MANTISSA_UNIT)
        inside = tl.abs(moved) <= HIGHEST
        value = _round_to_grid(moved, HIGHEST, LEAST_POWER, MANTISSA_UNIT)
    return value, inside


@triton.jit
def _away_from_zero(scale, dtype: tl.constexpr):
    scale = tl.where(scale < 0, tl.minimum(scale, -1e-5), tl.maximum(scale, 1e-5))
    return scale.to(dtype).to(tl.float32)


@triton.jit
def _round(x):
    """To the nearest whole number, ties to even, if |x| < 2^22; a larger x stays as large."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23, where float32 has no fractions


@triton.jit
def _power_of_two(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _spacing(x, LEAST_POWER: tl.constexpr, MANTISSA_UNIT: tl.constexpr):
    """Between the values of the grid at x, which is inside it."""
    return tl.maximum(_power_of_two(x), LEAST_POWER) * MANTISSA_UNIT


@triton.jit
def _round_to_grid(x, HIGHEST: tl.constexpr, LEAST_POWER: tl.constexpr, MANTISSA_UNIT: tl.constexpr):
    x = clamp(x, -HIGHEST, HIGHEST)
    spacing = _spacing(x, LEAST_POWER, MANTISSA_UNIT)
    inverse = (0x7F000000 - spacing.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # of a power of two
    return _round(x * inverse) * spacing


@triton.jit
def neighbour_sum(x, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """[GROUPS, BLOCK] -> [GROUPS] in the order of `ordered_sum`: two numbers have one sum, whatever the layout."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [x.shape[0], BLOCK >> (level + 1), 2]), axis=2)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def clamp(x, least, most):
    """Into [least, most]."""
    return tl.minimum(tl.maximum(x, least), most)


@triton.jit
def sign(x):
    """-1, 0 or 1, and 0 for NaN."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
