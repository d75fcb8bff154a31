"""Every touch-point that differs between the supported vLLM releases (0.26 to 0.33), with its removal condition."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from vllm.model_executor import utils as vllm_utils
from vllm.model_executor.kernels import linear as vllm_kernels
from vllm.model_executor.kernels.linear.mixed_precision import humming
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.scalar_type import scalar_types


def mp_linear_layer_config(**fields: Any) -> vllm_kernels.MPLinearLayerConfig:
    """``MPLinearLayerConfig(**fields)`` of a weight without activation order.

    REMOVE when vLLM < 0.30 is no longer supported: until then the class requires ``has_g_idx``.
    """
    if any(field.name == "has_g_idx" for field in dataclasses.fields(vllm_kernels.MPLinearLayerConfig)):
        fields["has_g_idx"] = False
    return vllm_kernels.MPLinearLayerConfig(**fields)


def init_mxfp4_linear_kernel(*, use_a16: bool) -> Any:
    """The MXFP4 kernel for this device; ``use_a16``: the activations must not be quantized.

    REMOVE when vLLM < 0.27 is no longer supported: its selector knows nothing of activations and quantizes them where
    the device can.
    """
    if "activation_quant_key" in inspect.signature(vllm_kernels.init_mxfp4_linear_kernel).parameters:
        key = None if use_a16 else quant_utils.kMxfp4Dynamic
        return vllm_kernels.init_mxfp4_linear_kernel(activation_quant_key=key)
    if use_a16:
        return vllm_kernels.MarlinMxFp4LinearKernel(vllm_kernels.MxFp4LinearLayerConfig())
    return vllm_kernels.init_mxfp4_linear_kernel()


def init_mxfp8_linear_kernel(rows: int, columns: int, *, use_a16: bool) -> Any:
    """The MXFP8 kernel for this device and a weight [rows, columns]; Marlin if the activations must not be quantized.

    REMOVE the shape's check when vLLM < 0.31 is no longer supported: from then on the selector requires it.
    """
    takes_shape = "weight_shape" in inspect.signature(vllm_kernels.init_mxfp8_linear_kernel).parameters
    shape = {"weight_shape": (rows, columns)} if takes_shape else {}
    if use_a16:
        return vllm_kernels.MarlinMxfp8LinearKernel(vllm_kernels.Mxfp8LinearLayerConfig(**shape))
    return vllm_kernels.init_mxfp8_linear_kernel(**shape)


def humming_takes_zero_points() -> bool:
    """Whether this release itself uses Humming for weights with zero points, that is, asymmetric schemes.

    Older ones select it when asked, but their own loader allows 4 and 8 bits only, and the results deviate: with 0.26
    on an H200, 19 of 192 greedy tokens were not those of the dequantized weights. Why was not found.

    REMOVE when vLLM < 0.32 is no longer supported: the types of those widths came with the support.
    """
    return hasattr(scalar_types, "uint3")


def humming_quantizes_activations() -> bool:
    """Whether Humming obeys an 8-bit ``act_type``; older ones accept it and leave the activations alone.

    REMOVE when vLLM < 0.33 is no longer supported.
    """
    return hasattr(humming, "_ACT_QUANT_KEYS")


def weights_already_processed() -> bool:
    """Whether vLLM is loading weights that an earlier engine exported after post-load processing.

    REMOVE when vLLM < 0.30 is no longer supported: it has no such mode.
    """
    probe = getattr(vllm_utils, "is_weights_pre_processed", None)
    return probe is not None and probe()
