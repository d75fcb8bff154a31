"""AutoRoundConfig: checkpoint manifest -> the method of each vLLM layer."""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import (
    FORMAT_VERSION,
    MARKER,
    Manifest,
    from_compressed_tensors,
    verify_tensors,
)
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.plugin.kv_cache import AutoRoundKVCacheMethod
from vllm_autoround.plugin.linear import AutoRoundLinearMethod

NAME = "autoround"
logger = init_logger("vllm.plugins.autoround")  # below "vllm", whose handler shows INFO


class AutoRoundConfig(QuantizationConfig):
    """The quantization method ``autoround``."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.schemes = dict(manifest.schemes)
        self.manifest = manifest
        # vLLM's Attention reads this attribute and turns kv_cache_dtype "auto" into "fp8" when it is set.
        self.kv_cache_scheme = {"strategy": "tensor"} if manifest.kv_cache else None

    def __repr__(self) -> str:
        return f"AutoRoundConfig({len(self.schemes)} layers, kv_cache={self.manifest.kv_cache})"

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # the config is inside config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoRoundConfig:
        """Build from config.json's ``quantization_config``; raises ManifestError (a ValueError) by name."""
        return cls(from_compressed_tensors(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint on request, or by our marker when the user named no method; never otherwise."""
        marked = getattr(hf_config, MARKER, None) is not None
        return NAME if user_quant == NAME or (user_quant is None and marked) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the checkpoint's tensors against the manifest before anything is loaded.

        Raises:
            ManifestError: a promise that the files do not keep, or a newer format than this version knows.
        """
        marker = getattr(hf_config, MARKER, None) or {}
        if marker.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
            raise ManifestError(
                f"{model_name} has format version {marker['format_version']}, this vllm-autoround reads up to "
                f"{FORMAT_VERSION}; upgrade vllm-autoround"
            )
        names = get_safetensors_params_metadata(model_name, revision=revision)
        if names:
            verify_tensors(self.manifest, names)
        else:
            logger.warning("%s: tensor names are not available, the checkpoint was not checked", model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.schemes = hf_to_vllm_mapper.apply_dict(self.schemes)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; called twice for each Attention (at creation and after loading)."""
        if isinstance(layer, Attention):
            return AutoRoundKVCacheMethod(self, prefix) if self.kv_cache_scheme else None
        if isinstance(layer, MLAAttention) and self.kv_cache_scheme:
            raise NotImplementedError(f"{prefix}: KV-cache scales of latent attention are not supported")
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.schemes):
            raise NotImplementedError(f"{prefix}: quantized mixture-of-experts layers are not supported")
        if isinstance(layer, LinearBase):
            scheme = self._scheme(prefix)
            return AutoRoundLinearMethod(scheme, prefix) if scheme else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            scheme = self._scheme(prefix)
            return AutoRoundLinearMethod(scheme, prefix) if scheme else None
        if isinstance(layer, VocabParallelEmbedding) and self._scheme(prefix):
            raise NotImplementedError(f"{prefix}: quantized embeddings are not supported")
        return None

    def _scheme(self, prefix: str) -> QuantScheme | None:
        """The scheme of a layer under vLLM's name, which may stand for several fused layers of the checkpoint."""
        if prefix in self.schemes:
            return self.schemes[prefix]
        parent, _, name = prefix.rpartition(".")
        shards = [f"{parent}.{shard}" if parent else shard for shard in self.packed_modules_mapping.get(name, ())]
        schemes = {shard: self.schemes.get(shard) for shard in shards}
        if len(set(schemes.values())) > 1:
            listing = ", ".join(f"{shard}: {scheme or 'not quantized'}" for shard, scheme in schemes.items())
            raise ValueError(f"{prefix} fuses layers of different schemes ({listing}); calibrate them with one scheme")
        return next(iter(schemes.values()), None)


def register_autoround() -> None:
    """Register `AutoRoundConfig` as ``autoround``."""
    register_quantization_config(NAME)(AutoRoundConfig)
