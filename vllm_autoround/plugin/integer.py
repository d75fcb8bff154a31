"""Kernels of integer weights on a GPU: vLLM's choice (Machete, Marlin, Humming ...), or ours where that deviates."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)
from vllm.scalar_type import ScalarType, scalar_types

from vllm_autoround.format import activations
from vllm_autoround.format.weights import Integer, QuantizedWeight
from vllm_autoround.kernels import wna16
from vllm_autoround.plugin import compat
from vllm_autoround.plugin.kernels import Kernel, Part, Problem, VllmKernel

_NAMES = {"w_q_param_name": "weight_packed", "w_s_param_name": "weight_scale", "w_zp_param_name": "weight_zero_point"}


def choose(problem: Problem) -> Kernel[QuantizedWeight] | None:
    """The kernel for integer weights; None if the scheme is another."""
    if problem.scheme is None or not isinstance(problem.scheme.weights, Integer):
        return None
    type_ = problem.scheme.weights
    note = ""
    if problem.scheme.activations == activations.FP8_TOKEN:
        if (kernel := _with_fp8_activations(problem, type_)) is not None:
            return kernel
        note = "weight-only: the activations stay in 16 bits"
    elif problem.scheme.activations is not None:
        return None
    config = _config(problem, type_, act_type=problem.dtype)
    chosen = choose_mp_linear_kernel(config)
    if not type_.symmetric and "Humming" in chosen.__name__ and not compat.humming_takes_zero_points():
        return TritonKernel(type_)
    return MixedPrecisionKernel(chosen, config, note)


def _config(problem: Problem, type_: Integer, **fields: object) -> MPLinearLayerConfig:
    shape = (problem.columns, problem.rows)
    default = {
        "weight_type": ScalarType.uint(type_.bits, int(type_.zero) if type_.symmetric else None),
        "group_size": type_.group_size or -1,
        "zero_points": not type_.symmetric,
    }
    return compat.mp_linear_layer_config(full_weight_shape=shape, partition_weight_shape=shape, **{**default, **fields})


def _with_fp8_activations(problem: Problem, type_: Integer) -> Kernel[QuantizedWeight] | None:
    """A kernel that does quantize the activations, if this device has one."""
    if (type_.bits, type_.group_size, type_.symmetric) != (4, 128, True):
        return None
    config = _config(
        problem, type_, weight_type=scalar_types.int4, act_type=torch.float8_e4m3fn, out_type=problem.dtype
    )
    try:
        chosen = choose_mp_linear_kernel(config)
    except ValueError:
        return None
    if chosen.__name__ == "CutlassW4A8LinearKernel":
        return MixedPrecisionKernel(chosen, config, "which rounds the scales of groups to fp8")
    if "Humming" in chosen.__name__ and compat.humming_quantizes_activations():
        return MixedPrecisionKernel(chosen, config)
    return None  # others accept the config and leave the activations alone


class MixedPrecisionKernel(VllmKernel):
    """An ``MPLinearKernel``, fed with the tensors of the compressed-tensors layout."""

    def __init__(self, kernel: type[MPLinearKernel], config: MPLinearLayerConfig, note: str = "") -> None:
        super().__init__(kernel(config, **_NAMES), note)

    def prepare(self, part: Part, weight: QuantizedWeight, input_scale: Tensor | None) -> None:
        type_, factor = weight.type, Fraction(32, weight.type.bits)
        assert isinstance(type_, Integer)
        per_channel = type_.group_size is None
        tensors = type_.to_tensors(replace(weight, scale=weight.scale.to(part.params_dtype)))
        rows_and_columns = {"input_dim": 1, "output_dim": 0, "weight_loader": _never_load}
        packed = {**rows_and_columns, "packed_factor": factor}
        part.register_parameter(
            "weight_packed", PackedvLLMParameter(data=tensors["weight_packed"], packed_dim=1, **packed)
        )
        scale = tensors["weight_scale"]
        part.register_parameter(
            "weight_scale",
            ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=_never_load)
            if per_channel
            else GroupQuantScaleParameter(data=scale, **rows_and_columns),
        )
        if "weight_zero_point" in tensors:
            zeros = tensors["weight_zero_point"]
            part.register_parameter(
                "weight_zero_point",
                PackedColumnParameter(
                    data=zeros, output_dim=0, packed_dim=0, packed_factor=factor, weight_loader=_never_load
                )
                if per_channel
                else PackedvLLMParameter(data=zeros, packed_dim=0, **packed),
            )
        self.kernel.process_weights_after_loading(part)


class TritonKernel(Kernel[QuantizedWeight]):
    """Our own kernel, for every width with or without zero points."""

    name = "the plugin's Triton kernel"

    def __init__(self, type_: Integer) -> None:
        self.bits = type_.bits

    def prepare(self, part: Part, weight: QuantizedWeight, input_scale: Tensor | None) -> None:
        words, affine = wna16.prepare(replace(weight, scale=weight.scale.to(part.params_dtype)))
        part.set_tensor("words", words)
        part.set_tensor("affine", affine)

    def apply(self, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        return wna16.wna16_linear(x, part.words, part.affine, self.bits, bias)


def _never_load(*_: object) -> None:
    raise RuntimeError("this tensor is in a kernel's layout, no longer in the checkpoint's")
