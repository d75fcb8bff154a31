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

from vllm_autoround.format.dialects import read_manifest
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import FORMAT_VERSION, KV_SCALES, MARKER, Manifest, verify_tensors
from vllm_autoround.plugin.embedding import AutoRoundEmbeddingMethod
from vllm_autoround.plugin.kv_cache import AutoRoundKVCacheMethod, PerHeadKVCacheMethod
from vllm_autoround.plugin.linear import AutoRoundLinearMethod
from vllm_autoround.plugin.shards import QuantizedLayer

NAME = "autoround"
logger = init_logger("vllm.plugins.autoround")  # below "vllm", whose handler shows INFO

_KV_STRATEGIES = {"fp8": "tensor", "fp8_per_head": "attn_head"}
# What vLLM's models call their embedding; most do not tell it its own name.
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in", "embedding", "embeddings")


class AutoRoundConfig(QuantizationConfig):
    """The quantization method ``autoround``."""

    def __init__(self, config: dict[str, Any]) -> None:
        """``config``: config.json's ``quantization_config``, in any dialect.

        One that names its layers by pattern or class can be read only together with the checkpoint's tensors, which
        vLLM shows later (`maybe_update_config`); until then `unread` says why there is no manifest.
        """
        super().__init__()
        self.config = config
        self.layers: dict[str, QuantizedLayer] = {}  # by vLLM's names
        self.kv_cache_scheme: dict[str, str] | None = None
        self.tied = False  # lm_head to the embedding
        self.manifest: Manifest | None = None
        self.unread: ManifestError | None = None
        try:
            self._adopt(read_manifest(config))
        except ManifestError as error:
            self.unread = error

    def __repr__(self) -> str:
        return f"AutoRoundConfig({len(self.layers)} layers, kv_cache={self.manifest and self.manifest.kv_cache})"

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
        """Build from config.json's ``quantization_config``; what cannot be read is an error in the next step."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint on request, or by our marker when the user named no method; never otherwise."""
        marked = getattr(hf_config, MARKER, None) is not None
        return NAME if user_quant == NAME or (user_quant is None and marked) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the manifest together with the checkpoint's tensors, and compare the two before anything is loaded.

        Raises:
            ManifestError: what is not understood, a promise that the files do not keep, or a newer format than this
                version knows.
        """
        marker = getattr(hf_config, MARKER, None) or {}
        if marker.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
            raise ManifestError(
                f"{model_name} has format version {marker['format_version']}, this vllm-autoround reads up to "
                f"{FORMAT_VERSION}; upgrade vllm-autoround"
            )
        text_config = getattr(hf_config, "text_config", hf_config)
        self.tied = bool(getattr(text_config, "tie_word_embeddings", False))
        entries = get_safetensors_params_metadata(model_name, revision=revision)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
        if shapes:
            manifest = read_manifest(self.config, shapes)
            verify_tensors(manifest, shapes)
            if marker and manifest.kv_cache and manifest.kv_scales != KV_SCALES:
                raise ManifestError(
                    f"{model_name} has KV-cache scales without q_scale, which our checkpoints always have"
                )
            self._adopt(manifest)
        elif self.unread is not None:
            raise ManifestError(
                f"{self.unread}; the names and shapes of the tensors of {model_name} might tell more, but they are not "
                "available: download the checkpoint and serve the folder"
            )
        else:
            logger.warning("%s: tensor names are not available, the checkpoint was not checked", model_name)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Keep every tensor: the base class drops ``g_idx``, which says whether an order of activations matters."""
        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; called twice for each Attention (at creation and after loading)."""
        if self.unread is not None:
            raise self.unread
        if isinstance(layer, Attention):
            return self._kv_cache_method(prefix)
        if isinstance(layer, MLAAttention) and self.kv_cache_scheme:
            raise NotImplementedError(f"{prefix}: KV-cache scales of latent attention are not supported")
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.layers):
            raise NotImplementedError(f"{prefix}: quantized mixture-of-experts layers are not supported")
        if isinstance(layer, LinearBase):
            layers = self._layers(prefix)
            return AutoRoundLinearMethod(layers, prefix) if any(layers) else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            return AutoRoundLinearMethod([self.layers[prefix]], prefix) if prefix in self.layers else None
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(prefix)
        return None

    def _adopt(self, manifest: Manifest) -> None:
        self.manifest, self.unread = manifest, None
        self.layers = {
            layer: QuantizedLayer(scheme, manifest.layout_of(layer)) for layer, scheme in manifest.schemes.items()
        }
        # vLLM's Attention reads this attribute and turns kv_cache_dtype "auto" into "fp8" when it is set.
        self.kv_cache_scheme = {"strategy": _KV_STRATEGIES[manifest.kv_cache]} if manifest.kv_cache else None

    def _layers(self, prefix: str) -> list[QuantizedLayer | None]:
        """The layers of the checkpoint under vLLM's name, which may stand for several that vLLM fuses."""
        if prefix in self.layers:
            return [self.layers[prefix]]
        parent, _, name = prefix.rpartition(".")
        shards = [f"{parent}.{shard}" if parent else shard for shard in self.packed_modules_mapping.get(name, ())]
        return [self.layers.get(shard) for shard in shards]

    def _kv_cache_method(self, prefix: str) -> QuantizeMethodBase | None:
        if self.kv_cache_scheme is None or self.manifest is None:
            return None
        per_head = self.kv_cache_scheme["strategy"] == "attn_head"
        method = PerHeadKVCacheMethod if per_head else AutoRoundKVCacheMethod
        return method(self, prefix, self.manifest.kv_scales)

    def _embedding_method(self, prefix: str) -> QuantizeMethodBase | None:
        named = [prefix] if prefix else [name for name in self.layers if name.rpartition(".")[2] in _EMBEDDINGS]
        quantized = [name for name in named if name in self.layers]
        if not quantized:
            return None
        if len(quantized) > 1:
            raise ValueError(
                f"vLLM's model does not say which of {', '.join(quantized)} it creates; quantize one of them at most"
            )
        if self.tied:
            raise ValueError(
                f"{quantized[0]}: quantized, but config.json ties lm_head to it, which cannot multiply with it; set "
                "tie_word_embeddings to false and store lm_head as well"
            )
        return AutoRoundEmbeddingMethod(self.layers[quantized[0]], quantized[0])


def register_autoround() -> None:
    """Register `AutoRoundConfig` as ``autoround``."""
    register_quantization_config(NAME)(AutoRoundConfig)
