"""The trainable quantizer: its gradients against autograd, and what is frozen against what was tuned."""

import pytest
import torch
from torch import Tensor

from calibrate.rounding import (
    MOST_OFFSET,
    OFFSET_UNIT,
    Gradients,
    Rounding,
    Target,
    fake_quantize,
    freeze,
    gradients,
    group_errors,
    ordered_sum,
    sign_step,
    targets,
)
from calibrate.scale_search import search_scales
from vllm_autoround.format.grids import E2M1, E4M3, FloatGrid
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, WeightType, quantize

TYPES: list[WeightType] = [
    Integer(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group in (16, None)
    for symmetric in (True, False)
] + list(dict.fromkeys(s.weights for s in NAMED_SCHEMES.values() if not isinstance(s.weights, Integer)))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return (rounded - x).detach() + x


def grid_values(grid: FloatGrid) -> Tensor:
    """Every value of a grid, in order, without the module under test: from the bits of a small float."""
    if grid is E2M1:
        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    else:
        positive = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.cat([-positive.flip(0)[:-1], positive])


def nearest(x: Tensor, grid: FloatGrid) -> Tensor:
    values = grid_values(grid)
    return values[(x[..., None] - values).abs().argmin(-1)]


def peer_fake_quantize(target: Target, offset: Tensor, low_clip: Tensor, high_clip: Tensor) -> Tensor:
    """SignRound as the formulas state it, for autograd (float32 scales)."""
    kind, tile = target.type, target.tile
    low, high = target.bounds.low * low_clip, target.bounds.high * high_clip
    w, v = tile.split(target.weight), tile.split(offset)
    if isinstance(kind, Integer):
        s = torch.where(high >= -low, high, low) / -(2 ** (kind.bits - 1))
        if kind.symmetric:
            s, levels = s[:, None, :, None], 2 ** (kind.bits - 1)
            x = w / s + v
            return tile.merge(s * straight_through(x, x.round()).clamp(-levels, levels - 1), target.weight.shape)
        s = (high - low) / (2**kind.bits - 1)
        z = straight_through(-low / s, (-low / s).round())
        s, z = s[:, None, :, None], z[:, None, :, None]
        x = w / s + v
        codes = (straight_through(x, x.round()) + z).clamp(0, 2**kind.bits - 1)
        return tile.merge(s * (codes - z), target.weight.shape)
    grid = E2M1 if kind.bits == 4 else E4M3
    amax = torch.maximum(-low, high)
    match kind:
        case Float8():
            s = amax / 448
        case NvFp4():
            scaled = amax * target.global_scale / 6
            s = straight_through(scaled, scaled.to(torch.float8_e4m3fn).float()) / target.global_scale
        case Mx():
            exponent = amax.log2()
            s = torch.exp2(straight_through(exponent, exponent.floor()) - (2 if kind.bits == 4 else 8))
    s = s[:, None, :, None]
    with torch.no_grad():
        spacing = kind.spacing(w / s)
    x = (w / s + v * spacing).clamp(-grid.highest, grid.highest)
    return tile.merge(s * straight_through(x, nearest(x, grid)), target.weight.shape)


def state(kind: WeightType, dtype: torch.dtype = torch.float32) -> tuple[Target, Rounding]:
    """A layer in the middle of tuning: offsets and clips away from their start, so that some values saturate."""
    rows = 128 if isinstance(kind, Float8) else 24
    [target] = targets([torch.randn(rows, 128).to(dtype)], kind)
    rounding = Rounding.nearest(target).clone()
    rounding.offset.random_(-(1 << 14), 1 << 14)
    rounding.low_clip.uniform_(0.5, 1)
    rounding.high_clip.uniform_(0.5, 1)
    return target, rounding


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_gradients_equal_autograd_through_straight_through_rounding(kind: WeightType) -> None:
    target, rounding = state(kind)
    values = (rounding.offset * OFFSET_UNIT, rounding.low_clip.clone(), rounding.high_clip.clone())
    for value in values:
        value.requires_grad_(True)
    out = peer_fake_quantize(target, *values)
    torch.testing.assert_close(out, fake_quantize(target, rounding))
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, values, grad, allow_unused=True)
    with torch.no_grad():
        ours = gradients(target, rounding, grad)
        scale, _ = kind.scale_and_zero_point(*target.bounds, torch.float32, target.global_scale)
        position = target.tile.split(target.weight) / scale[:, None, :, None]
    # The spacing of the grid and ds / d(extreme) are left out of the gradients: both are positive.
    if isinstance(kind, Integer):
        torch.testing.assert_close(ours.offset, expected[0])
    assert torch.equal(ours.offset.sign(), expected[0].sign())
    assert position.isfinite().all()
    for mine, theirs in ((ours.low_clip, expected[1]), (ours.high_clip, expected[2])):
        if isinstance(kind, Mx):
            significant = theirs.abs() > 1e-4 * theirs.abs().max()
            assert torch.equal(mine.sign()[significant], theirs.sign()[significant])
        else:
            slope = {Integer: 2 ** (kind.bits - 1), Float8: 448, NvFp4: 6}[type(kind)] if kind.symmetric else 1
            torch.testing.assert_close(mine / slope, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_frozen_is_what_was_tuned(kind: WeightType, dtype: torch.dtype) -> None:
    target, rounding = state(kind, dtype)
    weight = freeze(target, rounding)
    assert torch.equal(weight.dequantize().to(dtype), fake_quantize(target, rounding))
    again = kind.from_tensors(kind.to_tensors(weight))
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_the_start_is_rounding_to_nearest(kind: WeightType) -> None:
    weight = torch.randn(128, 128).bfloat16()
    [target] = targets([weight], kind)
    assert torch.equal(freeze(target, Rounding.nearest(target)).dequantize(), quantize(weight, kind).dequantize())


def step(
    target: Target,
    rounding: Rounding,
    grad: Tensor,
    rate: tuple[float, float],
    means: Gradients | None = None,
    momentum: float = 0.0,
) -> bool:
    """One step; whether the gradient was finite."""
    finite, out = torch.tensor(True), torch.empty_like(target.weight)
    sign_step(target, rounding, means, grad, torch.tensor(rate), out, finite, momentum=momentum)
    assert torch.equal(out, fake_quantize(target, rounding))
    return bool(finite)


def test_clips_and_offsets_stay_in_range() -> None:
    target, rounding = state(TYPES[0])
    for _ in range(5):
        assert step(target, rounding, torch.ones(24, 128), (20_000, 0.4))
    assert rounding.low_clip.min() >= 0
    assert rounding.high_clip.max() <= 1
    assert rounding.offset.int().abs().max() == MOST_OFFSET


def test_a_step_moves_every_offset_by_the_rate_against_its_gradient() -> None:
    target, rounding = state(TYPES[0])
    before, grad = rounding.offset.clone(), torch.randn(24, 128)
    slope = gradients(target, rounding, grad).offset
    step(target, rounding, grad, (163, 0.1))
    assert torch.equal(before.int() - rounding.offset.int(), (163 * slope.sign()).int())


@pytest.mark.parametrize("kind", [kind for kind in TYPES if not kind.one_scale], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_noticed(kind: WeightType, bad: float) -> None:
    target, rounding = state(kind)
    grad = torch.randn(target.weight.shape)
    assert step(target, rounding, grad, (163, 0.1))
    grad[5, 77] = bad
    assert not step(target, rounding, grad, (163, 0.1))


def test_momentum_follows_the_mean_of_the_gradients_and_not_the_last_one() -> None:
    target, rounding = state(TYPES[0])
    means, before = Gradients.means(rounding), rounding.offset.clone()
    steady = torch.full((24, 128), 1.0)
    for grad in (steady, steady, -0.5 * steady):
        step(target, rounding, grad, (300, 0.01), means, momentum=0.7)
    # 0.3, 0.51 and 0.207 times the first gradient: never against it, as the last gradient alone would be.
    moved = (rounding.offset.int() - before).abs()[gradients(target, rounding, steady).offset != 0]
    assert moved.median() == 900


@pytest.mark.parametrize("columns", [1, 16, 96, 128, 5000])
def test_ordered_sums_are_sums(columns: int) -> None:
    tiles = torch.randn(3, 1, 5, columns)
    torch.testing.assert_close(ordered_sum(tiles), tiles.sum((1, 3)), rtol=1e-4, atol=1e-4)


def test_layers_that_are_fused_share_what_is_one_number_a_layer() -> None:
    weights = [torch.randn(32, 64), 3 * torch.randn(32, 64)]
    for name in ("NVFP4", "FP8"):
        kind = QuantScheme.parse(name).weights
        made = [freeze(target, Rounding.nearest(target)) for target in targets(weights, kind)]
        shared = [weight.global_scale if name == "NVFP4" else weight.scale for weight in made]
        assert torch.equal(shared[0], shared[1])
        alone = [freeze(t, Rounding.nearest(t)) for w in weights for t in targets([w], kind)]
        assert not torch.equal(*(weight.global_scale if name == "NVFP4" else weight.scale for weight in alone))


def test_a_scale_that_is_shared_is_not_tuned() -> None:
    target, rounding = state(Float8(strategy="tensor"))
    before = rounding.high_clip.clone()
    step(target, rounding, torch.randn(128, 128), (163, 0.1))
    assert torch.equal(rounding.high_clip, before)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_the_search_finds_nothing_worse_than_the_full_range(kind: WeightType) -> None:
    weight = torch.randn(128, 256).bfloat16()
    importance = torch.rand(256)
    [target] = targets([weight], kind)
    full = group_errors(target, Rounding.nearest(target), importance)
    searched, start = search_scales(target, importance, tuned=True)
    found = group_errors(searched, start, importance)
    # 1.0 is on the grid of ratios, up to its spacing in float32.
    assert (found <= full * 1.001).all()
    dequantized = freeze(searched, start).dequantize()
    error = target.tile.split((dequantized - weight.float()).square() * importance).sum((1, 3))
    torch.testing.assert_close(error, found, rtol=1e-3, atol=1e-6)
    if isinstance(kind, Integer) and kind.bits <= 4:
        assert found.sum() < 0.97 * full.sum()


def test_the_search_weighs_input_features_by_their_importance() -> None:
    kind = Integer(bits=2, group_size=None)
    weight = torch.cat([torch.randn(8, 32), 4 * torch.randn(8, 32)], dim=1)
    [target] = targets([weight], kind)
    small, large = torch.cat([torch.ones(32), torch.zeros(32)]), torch.cat([torch.zeros(32), torch.ones(32)])
    scale_for = [freeze(*search_scales(target, h, tuned=True)).scale.abs().mean() for h in (small, large)]
    assert scale_for[0] < 0.7 * scale_for[1]


def test_the_search_may_turn_the_sign_of_a_scale() -> None:
    kind = Integer(bits=2, group_size=16)
    weight = torch.randn(64, 256)
    [target] = targets([weight], kind)
    full = freeze(target, Rounding.nearest(target)).scale
    found = freeze(*search_scales(target, torch.ones(256), tuned=True)).scale
    assert (full.sign() != found.sign()).any()


def test_the_search_goes_wider_where_nothing_is_tuned_after_it() -> None:
    """The largest weight of a group may then become a 4, around which the grid is finer."""
    [target], ones = targets([torch.randn(128, 256)], NvFp4()), torch.ones(256)
    narrow, wide = (group_errors(*search_scales(target, ones, tuned=tuned), ones) for tuned in (True, False))
    assert (wide <= narrow * 1.001).float().mean() > 0.95
    assert wide.sum() < 0.99 * narrow.sum()
