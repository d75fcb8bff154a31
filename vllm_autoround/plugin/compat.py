"""Every touch-point that differs between the supported vLLM releases (0.26 to 0.33), with its removal condition."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.model_executor import utils as vllm_utils
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.scalar_type import scalar_types


def mp_linear_layer_config(**fields: Any) -> MPLinearLayerConfig:
    """``MPLinearLayerConfig(**fields)`` of a weight without activation order.

    REMOVE when vLLM < 0.30 is no longer supported: until then the class requires ``has_g_idx``.
    """
    if any(field.name == "has_g_idx" for field in dataclasses.fields(MPLinearLayerConfig)):
        fields["has_g_idx"] = False
    return MPLinearLayerConfig(**fields)


def humming_takes_zero_points() -> bool:
    """Whether this release itself uses Humming for weights with zero points, that is, asymmetric schemes.

    Older ones select it when asked, but their own loader allows 4 and 8 bits only, and the results deviate: with 0.26
    on an H200, 19 of 192 greedy tokens were not those of the dequantized weights. Why was not found.

    REMOVE when vLLM < 0.32 is no longer supported: the types of those widths came with the support.
    """
    return hasattr(scalar_types, "uint3")


def weights_already_processed() -> bool:
    """Whether vLLM is loading weights that an earlier engine exported after post-load processing.

    REMOVE when vLLM < 0.30 is no longer supported: it has no such mode.
    """
    probe = getattr(vllm_utils, "is_weights_pre_processed", None)
    return probe is not None and probe()
