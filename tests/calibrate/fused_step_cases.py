"""The kernel of a tuning step against the reference that it must equal, on the CPU's interpreter or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.rounding import MOST_OFFSET, Gradients, Rounding, Target, fake_quantize, grid_values, sign_step, targets
from calibrate.scale_search import Candidates, best_clips
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, WeightType

SOME_TYPES: list[WeightType] = [
    Integer(bits=4, group_size=128),
    Integer(bits=2, group_size=16, symmetric=False),
    Integer(bits=8, group_size=256, symmetric=False),
    Integer(bits=3, group_size=None),
    Integer(bits=5, group_size=None, symmetric=False),
    NvFp4(),
    Mx(bits=4),
    Mx(bits=8),
    Float8(strategy="channel"),
]
ALL_TYPES: list[WeightType] = [
    Integer(bits=bits, group_size=group, symmetric=symmetric)
    for bits in range(2, 9)
    for group in (16, 32, 64, 128, 256, None)
    for symmetric in (True, False)
] + SOME_TYPES[5:]


@dataclass
class State:
    """Everything that a step changes."""

    target: Target
    rounding: Rounding
    means: Gradients | None
    out: Tensor
    finite: Tensor

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self.rounding, name) for name in ("offset", "low_clip", "high_clip")}
        if self.means is not None:
            found |= {f"mean of {name}": getattr(self.means, name) for name in ("offset", "low_clip", "high_clip")}
        return found | {"W^": self.out, "finite": self.finite}

    def to(self, device: str) -> State:
        target, rounding, means = self.target, self.rounding, self.means
        move = lambda *tensors: [t.to(device, copy=True) for t in tensors]  # noqa: E731
        scale = None if target.global_scale is None else target.global_scale.to(device)
        return State(
            Target(*move(target.weight), type(target.bounds)(*move(*target.bounds)), target.type, scale),
            Rounding(*move(rounding.offset, rounding.low_clip, rounding.high_clip)),
            None if means is None else Gradients(*move(means.offset, means.low_clip, means.high_clip)),
            *move(self.out, self.finite),
        )


def make_state(
    kind: WeightType, shape: tuple[int, int], dtype: torch.dtype, out: torch.dtype, *, momentum: float
) -> State:
    """A layer in the middle of tuning, with every kind of row that has its own way to go wrong."""
    weight = torch.randn(shape)
    weight[0] = 0
    weight[1] *= 1e-6  # below the least scale
    weight[2, ::37] *= 60  # outliers
    weight[3] = -weight[3].abs()  # the extreme is negative, the other bound 0
    weight[4] = weight[4].abs()
    weight[5] = (weight[5] * 4).round() / 4  # ties
    [target] = targets([weight.to(dtype)], kind)
    rounding = Rounding.nearest(target).clone()
    rounding.offset.random_(-MOST_OFFSET, MOST_OFFSET)
    rounding.low_clip.uniform_(0.2, 1.6)
    rounding.high_clip.uniform_(0.2, 1.6)
    rounding.low_clip[6] = 0
    rounding.high_clip[7] = 0
    means = None
    if momentum:
        means = Gradients.means(rounding)
        means.offset.normal_(0, 1e-4)
        means.low_clip.normal_(0, 1e-3)
    return State(target, rounding, means, torch.full(shape, float("nan"), dtype=out), torch.tensor(True))


def make_gradient(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    grad = 1e-4 * torch.randn(shape)
    grad[torch.rand(shape) < 0.1] = 0
    return grad.to(dtype)


def check(
    kind: WeightType,
    device: str,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    out: torch.dtype = torch.bfloat16,
    momentum: float = 0.7,
    steps: int = 4,
    reference_device: str = "cpu",
) -> None:
    """``steps`` steps of kernel and reference from the same state; after each, all of it must be equal."""
    from calibrate.fused_step import fused_fake_quantize, fused_grid_values, fused_sign_step

    made = make_state(kind, shape, dtype, out, momentum=momentum)
    mine, reference = made.to(device), made.to(reference_device)
    offsets = reference.rounding.offset.clone()
    for step in range(steps):
        grad = make_gradient(shape, out)
        if step == steps - 1:
            grad[3, 5] = float("inf")
        rate = torch.tensor([9_000.0 - 3_000 * (step % 3), 0.07])
        for side, function in ((mine, fused_sign_step), (reference, sign_step)):
            place = side.out.device
            function(
                side.target,
                side.rounding,
                side.means,
                grad.to(place),
                rate.to(place),
                side.out,
                side.finite,
                momentum=momentum,
                most_clip=1.5,
            )
        whole = step < steps - 1
        for name, expected in reference.tensors().items():
            got = mine.tensors()[name].to(reference_device)
            same = got == expected
            if not whole:  # NaN in the group of the infinity, and only there
                same |= got.isnan() & expected.isnan()
            assert same.all(), f"{kind}: step {step}, {name} differs in {int((~same).sum())} of {same.numel()} places"
        assert bool(reference.finite) is whole
    assert (offsets != reference.rounding.offset).any()
    assert (reference.rounding.offset.int().abs() == MOST_OFFSET).any()
    mine.out.fill_(float("nan"))
    fused_fake_quantize(mine.target, mine.rounding, mine.out)
    assert torch.equal(mine.out.to(reference_device), fake_quantize(reference.target, reference.rounding).to(out))
    nearest = [(side.target, Rounding.nearest(side.target, 0.9)) for side in (mine, reference)]
    for here, there in (((side.target, side.rounding) for side in (mine, reference)), nearest):
        values = fused_grid_values(*here).to(reference_device)
        assert values.dtype is dtype
        assert torch.equal(values.float(), grid_values(*there))


def check_search(
    kind: WeightType,
    device: str,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tuned: bool = True,
) -> None:
    """The kernel's clips are those of `best_clips` on the CPU, number for number."""
    from calibrate.fused_search import fused_best_clips

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[0, :7] = torch.tensor([0.0, 1e-30, -40.0, 3.0, -3.0, 1e-3, 0.0]).to(dtype)
    weight[-1] = 0
    importance = torch.rand(shape[1], generator=generator).square() * 100
    [target] = targets([weight], kind)
    if kind.symmetric:
        amax = torch.maximum(-target.bounds.low, target.bounds.high)
        target = Target(weight, type(target.bounds)(-amax, amax), kind, target.global_scale)
    candidates = Candidates.of(kind, tuned=tuned)
    expected = best_clips(target, importance, candidates)
    scale = None if target.global_scale is None else target.global_scale.to(device)
    bounds = type(target.bounds)(*(bound.to(device) for bound in target.bounds))
    there = Target(weight.to(device), bounds, kind, scale)
    found = fused_best_clips(there, importance.to(device), candidates)
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), reference), (mine.cpu() != reference).sum()
    assert len(expected[1].unique()) > 1 or len(candidates.coarse) == 1


def check_transpose(device: str, shape: tuple[int, int]) -> None:
    """The kernel against the reference on every e4m3 value, under scales that make subnormals and zeros of some."""
    from calibrate.fp8_matmul import rescaled_transpose
    from calibrate.fused_transpose import fused_rescaled_transpose

    generator = torch.Generator().manual_seed(0)
    rows8 = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(0, 20, (shape[0], 1), generator=generator).float())
    expected = rescaled_transpose(rows8, scale)
    assert expected.shape == (shape[1], shape[0])
    got = fused_rescaled_transpose(rows8.to(device), scale.to(device)).cpu()
    assert torch.equal(got.float().nan_to_num(nan=-1e3), expected.float().nan_to_num(nan=-1e3))


def check_both_ways(device: str, shape: tuple[int, int]) -> None:
    """The kernel against the reference on values of all magnitudes that e4m3 has, smaller ones, and some that saturate;
    to nearest, and dithered in steps early and late."""
    from calibrate.fp8_matmul import scaled_both_ways
    from calibrate.fused_transpose import fused_scaled_both_ways

    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(shape, generator=generator) * torch.exp2(torch.arange(shape[1]) % 40 - 20.0)).bfloat16()
    each, common = values.abs().amax(1, keepdim=True).float() / 384, (values.abs().max().float() / 600).reshape(1)
    seen = set()
    for scale, turned_scale in ((each, common), (common, each), (common, common)):
        for number in (None, 0, 1, 199, 100_000):
            step = None if number is None else torch.tensor([number])
            expected = scaled_both_ways(values, scale, turned_scale, step)
            assert [tuple(part.shape) for part in expected] == [shape, shape[::-1]]
            there = None if step is None else step.to(device)
            got = fused_scaled_both_ways(values.to(device), scale.to(device), turned_scale.to(device), there)
            for mine, reference in zip(got, expected, strict=True):
                assert torch.equal(mine.cpu().float(), reference.float())
            seen.add(tuple(expected[0].float().flatten().tolist()))
    assert len(seen) == 2 * 5  # scales of the first, and steps
