"""Quantized activations: what a layer does to its input [..., K] before the matmul.

A dynamic type takes its scales from the input itself, per token or per group of a token; a static one from a scalar
in the checkpoint, which is also what puts NVFP4's dynamic E4M3 scales in range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_autoround.format.grids import E2M1, E4M3, FloatGrid, power_of_two
from vllm_autoround.format.weights import nvfp4

_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationType:
    """One way to quantize activations."""

    name: str
    grid: FloatGrid
    strategy: str  # compressed-tensors': tensor, token, group or tensor_group
    group_size: int | None = None  # features sharing a scale; None: all
    scale: str = "float32"  # of a group or token: "float32", "e4m3" (under a global scale) or "e8m0"
    static: str | None = None  # suffix of the checkpoint's scalar

    def __str__(self) -> str:
        return self.name

    def calibrated(self, amax: Tensor) -> Tensor | None:
        """The checkpoint's scalar [1] float32 for the largest magnitude that the layer was fed; None if it has none.

        1 for a layer that was fed nothing but zeros: it must not take everything else for overflow.
        """
        if self.static is None:
            return None
        if self.static == "input_global_scale":
            return nvfp4.global_scale(amax)
        scale = (amax.float() / self.grid.highest).clamp(min=_LEAST)
        return torch.where(amax > 0, scale, 1.0).reshape(1)

    def widened(self, scalar: Tensor, factor: float) -> Tensor:
        """The checkpoint's scalar [1] float32 for a largest magnitude ``factor`` times that which ``scalar`` is for."""
        return scalar / factor if self.static == "input_global_scale" else scalar * factor

    def fake_quantize(self, x: Tensor, static: Tensor | None) -> Tensor:
        """x [..., K] -> the values that the layer multiplies by, in float32.

        Args:
            static: the checkpoint's scalar [1] float32 where the type has one.
        """
        if self.static is not None and static is None:
            raise ValueError(f"{self.name} needs {self.static}")
        groups = self.groups(x)
        scale = static if static is not None and self.group_size is None else self._scale(groups, static)
        return (self.grid.round(groups / scale) * scale).flatten(-2)[..., : x.shape[-1]]

    def groups(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., groups, features] float32; the last group is filled up with zeros."""
        size = self.group_size or x.shape[-1]
        values = x.float()
        if ragged := x.shape[-1] % size:
            values = F.pad(values, (0, size - ragged))
        return values.unflatten(-1, (-1, size))

    def _scale(self, groups: Tensor, static: Tensor | None) -> Tensor:
        """groups [..., g] -> the acting scale [..., 1] of each."""
        amax = groups.abs().amax(-1, keepdim=True)
        if self.scale == "e8m0":
            return (power_of_two(amax) * 2.0**-self.grid.max_exponent).clamp(min=2.0**-126)
        if self.scale == "e4m3":
            assert static is not None
            return E4M3.round(static * (amax / self.grid.highest)).clamp(min=2.0**-9) / static
        return (amax / self.grid.highest).clamp(min=_LEAST)

    def args(self) -> dict[str, Any]:
        """compressed-tensors' QuantizationArgs."""
        args: dict[str, Any] = {
            "num_bits": 4 if self.grid is E2M1 else 8,
            "type": "float",
            "symmetric": True,
            "strategy": self.strategy,
            "dynamic": {None: True, "input_scale": False, "input_global_scale": "local"}[self.static],
        }
        if self.group_size is not None:
            args["group_size"] = self.group_size
        if self.scale != "float32":
            dtype = "torch.uint8" if self.scale == "e8m0" else "torch.float8_e4m3fn"
            args |= {"scale_dtype": dtype, "zp_dtype": dtype}
        return args


FP8_TENSOR = ActivationType(name="fp8 static per tensor", grid=E4M3, strategy="tensor", static="input_scale")
FP8_TOKEN = ActivationType(name="fp8 dynamic per token", grid=E4M3, strategy="token")
FP8_GROUP = ActivationType(name="fp8 dynamic per 128", grid=E4M3, strategy="group", group_size=128)
NVFP4 = ActivationType(
    name="nvfp4 dynamic",
    grid=E2M1,
    strategy="tensor_group",
    group_size=nvfp4.GROUP,
    scale="e4m3",
    static="input_global_scale",
)
MXFP4 = ActivationType(name="mxfp4 dynamic", grid=E2M1, strategy="group", group_size=32, scale="e8m0")
MXFP8 = ActivationType(name="mxfp8 dynamic", grid=E4M3, strategy="group", group_size=32, scale="e8m0")
ACTIVATION_TYPES = (FP8_TENSOR, FP8_TOKEN, FP8_GROUP, NVFP4, MXFP4, MXFP8)
