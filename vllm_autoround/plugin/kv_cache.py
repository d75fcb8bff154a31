"""FP8 KV cache with the checkpoint's own scales, one of each kind for a layer or for each head of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from vllm_autoround.format.manifest import KV_SCALES
from vllm_autoround.plugin import compat
from vllm_autoround.plugin.kernels import logger


class AutoRoundKVCacheMethod(BaseKVCacheMethod):
    """vLLM's scalar k, v and q scales, all of them required that the checkpoint promises.

    The base class sets a scale that is missing to 1.0 with a warning (q_scale even after saying otherwise), which
    silently clips or coarsens the cache; here it is an error. Other tools promise none for queries: then it is 1.0.
    """

    way_out = "--kv-cache fp8"

    def __init__(self, quant_config: QuantizationConfig, prefix: str, promised: tuple[str, ...] = KV_SCALES) -> None:
        super().__init__(quant_config)
        self.prefix = prefix
        self.promised = promised

    def create_weights(self, layer: Any) -> None:
        super().create_weights(layer)
        # The base class creates them in the model's dtype, which would round the checkpoint's float32 scales.
        for name in KV_SCALES:
            parameter = getattr(layer, name)
            parameter.data = parameter.data.float()

    def process_weights_after_loading(self, layer: Any) -> None:
        # A second call finds the parameters consumed: then there is nothing left to check.
        if hasattr(layer, "q_scale") and not compat.weights_already_processed():
            self.check_scales(layer)
        super().process_weights_after_loading(layer)

    def check_scales(self, layer: Any) -> None:
        """Raise ValueError unless every scale was loaded and is one."""
        scales = {name: getattr(layer, name) for name in self.promised}
        if "q_scale" not in scales:
            logger.warning_once("The checkpoint has no q_scale: attention in FP8 quantizes queries with a scale of 1.0")
            layer.q_scale.data.fill_(1.0)
        if missing := [name for name, scale in scales.items() if not ((scale > 0) & scale.isfinite()).all()]:
            raise ValueError(
                f"{self.prefix}: the checkpoint promises an FP8 KV cache but has no usable {', '.join(missing)}; "
                f"calibrate it again with {self.way_out}"
            )


class PerHeadKVCacheMethod(AutoRoundKVCacheMethod):
    """A scale for each head that this rank has: [heads, 1, 1] on disk, [key-value heads] in the kernel.

    The kernel has one scale of the queries for each key-value head: the largest of its query heads.
    """

    way_out = "--kv-cache fp8_per_head"

    def create_weights(self, layer: Any) -> None:
        backend = layer.attn_backend
        if not backend.supports_per_head_quant_scales():
            raise ValueError(
                f"{self.prefix}: the attention backend {backend.get_name()} has no KV-cache scales per head; use a GPU "
                "with FlashAttention 3 (--attention-backend FLASH_ATTN) or calibrate with --kv-cache fp8"
            )
        for name in KV_SCALES:
            unloaded = torch.full((layer.num_kv_heads,), -1.0, dtype=torch.float32)
            parameter = torch.nn.Parameter(unloaded, requires_grad=False)
            parameter.weight_loader = self._loader_of(layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "q_scale") or compat.weights_already_processed():
            return
        self.check_scales(layer)
        quantized = layer.kv_cache_dtype.startswith("fp8")  # unless the user asked for another type
        for name in KV_SCALES:
            scale = getattr(layer, name).data
            delattr(layer, name)
            if not quantized:
                continue
            setattr(layer, f"_{name}", scale)
            setattr(layer, f"_{name}_float", scale.max().item())
        for name in ("_k_scale", "_v_scale"):  # host copies
            getattr(layer, f"{name}_cpu").fill_(getattr(layer, f"{name}_float"))

    def _loader_of(self, layer: Any, name: str) -> Callable[[Tensor, Tensor], None]:
        own_heads = layer.num_heads if name == "q_scale" else layer.num_kv_heads

        def weight_loader(parameter: Tensor, loaded_weight: Tensor) -> None:
            rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            heads = loaded_weight.flatten()
            # Ranks that outnumber the key-value heads share one.
            copies, rest = divmod(own_heads * ranks, heads.numel())
            if rest or (copies > 1 and (name == "q_scale" or own_heads > 1)):
                raise ValueError(
                    f"{self.prefix}: {name} is for {heads.numel()} heads, expected {own_heads * ranks}; calibrate the "
                    f"checkpoint again with {self.way_out}"
                )
            own = heads[rank // copies * own_heads :][:own_heads]
            parameter.data.copy_(own.view(parameter.numel(), -1).amax(1))

        return weight_loader
