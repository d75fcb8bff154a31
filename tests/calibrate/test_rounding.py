"""The trainable quantizer: its gradients against autograd, and what is frozen against what was tuned."""

import pytest
import torch
from torch import Tensor

from calibrate.rounding import Rounding, Target, fake_quantize, freeze, gradients, sign_step
from vllm_autoround.format.codec import MIN_SCALE
from vllm_autoround.format.scheme import QuantScheme

SCHEMES = [
    QuantScheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group in (16, None)
    for symmetric in (True, False)
]


def ste_round(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def peer_fake_quantize(target: Target, rounding: Rounding) -> Tensor:
    """SignRound as the formulas state it, signed codes and all, for autograd (float32 scales)."""
    scheme = target.scheme
    low, high = (target.low * rounding.low_clip)[..., None], (target.high * rounding.high_clip)[..., None]
    w, v = (t.unflatten(1, (target.low.shape[1], -1)) for t in (target.weight, rounding.offset))
    if scheme.symmetric:
        levels = 2 ** (scheme.bits - 1)
        m = torch.where(high >= -low, high, low)
        s = m / -levels
        s = torch.where(s < 0, s.clamp(max=-MIN_SCALE), s.clamp(min=MIN_SCALE))
        return (s * (ste_round(w / s + v)).clamp(-levels, levels - 1)).flatten(1)
    s = ((high - low) / (2**scheme.bits - 1)).clamp(min=MIN_SCALE)
    z = ste_round(-low / s)
    return (s * ((ste_round(w / s + v) + z).clamp(0, 2**scheme.bits - 1) - z)).flatten(1)


def state(scheme: QuantScheme, dtype: torch.dtype = torch.float32) -> tuple[Target, Rounding]:
    """A layer in the middle of tuning: offsets and clips away from their start, so that the clamp binds somewhere."""
    weight = torch.randn(24, 64).to(dtype)
    target = Target.of(weight, scheme)
    rounding = Rounding.nearest(weight, scheme)
    rounding.offset.uniform_(-0.5, 0.5)
    rounding.low_clip.uniform_(0.5, 1)
    rounding.high_clip.uniform_(0.5, 1)
    return target, rounding


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_equal_autograd_through_straight_through_rounding(scheme: QuantScheme) -> None:
    target, rounding = state(scheme)
    for value in (rounding.offset, rounding.low_clip, rounding.high_clip):
        value.requires_grad_(True)
    out = peer_fake_quantize(target, rounding)
    torch.testing.assert_close(out, fake_quantize(target, rounding))
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (rounding.offset, rounding.low_clip, rounding.high_clip), grad)
    with torch.no_grad():
        ours = gradients(target, rounding, grad)
    torch.testing.assert_close(ours.offset, expected[0])
    torch.testing.assert_close(ours.low_clip, expected[1], rtol=1e-3, atol=1e-4)  # sums of float32 products
    torch.testing.assert_close(ours.high_clip, expected[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_packed_weight_reproduces_the_tuned_forward_bit_for_bit(scheme: QuantScheme, dtype: torch.dtype) -> None:
    target, rounding = state(scheme, dtype)
    frozen = freeze(target, rounding)
    assert frozen.scale.dtype == dtype
    assert torch.equal(frozen.dequantize().to(dtype), fake_quantize(target, rounding))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sign_step_moves_by_the_learning_rate_and_keeps_the_clips_in_range(scheme: QuantScheme) -> None:
    target, rounding = state(scheme)
    before = Rounding(rounding.offset.clone(), rounding.low_clip.clone(), rounding.high_clip.clone())
    grad = torch.randn(24, 64)
    grads = gradients(target, rounding, grad)
    sign_step(target, rounding, grad, torch.tensor(0.01))
    torch.testing.assert_close(rounding.offset, before.offset - 0.01 * grads.offset.sign())
    torch.testing.assert_close(rounding.low_clip, (before.low_clip - 0.01 * grads.low_clip.sign()).clamp(0, 1))
    sign_step(target, rounding, grad, torch.tensor(5.0))
    assert rounding.high_clip.min() >= 0
    assert rounding.high_clip.max() <= 1


def test_an_all_zero_group_stays_zero_and_gets_no_gradient_in_its_clips() -> None:
    scheme = QuantScheme(bits=4, group_size=16)
    target = Target.of(torch.zeros(2, 16), scheme)
    rounding = Rounding.nearest(target.weight, scheme)
    grads = gradients(target, rounding, torch.ones(2, 16))
    assert (grads.low_clip == 0).all()
    assert (grads.high_clip == 0).all()
    assert (fake_quantize(target, rounding) == 0).all()
