"""FP8 KV cache with the checkpoint's own scales."""

from __future__ import annotations

import math

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from vllm_autoround.format.manifest import KV_SCALES
from vllm_autoround.plugin import compat


class AutoRoundKVCacheMethod(BaseKVCacheMethod):
    """vLLM's scalar k, v and q scales, all of them required.

    The base class sets a scale that is missing to 1.0 with a warning (q_scale even after saying otherwise), which
    silently clips or coarsens the cache; here it is an error.
    """

    def __init__(self, quant_config: QuantizationConfig, prefix: str) -> None:
        super().__init__(quant_config)
        self.prefix = prefix

    def create_weights(self, layer: torch.nn.Module) -> None:
        super().create_weights(layer)
        # The base class creates them in the model's dtype, which would round the checkpoint's float32 scales.
        for name in KV_SCALES:
            parameter = getattr(layer, name)
            parameter.data = parameter.data.float()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        # A second call finds the parameters consumed: then there is nothing left to check.
        if hasattr(layer, "q_scale") and not compat.weights_already_processed():
            scales = {name: float(getattr(layer, name)) for name in KV_SCALES}
            if missing := [name for name, scale in scales.items() if not (scale > 0 and math.isfinite(scale))]:
                raise ValueError(
                    f"{self.prefix}: the checkpoint promises an FP8 KV cache but has no usable {', '.join(missing)}; "
                    "calibrate it again with --kv-cache fp8"
                )
        super().process_weights_after_loading(layer)
