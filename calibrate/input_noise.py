"""Weights that make up for what quantization does to their inputs: least squares, before anything is rounded.

Quantization takes x [T, K] to x^ = x - n, and a layer makes of x^ what it should make of x. Part of the noise n shows
in x^, for features tell of each other. With H = x^^T x^ and D = n^T x^, sums over tokens,

    A = W D (H + damping)^-1

is what a weight can add to make up for n: W + A is the damped least squares solution on these tokens. More features
than a block holds are solved for block by block, so that H asks for neither many tokens nor much time. On few tokens A
fits these and no others; so W + t A is taken, t from 0 to 1, with the t that suits a layer's outputs on others best.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from calibrate.activations import QuantizedInput, token_products, watched_inputs
from calibrate.blocks import run_block
from calibrate.chain import NonFiniteError
from calibrate.gptq import DAMPING
from calibrate.layer_schemes import fused_groups
from calibrate.workbench import WorkingBlock

_FEATURES = 4096  # of an input that make up for each other
_TOKENS = 65_536  # that are looked at
_AT_ONCE = 4096  # of these tokens; quantizing takes 24 bytes a value
_JUDGES = 8  # one sample in so many chooses t


@torch.no_grad()
def make_up(
    working: WorkingBlock, inputs: Mapping[str, QuantizedInput], hidden: Tensor, real: Tensor | None = None
) -> dict[str, float]:
    """Let `WorkingBlock.wanted` of these layers suit inputs that are quantized like this.

    Args:
        hidden: [S, T, H], the block's inputs; the first of them are looked at.
        real: [S, T] bool, the tokens that count; None: all.

    Returns:
        The t of each layer; 0 for all if there is one sample only.

    Raises:
        NonFiniteError: an input that is not finite; names the layer.
    """
    samples = _enough(hidden, real)
    fit = samples - max(1, samples // _JUDGES)
    if fit == 0:
        return dict.fromkeys(inputs, 0.0)
    seen: dict[str, _Noise] = {}
    sums = {name: torch.zeros(2, device=working.device) for name in inputs}

    def observe(name: str, x: Tensor) -> None:
        noise = _Noise.of(x, inputs[name])
        if name in seen:
            seen[name].add(noise)
        else:
            seen[name] = noise

    def judge(name: str, x: Tensor) -> None:
        quantized, noise = _parted(x, inputs[name])
        lost = (noise @ working.wanted[name].to(x.dtype).T).float()
        made_up = (quantized @ changes[name].to(x.dtype).T).float()
        sums[name] += torch.stack([(lost * made_up).sum(), made_up.square().sum()])

    leader = _leaders(inputs)
    _watch(working, inputs, set(leader.values()), hidden, real, slice(fit), observe)
    changes = {name: seen[leader[name]].change(working.wanted[name]) for name in inputs}
    _watch(working, inputs, inputs, hidden, real, slice(fit, samples), judge)
    shares = {}
    for name, change in changes.items():
        # The squared error falls by 2 t slope - t^2 curve.
        slope, curve = sums[name].tolist()
        if not (isfinite(slope) and isfinite(curve)):
            raise NonFiniteError(f"{name}: an input is not finite")
        shares[name] = min(max(slope / curve, 0.0), 1.0) if curve > 0 else 0.0
        if shares[name]:
            working.wanted[name].add_(change, alpha=shares[name])
    return shares


@dataclass(frozen=True, slots=True)
class _Noise:
    """Of a layer's input, over tokens; by blocks of k features."""

    second_moments: list[Tensor]  # H, [k, k] float32
    cross: list[Tensor]  # D, [k, k] float32

    @classmethod
    def of(cls, x: Tensor, how: QuantizedInput) -> _Noise:
        """Of an input [T, K] before it is quantized."""
        quantized, noise = (part.split(_FEATURES, dim=1) for part in _parted(x, how))
        return cls(
            [token_products(q, q) for q in quantized],
            [token_products(n, q) for n, q in zip(noise, quantized, strict=True)],
        )

    def add(self, other: _Noise) -> None:
        """Take further tokens in."""
        torch._foreach_add_(self.second_moments, other.second_moments)
        torch._foreach_add_(self.cross, other.cross)

    def change(self, weight: Tensor) -> Tensor:
        """A [N, K] float32 for a weight W [N, K]; 0 for features whose H, rounded, is no sum of squares."""
        changes = []
        for w, h, d in zip(weight.split(_FEATURES, dim=1), self.second_moments, self.cross, strict=True):
            damped = h.double()
            damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
            factor, failed = torch.linalg.cholesky_ex(damped)
            change = torch.cholesky_solve((w.float() @ d).T.double(), factor).T.float()
            # Not finite, it stays so: the outputs then tell.
            changes.append(torch.where((failed > 0) & h.isfinite().all(), 0.0, change))
        return torch.cat(changes, dim=1)


def _enough(hidden: Tensor, real: Tensor | None) -> int:
    """How many samples of [S, T, H] have `_TOKENS` that count; all, if these have fewer."""
    samples, tokens = hidden.shape[:2]
    counted = torch.full((samples,), tokens) if real is None else real.sum(1)
    return min(samples, int((counted.cumsum(0) < _TOKENS).sum()) + 1)


def _parted(x: Tensor, how: QuantizedInput) -> tuple[Tensor, Tensor]:
    """x [T, K] -> x^ and n, in its dtype."""
    quantized = how.type.fake_quantize(x, how.scale)
    return quantized.to(x.dtype), (x.float() - quantized).to(x.dtype)


def _leaders(inputs: Mapping[str, QuantizedInput]) -> dict[str, str]:
    """Of the layers that are fed the same, quantized in the same way, the first."""
    return {
        name: next(other for other in group if inputs[other].type == inputs[name].type)
        for group in fused_groups(inputs)
        for name in group
    }


def _watch(
    working: WorkingBlock,
    inputs: Mapping[str, QuantizedInput],
    names: Collection[str],
    hidden: Tensor,
    real: Tensor | None,
    samples: slice,
    record: Callable[[str, Tensor], None],
) -> None:
    """Show ``record`` what these layers are fed, [tokens, K], before they quantize it; all layers do."""
    at_once = max(1, _AT_ONCE // hidden.shape[1])
    parts = hidden[samples].split(at_once)
    masks = [None] * len(parts) if real is None else real[samples].split(at_once)
    with working.quantized_inputs(inputs):
        for part, mask in zip(parts, masks, strict=True):
            with watched_inputs(working.module, names, record, real=mask):
                run_block(working.module, part.to(working.device), working.arguments)
