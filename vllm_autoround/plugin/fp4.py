"""Kernels of NVFP4, MXFP4 and MXFP8 weights on a GPU, all vLLM's: native from SM100 on, weight-only before."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.kernels.linear import init_nvfp4_linear_kernel

from vllm_autoround.format import activations
from vllm_autoround.format.weights import Mx, NvFp4, QuantizedWeight
from vllm_autoround.plugin import compat
from vllm_autoround.plugin.kernels import Kernel, Part, Problem, VllmKernel


def choose(problem: Problem) -> Kernel[QuantizedWeight] | None:
    """The kernel for these weights; None if the scheme is another or its activations do not go with it."""
    if problem.scheme is None:
        return None
    type_, acting = problem.scheme.weights, problem.scheme.activations
    if isinstance(type_, NvFp4) and acting in (None, activations.NVFP4):
        kernel = init_nvfp4_linear_kernel(use_a16=acting is None)
        return NvFp4Kernel(kernel, _note(kernel, acting is None))
    if not isinstance(type_, Mx):
        return None
    if type_.bits == 4 and acting in (None, activations.MXFP4):
        kernel = compat.init_mxfp4_linear_kernel(use_a16=acting is None)
        return MxKernel(kernel, _note(kernel, acting is None))
    if type_.bits == 8 and acting in (None, activations.MXFP8):
        kernel = compat.init_mxfp8_linear_kernel(problem.rows, problem.columns, use_a16=acting is None)
        return MxKernel(kernel, _note(kernel, acting is None))
    return None


def _note(kernel: object, use_a16: bool) -> str:
    weight_only = not use_a16 and type(kernel).__name__.startswith("Marlin")
    return "weight-only: the activations stay in 16 bits" if weight_only else ""


class NvFp4Kernel(VllmKernel):
    """Takes global scales as factors, the inverse of what is stored."""

    def prepare(self, part: Part, weight: QuantizedWeight, input_scale: Tensor | None) -> None:
        assert weight.global_scale is not None
        tensors = weight.type.to_tensors(weight)
        part.set_tensor("weight", tensors["weight_packed"])
        part.set_tensor("weight_scale", tensors["weight_scale"])
        factor = (1.0 / weight.global_scale).reshape(())
        part.set_tensor("weight_global_scale", factor)
        if input_scale is not None:
            divisor = input_scale.reshape(())
            part.set_tensor("input_global_scale", 1.0 / divisor)
            part.set_tensor("input_global_scale_inv", divisor)
            part.set_tensor("alpha", 1.0 / divisor * factor)
        self.kernel.process_weights_after_loading(part)


class MxKernel(VllmKernel):
    """Powers of two as scales, in bytes."""

    def prepare(self, part: Part, weight: QuantizedWeight, input_scale: Tensor | None) -> None:
        tensors = weight.type.to_tensors(weight)
        part.set_tensor("weight", tensors["weight_packed" if weight.type.bits == 4 else "weight"])
        part.set_tensor("weight_scale", tensors["weight_scale"])
        self.kernel.process_weights_after_loading(part)
