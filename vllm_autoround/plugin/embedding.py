"""Method of quantized embeddings: the looked-up rows are dequantized, and only they."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from vllm_autoround.format.weights import QuantizedWeight
from vllm_autoround.kernels.lookup import PackedRows
from vllm_autoround.plugin.kernels import logger
from vllm_autoround.plugin.loading import ShardLoader, make_loader
from vllm_autoround.plugin.matrices import pad_rows
from vllm_autoround.plugin.shards import QuantizedLayer


class AutoRoundEmbeddingMethod(QuantizeMethodBase):
    """VocabParallelEmbedding."""

    def __init__(self, quantized: QuantizedLayer, prefix: str) -> None:
        self.quantized = quantized
        self.prefix = prefix
        self.loader: ShardLoader | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters of this rank's part of the vocabulary.

        Raises:
            ValueError: a scheme with quantized activations, which a lookup has none of.
        """
        if self.quantized.scheme.activations is not None:
            raise ValueError(
                f"{self.prefix}: an embedding has no activations to quantize, as {self.quantized.scheme} would; "
                "calibrate it with a weight-only scheme"
            )
        self.dtype, self.rows = params_dtype, sum(output_partition_sizes)
        sizes: tuple[Sequence[int], int, int, int] = (
            output_partition_sizes,
            input_size_per_partition,
            input_size,
            output_size,
        )
        self.loader = make_loader(layer, self.prefix, [self.quantized], *sizes, params_dtype)
        self.loader.register(layer)
        logger.info_once(f"{type(layer).__name__} of {self.quantized.scheme}: looked-up rows are dequantized")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.loader is None:  # vLLM may ask again
            return
        loader, self.loader = self.loader, None
        (tensors,) = loader.take(layer)
        weight = loader.weight(0, tensors)
        assert isinstance(weight, QuantizedWeight)
        layer.packed_rows = PackedRows(pad_rows(weight, self.rows))

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Token ids [...] of this rank -> [..., K] in the model's dtype."""
        rows: Tensor = layer.packed_rows(input_)
        return rows.to(self.dtype)

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError(f"{self.prefix}: an embedding is looked up in, not multiplied with")

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        raise RuntimeError(f"{self.prefix}: an embedding is not tied to another")
