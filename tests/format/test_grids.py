"""Element grids: tables written by hand, every neighbouring pair's midpoint, and torch's own float8 cast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_autoround.format.grids import E2M1, E4M3, FloatGrid, e2m1_codes, e2m1_values, power_of_two

# Code -> value, OCP MX specification 1.0, table 5: sign, two exponent bits with a bias of 1, one mantissa bit.
E2M1_TABLE = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
# Some of E4M3's 256, from the OCP specification: bias 7, no infinities, 0x7F is not a number.
E4M3_TABLE = {
    0x00: 0.0,
    0x01: 2.0**-9,  # the least subnormal
    0x07: 7 * 2.0**-9,
    0x08: 2.0**-6,  # the least normal number
    0x38: 1.0,
    0x39: 1.125,
    0x40: 2.0,
    0x7E: 448.0,
    0xB8: -1.0,
    0xFE: -448.0,
}
FINITE_E4M3 = [code for code in range(256) if code & 0x7F != 0x7F]


def grid_values(grid: FloatGrid) -> torch.Tensor:
    """The grid's values from -highest to highest, ascending, by the definition of a float."""
    magnitudes = {0.0}
    for exponent in range(grid.min_exponent, grid.max_exponent + 1):
        for mantissa in range(1 << grid.mantissa_bits):
            fraction = mantissa * 2.0**-grid.mantissa_bits
            magnitudes |= {(1 + fraction) * 2.0**exponent, fraction * 2.0**grid.min_exponent}
    kept = sorted(value for value in magnitudes if value <= grid.highest)
    return torch.tensor([-value for value in reversed(kept[1:])] + kept)


def test_e2m1_table() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert e2m1_values(codes).tolist() == E2M1_TABLE
    assert e2m1_codes(torch.tensor(E2M1_TABLE)).tolist() == [*range(8), 0, *range(9, 16)]  # -0 becomes 0


def test_e4m3_table() -> None:
    codes = torch.tensor(list(E4M3_TABLE), dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert codes.float().tolist() == list(E4M3_TABLE.values())


@pytest.mark.parametrize(("grid", "count"), [(E2M1, 15), (E4M3, 253)], ids=["E2M1", "E4M3"])
def test_all_values_of_a_grid_stay_as_they_are(grid: FloatGrid, count: int) -> None:
    values = grid_values(grid)
    assert len(values) == count
    assert torch.equal(grid.round(values), values)


def test_e4m3_holds_what_torch_holds() -> None:
    bits = torch.tensor(FINITE_E4M3, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(bits.unique(), grid_values(E4M3))


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (0.25, 0.0),
        (0.75, 1.0),
        (1.25, 1.0),
        (1.75, 2.0),
        (2.5, 2.0),
        (3.5, 4.0),
        (5.0, 4.0),  # the seven ties, to the even mantissa
        (0.2500001, 0.5),
        (4.9999995, 4.0),
        (5.0000005, 6.0),
        (6.5, 6.0),
        (1e30, 6.0),
        (float("inf"), 6.0),
        (1e-45, 0.0),
    ],
)
def test_e2m1_rounding(x: float, rounded: float) -> None:
    assert E2M1.round(torch.tensor([x, -x])).tolist() == [rounded, -rounded]


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (2.0**-10, 0.0),  # tie between 0 and the least subnormal
        (3 * 2.0**-10, 2 * 2.0**-9),  # tie between odd 1 and even 2
        (1.0625, 1.0),
        (1.1875, 1.25),
        (232.0, 224.0),
        (248.0, 256.0),  # tie across a power of two
        (447.0, 448.0),
        (464.0, 448.0),
        (480.0, 448.0),  # would be 0x7F, which is not a number
        (float("inf"), 448.0),
        (1e-45, 0.0),
    ],
)
def test_e4m3_rounding(x: float, rounded: float) -> None:
    assert E4M3.round(torch.tensor([x, -x])).tolist() == [rounded, -rounded]


@pytest.mark.parametrize("grid", [E2M1, E4M3], ids=["E2M1", "E4M3"])
def test_ties_go_to_even_and_a_hair_off_a_tie_to_the_nearest(grid: FloatGrid) -> None:
    values = grid_values(grid)
    lower, upper = values[:-1], values[1:]
    middle = (lower + upper) / 2  # exact: one more mantissa bit
    is_even = [index % 2 == (len(values) // 2) % 2 for index in range(len(lower))]  # 0 has an even mantissa
    assert torch.equal(grid.round(middle), torch.where(torch.tensor(is_even), lower, upper))
    assert torch.equal(grid.round(torch.nextafter(middle, lower)), lower)
    assert torch.equal(grid.round(torch.nextafter(middle, upper)), upper)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(x=st.floats(width=32, allow_nan=False))
def test_e4m3_rounds_as_torch_does_below_saturation(x: float) -> None:
    given_ = torch.tensor([x]).clamp(-448, 448)
    assert torch.equal(E4M3.round(given_), given_.to(torch.float8_e4m3fn).float())


@settings(deadline=None, derandomize=True, max_examples=200)
@given(x=st.floats(-7, 7, width=32))
def test_no_value_of_the_grid_is_nearer(x: float) -> None:
    rounded = E2M1.round(torch.tensor([x])).item()
    assert all(abs(x - rounded) <= abs(x - value) for value in E2M1_TABLE)


def test_spacing() -> None:
    x = torch.tensor([0.0, 0.3, 1.0, 1.9, 2.0, -3.9, 4.0, 6.0, 100.0])
    assert E2M1.spacing(x).tolist() == [0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 2.0]
    x = torch.tensor([0.0, 2.0**-9, 2.0**-6, 2.0**-5, 1.0, 256.0, 1e9])
    assert E4M3.spacing(x).tolist() == [2.0**-9, 2.0**-9, 2.0**-9, 2.0**-8, 0.125, 32.0, 32.0]


def test_power_of_two_is_exact() -> None:
    below_eight = torch.nextafter(torch.tensor(8.0), torch.tensor(0.0))  # its log2 rounds to 3
    x = torch.tensor([0.0, 1e-45, 2.0**-126, 1.0, -1.5, 2.0, below_eight, 3e38])
    assert power_of_two(x).tolist() == [0.0, 0.0, 2.0**-126, 1.0, 1.0, 2.0, 4.0, 2.0**127]
    assert power_of_two(torch.full((4, 6), 3.0)[:, ::2]).tolist() == [[2.0] * 3] * 4  # strided


def test_largest_exponents() -> None:
    assert (E2M1.max_exponent, E4M3.max_exponent) == (2, 8)
