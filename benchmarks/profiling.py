"""Where the device's time goes, by kind of kernel, as torch's profiler sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Kind -> parts of its kernels' names; the first kind that fits counts. What the compiler makes has names of its own.
_KINDS = {
    "attention": ("flash", "fmha", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma"),
    "update": ("_step",),
    "copies": ("memcpy", "memset"),
}
_ELSE = "all else"  # norms, activations, the loss; rounding and transposing for FP8
_LONGEST = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Milliseconds of the device, all of them divided by ``steps``."""

    kinds: dict[str, float]
    longest: dict[str, float]  # by name of the kernel, those that take longest


def profiled(function: Callable[[], Any], steps: int) -> Profile:
    """The kernels of one call, which takes ``steps`` steps."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    names: Counter[str] = Counter()
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            names[event.name] += event.device_time / 1e3 / steps
    kinds: Counter[str] = Counter()
    for name, milliseconds in names.items():
        kinds[_kind(name)] += milliseconds
    return Profile(kinds=dict(kinds.most_common()), longest=dict(names.most_common(_LONGEST)))


def _kind(kernel: str) -> str:
    lower = kernel.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in lower for part in parts)), _ELSE)
