"""Kernels of FP8 weights on a GPU, all vLLM's: static, dynamic, per block, or with 16-bit activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_wfp8_a16_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    create_fp8_quant_key,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
)

from vllm_autoround.format import activations
from vllm_autoround.format.weights import Float8, QuantizedWeight
from vllm_autoround.format.weights.float8 import BLOCK
from vllm_autoround.plugin.kernels import Kernel, Part, Problem, VllmKernel
from vllm_autoround.plugin.matrices import per_channel

_ACTIVATIONS = {activations.FP8_TENSOR: kFp8StaticTensorSym, activations.FP8_TOKEN: kFp8DynamicTokenSym}
_WEIGHTS = {"tensor": kFp8StaticTensorSym, "channel": kFp8StaticChannelSym}


def choose(problem: Problem) -> Kernel[QuantizedWeight] | None:
    """The kernel for FP8 weights; None if the scheme is another or its activations do not go with it."""
    if problem.scheme is None or not isinstance(problem.scheme.weights, Float8):
        return None
    strategy, acting = problem.scheme.weights.strategy, problem.scheme.activations
    common: dict[str, Any] = {
        "weight_shape": (problem.rows, problem.columns),
        "input_dtype": problem.dtype,
        "out_dtype": problem.dtype,
    }
    block_key = create_fp8_quant_key(static=True, group_shape=GroupShape(BLOCK, BLOCK))
    if acting is None:
        kernel = init_wfp8_a16_linear_kernel(
            weight_quant_key=block_key if strategy == "block" else kFp8StaticChannelSym,
            activation_quant_key=kFp8DynamicTensorSym,  # as vLLM itself says for 16-bit activations
            **common,
        )
        return BlockFp8Kernel(kernel) if strategy == "block" else Fp8Kernel(kernel, channels=True)
    if strategy == "block":
        if acting != activations.FP8_GROUP:
            return None
        if problem.columns % BLOCK:
            raise ValueError(f"{problem.columns} input features on a rank are not a multiple of {BLOCK}")
        key = create_fp8_quant_key(static=False, group_shape=GroupShape(1, BLOCK))
        return BlockFp8Kernel(init_fp8_linear_kernel(activation_quant_key=key, weight_quant_key=block_key, **common))
    if acting not in _ACTIVATIONS:
        return None
    return Fp8Kernel(
        init_fp8_linear_kernel(activation_quant_key=_ACTIVATIONS[acting], weight_quant_key=_WEIGHTS[strategy], **common)
    )


class Fp8Kernel(VllmKernel):
    """A scale per output row, or one for the whole weight."""

    def __init__(self, kernel: object, *, channels: bool = False) -> None:
        super().__init__(kernel)
        self.channels = channels  # the kernel wants a scale per row also where there is one

    def prepare(self, part: Part, weight: QuantizedWeight, input_scale: Tensor | None) -> None:
        if self.channels and isinstance(weight.type, Float8) and weight.type.strategy == "tensor":
            weight = per_channel(weight)
        parameter: Any = part.set_tensor(
            "weight", weight.codes.contiguous().t()
        )  # vLLM hands [K, N] views to the kernels
        parameter.input_dim, parameter.output_dim = 0, 1
        part.processed_weight_dims = (0, 1)
        scale = weight.scale.float().contiguous()
        part.set_tensor("weight_scale", scale if scale.numel() > 1 or self.channels else scale.reshape(()))
        if input_scale is not None:
            part.set_tensor("input_scale", input_scale.reshape(()))
        self.kernel.process_weights_after_loading(part)


class BlockFp8Kernel(VllmKernel):
    """A scale per 128 x 128 block."""

    def prepare(self, part: Part, weight: QuantizedWeight, input_scale: Tensor | None) -> None:
        part.weight_block_size = [BLOCK, BLOCK]
        part.set_tensor("weight", weight.codes.contiguous())
        # A factor in spite of its name; the one name of a block's scale that all of these kernels know.
        part.set_tensor("weight_scale_inv", weight.scale.float().contiguous())
        self.kernel.process_weights_after_loading(part)
