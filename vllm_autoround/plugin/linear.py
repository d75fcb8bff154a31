"""LinearMethod of quantized layers: any scheme in any layout, also several of them fused in one layer of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight
from vllm_autoround.plugin.kernels import Part, Problem, announce, choose_kernel
from vllm_autoround.plugin.loading import ShardLoader, make_loader
from vllm_autoround.plugin.matrices import join, pad_rows
from vllm_autoround.plugin.shards import QuantizedLayer


class LoadedShard(NamedTuple):
    """A shard as this rank holds it; a plain tensor and no scheme if it is not quantized."""

    index: int
    scheme: QuantScheme | None
    weight: QuantizedWeight | Tensor
    input_scale: Tensor | None  # [1] float32


class AutoRoundLinearMethod(LinearMethodBase):
    """Linear layers and lm_head."""

    def __init__(self, layers: Sequence[QuantizedLayer | None], prefix: str) -> None:
        """``layers``: of the checkpoint, as they are fused in order; a single one stands for every shard."""
        self.layers = layers
        self.prefix = prefix
        self.dtype: torch.dtype
        self.columns: int
        self.partitions: list[int]
        self.loader: ShardLoader | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters of this rank's part of every shard.

        Raises:
            ValueError: tensor parallelism cuts through a group, or no kernel fits a scheme.
        """
        self.dtype, self.columns, self.partitions = params_dtype, input_size_per_partition, output_partition_sizes
        # As every method of vLLM does; not all classes of layers have them by themselves.
        layer.input_size_per_partition, layer.output_size_per_partition = self.columns, sum(self.partitions)
        self.loader = make_loader(
            layer, self.prefix, self.layers, output_partition_sizes, self.columns, input_size, output_size, params_dtype
        )
        rows: dict[QuantScheme | None, int] = {}
        for shard, size in zip(self.loader.shards, output_partition_sizes, strict=True):
            scheme = shard.layer and shard.layer.scheme
            rows[scheme] = rows.get(scheme, 0) + size
        for scheme, size in rows.items():  # what cannot be served is said before the weights are loaded
            kernel = choose_kernel(self._problem(scheme, size))
            if scheme is not None:
                announce(layer, scheme, kernel)
        self.loader.register(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.loader is None:  # vLLM may ask again
            return
        loader, self.loader = self.loader, None
        device = next(layer.parameters()).device
        parts = torch.nn.ModuleList()
        for call in fuse(self._loaded(loader, layer)):
            sizes = tuple(self.partitions[shard.index] for shard in call.shards)
            problem = self._problem(call.scheme, sum(sizes))
            part = Part(problem, tuple(shard.index for shard in call.shards), sizes)
            part.kernel = choose_kernel(problem)
            part.kernel.prepare(part, call.weight, call.shards[0].input_scale)
            parts.append(part)
        layer.parts = parts
        # vLLM's LoRA layers look here for the device that the layer is on.
        layer.register_buffer("weight_packed", torch.empty(0, device=device), persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of x."""
        parts = layer.parts
        if len(parts) == 1:
            return parts[0].kernel.apply(parts[0], x, bias)
        biases = [None] * len(self.partitions) if bias is None else bias.split(self.partitions)
        outputs: list[Tensor] = [x] * len(self.partitions)
        for part in parts:
            own = None if bias is None else torch.cat([biases[index] for index in part.shards])
            out = part.kernel.apply(part, x, own)
            for index, piece in zip(part.shards, out.split(part.sizes, dim=-1), strict=True):
                outputs[index] = piece
        return torch.cat(outputs, dim=-1)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """vLLM ties lm_head to the embedding and skips its tensors: a quantized head would stay uninitialized."""
        raise ValueError(
            f"{self.prefix}: quantized, but config.json ties it to the embedding, so it would never be loaded; "
            "set tie_word_embeddings to false"
        )

    def _problem(self, scheme: QuantScheme | None, rows: int) -> Problem:
        return Problem(prefix=self.prefix, scheme=scheme, rows=rows, columns=self.columns, dtype=self.dtype)

    def _loaded(self, loader: ShardLoader, layer: torch.nn.Module) -> list[LoadedShard]:
        loaded = []
        for index, tensors in enumerate(loader.take(layer)):
            quantized, weight = loader.shards[index].layer, loader.weight(index, tensors)
            if quantized is None or not isinstance(weight, QuantizedWeight):
                loaded.append(LoadedShard(index, None, weight, None))
                continue
            padded = pad_rows(weight, self.partitions[index])  # lm_head: the vocabulary is padded
            loaded.append(LoadedShard(index, quantized.scheme, padded, loader.input_scale(index, tensors)))
        return loaded


class Call(NamedTuple):
    """Shards that one kernel multiplies with, and their joint weight."""

    shards: list[LoadedShard]
    weight: QuantizedWeight | Tensor

    @property
    def scheme(self) -> QuantScheme | None:
        """As the joint weight has it: scales per tensor may have become scales per row."""
        scheme = self.shards[0].scheme
        return scheme and replace(scheme, weights=self.weight.type)  # type: ignore[union-attr]


def fuse(shards: Sequence[LoadedShard]) -> list[Call]:
    """The calls that are needed to multiply with all shards.

    Shards share a call if their scheme and their static scales are the same: a common maximum would change weights.
    """
    dense = [shard for shard in shards if isinstance(shard.weight, Tensor)]
    groups: dict[tuple[QuantScheme | None, float | None, float | None], list[LoadedShard]] = {}
    for shard in shards:
        if isinstance(shard.weight, QuantizedWeight):
            scales = (shard.weight.global_scale, shard.input_scale)
            first, second = (None if scale is None else scale.item() for scale in scales)
            groups.setdefault((shard.scheme, first, second), []).append(shard)
    calls: list[Call] = []
    for group in groups.values():
        weights = [shard.weight for shard in group if isinstance(shard.weight, QuantizedWeight)]
        if (joint := join(weights)) is not None:
            calls.append(Call(group, joint))
        else:
            calls.extend(Call([shard], weight) for shard, weight in zip(group, weights, strict=True))
    if dense:
        calls.append(Call(dense, torch.cat([shard.weight for shard in dense if isinstance(shard.weight, Tensor)])))
    return calls
