"""Weights that make up for what quantization does to their inputs: least squares, before anything is rounded.

Quantization takes x [T, K] to x^ = x - n, and a layer makes of x^ what it should make of x. Part of the noise n shows
in x^, for features tell of each other. With H = x^^T x^ and D = n^T x^, sums over tokens,

    A = W D (H + damping)^-1

is what a weight can add to make up for n: W + A is the least squares solution on the tokens of these sums. Features are
taken in blocks, so that H asks for neither many tokens nor much time. On few tokens A fits these and no others; so
W + t A is taken, t from 0 to 1, with the t that suits a layer's outputs on other tokens best.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.activations import QuantizedInput, token_products, watched_inputs
from calibrate.blocks import masked_parts, run_block
from calibrate.chain import NonFiniteError
from calibrate.gptq import DAMPING
from calibrate.layer_schemes import fused_groups
from calibrate.workbench import WorkingBlock

_FEATURES = 4096  # of an input that make up for each other
_TOKENS = 65_536  # that are looked at
_AT_ONCE = 4096  # of these tokens; quantizing takes several times the memory of an input
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
    samples = min(len(hidden), -(-_TOKENS // hidden.shape[1]))
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
    for name, change in changes.items():
        if not change.isfinite().all():
            raise NonFiniteError(f"{name}: an input is not finite")
    _watch(working, inputs, inputs, hidden, real, slice(fit, samples), judge)
    shares = {}
    for name, change in changes.items():
        # The squared error falls by 2 t slope - t^2 curve; NaN if nothing but zeros was fed.
        slope, curve = sums[name].tolist()
        shares[name] = min(max(slope / curve, 0.0), 1.0) if curve > 0 else 0.0
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
        """A [N, K] float32 for a weight W [N, K]."""
        changes = []
        for w, h, d in zip(weight.split(_FEATURES, dim=1), self.second_moments, self.cross, strict=True):
            damped = h.double()
            damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
            factor, _ = torch.linalg.cholesky_ex(damped)
            changes.append(torch.cholesky_solve((w.float() @ d).T.double(), factor).T.float())
        return torch.cat(changes, dim=1)


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

    def show(name: str, x: Tensor) -> None:
        for tokens in x.split(_AT_ONCE):
            record(name, tokens)

    mask = None if real is None else real[samples]
    with working.quantized_inputs(inputs):
        for part, counted in masked_parts(hidden[samples], mask):
            with watched_inputs(working.module, names, show, real=counted):
                run_block(working.module, part.to(working.device), working.arguments)
