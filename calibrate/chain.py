"""Running a block over every sample without gradients: the two chains of hidden states, and errors between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, inf, nn
from torch.linalg import vector_norm

from calibrate.blocks import run_block, token_parts

_AHEAD = 4  # parts that the host may be ahead of the device


class NonFiniteError(RuntimeError):
    """NaN or infinity where there must be a number; names the layer."""


@torch.no_grad()
def advance(
    block: nn.Module,
    hidden: Tensor,
    arguments: dict[str, Any],
    forward: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor] = run_block,
) -> None:
    """Replace the block's input [S, T, H] by its output, in place, in large batches.

    Args:
        forward: `run_block` or a compiled version of it.

    Raises:
        NonFiniteError: an output that is not finite; names the first layer that made one.
    """
    device = next(block.parameters()).device
    launched: deque[_Launched] = deque()

    def finish(made: _Launched) -> None:
        if made.known is not None:
            made.known.synchronize()
        if not made.finite:
            raise NonFiniteError(f"{first_non_finite(block, made.inputs, arguments)} gives a value that is not finite")
        made.part.copy_(made.output, non_blocking=True)

    for part in token_parts(hidden):
        inputs = part.to(device, non_blocking=True)
        output = forward(block, inputs, arguments)
        launched.append(_Launched(part, inputs, output, *_to_host(vector_norm(output, inf).isfinite())))
        if len(launched) > _AHEAD:
            finish(launched.popleft())
    while launched:
        finish(launched.popleft())
    if device.type == "cuda" and hidden.device != device:
        torch.cuda.current_stream(device).synchronize()  # the outputs are on their way to the host


class _Launched(NamedTuple):
    """A part that the device was told to run."""

    part: Tensor
    inputs: Tensor
    output: Tensor
    finite: Tensor  # scalar bool on the host
    known: torch.cuda.Event | None  # when it has a value


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A scalar bool on the host, and what to wait for. Asked for its value, a GPU would first do all it was told."""
    if flag.device.type != "cuda":
        return flag, None
    there = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    known = torch.cuda.Event(blocking=True)
    known.record()
    return there, known


def relative_distance(hidden: Tensor, reference: Tensor, real: Tensor | None = None) -> float:
    """Squared distance of [S, T, H] from a reference over the reference's squared norm, in float64.

    Args:
        real: [S, T] bool, the tokens that count; None: all.
    """
    sums = []
    for sample, (mine, theirs) in enumerate(zip(hidden, reference, strict=True)):
        expected = theirs.to(mine.device).float()
        distance = mine.float() - expected
        if real is not None:
            counted = real[sample].to(mine.device)
            distance, expected = distance[counted], expected[counted]
        sums.append(torch.stack([part.square().sum(dtype=torch.float64) for part in (distance, expected)]))
    error, norm = torch.stack(sums).sum(0).tolist()
    return error / norm if error else 0.0


@torch.no_grad()
def first_non_finite(block: nn.Module, inputs: Tensor, arguments: dict[str, Any]) -> str:
    """Name of the first leaf module of ``block`` whose output for ``inputs`` [B, T, H] is not finite."""
    culprits: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _module, _args, out, name=name: (
                None if not isinstance(out, Tensor) or out.isfinite().all() else culprits.append(name)
            )
        )
        for name, module in block.named_modules()
        if not any(module.children())
    ]
    try:
        run_block(block, inputs, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return culprits[0] if culprits else "the block's own arithmetic"
