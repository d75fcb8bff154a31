"""Shards: the layers of the checkpoint inside one layer of vLLM, and the part of each that this rank keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_autoround.format.layouts import Layout
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import TensorSpec, Tile

PROBE = 1 << 16  # features of a layer whose tensors tell how many features an element stands for


class QuantizedLayer(NamedTuple):
    """How one layer of the checkpoint is quantized."""

    scheme: QuantScheme
    layout: Layout


class Span(NamedTuple):
    """The part [start, stop) that a rank keeps of a dimension of ``full`` features in the checkpoint."""

    start: int
    stop: int
    full: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def widened(self, unit: int) -> Span:
        """The least span around it that starts and, unless it reaches the end, stops at a multiple of ``unit``."""
        return Span(self.start // unit * unit, min(-(-self.stop // unit) * unit, self.full), self.full)

    def within(self, other: Span) -> slice:
        """Where it lies in ``other``."""
        return slice(self.start - other.start, self.stop - other.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One layer [rows, columns] of the checkpoint; ``layer`` is None if it is not quantized."""

    layer: QuantizedLayer | None
    rows: Span
    columns: Span

    @property
    def tile(self) -> Tile:
        """The shape of a group."""
        assert self.layer is not None
        return self.layer.scheme.weights.tile(self.rows.full, self.columns.full)

    def specs(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The tensors of such a layer; ``dtype`` is the model's, for weights that are not quantized.

        Scales in a 16-bit type are given as float32, which holds either type exactly.
        """
        if self.layer is None:
            return {"weight": TensorSpec(shape=(rows, columns), dtype=dtype, input_dim=1, output_dim=0)}
        return self.layer.layout.specs(self.layer.scheme, rows, columns, torch.float32)

    def stored(self) -> Shard:
        """The shard that has to be loaded: `rows` and `columns` up to where all of its tensors can be cut."""
        rows, columns = (1, 1) if self.layer is None else _units(self.layer)
        return Shard(layer=self.layer, rows=self.rows.widened(rows), columns=self.columns.widened(columns))


def shards_of(
    layer: Any,
    layers: Sequence[QuantizedLayer | None],
    partitions: Sequence[int],
    columns: int,
    input_size: int,
    output_size: int,
) -> list[Shard]:
    """The shards of a vLLM layer as its ``create_weights`` describes it.

    Args:
        layers: how each shard is quantized.
        partitions: output rows of each shard on this rank.
        columns: input features on this rank.
    """
    if isinstance(layer, VocabParallelEmbedding):
        own, vocabulary = layer.shard_indices, layer.org_vocab_size
        if layer.num_embeddings != vocabulary:
            raise ValueError("a quantized vocabulary cannot be extended by added tokens")
        rows = Span(own.org_vocab_start_index, own.org_vocab_end_index, vocabulary)
        return [Shard(layer=layers[0], rows=rows, columns=Span(0, columns, columns))]
    rank = getattr(layer, "tp_rank", 0)
    ranks = output_size // sum(partitions)
    along_k = Span(0, columns, columns) if input_size == columns else _part(columns, rank, input_size)
    shards = []
    for index, (quantized, size) in enumerate(zip(layers, partitions, strict=True)):
        # Ranks that outnumber the key-value heads share one.
        copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index > 0 else 1
        rows = Span(0, size, size) if ranks == 1 else _part(size, rank // copies, size * ranks // copies)
        shards.append(Shard(layer=quantized, rows=rows, columns=along_k))
    return shards


def _part(size: int, index: int, full: int) -> Span:
    return Span(index * size, (index + 1) * size, full)


@cache
def _units(layer: QuantizedLayer) -> tuple[int, int]:
    """(rows, columns) at whose multiples every tensor of the layer can be cut: whole words and whole groups."""
    units = [8, 1]  # AWQ orders codes of output rows by eights
    for spec in layer.layout.specs(layer.scheme, PROBE, PROBE, torch.float32).values():
        for index, dim in enumerate((spec.output_dim, spec.input_dim)):
            if dim is not None:
                units[index] = math.lcm(units[index], features_each(spec, dim).numerator)
    return units[0], units[1]


def features_each(spec: TensorSpec, dim: int) -> Fraction:
    """Features that an element stands for along ``dim``, from the spec of a layer [PROBE, PROBE]."""
    return spec.pack_factor if dim == spec.packed_dim else Fraction(PROBE, spec.shape[dim])


def check_cuts(shard: Shard) -> None:
    """Raise ValueError unless this rank's part of a shard consists of whole groups."""
    if shard.layer is None:
        return
    sides = ((shard.columns, shard.tile.columns, "input features"), (shard.rows, shard.tile.rows, "output rows"))
    for span, group, what in sides:
        if group < span.full and (span.start % group or (span.stop % group and span.stop != span.full)):
            raise ValueError(
                f"tensor parallelism leaves {span.size} of {span.full} {what} to a rank, which cuts through a group of "
                f"{group}; use fewer ranks or calibrate with a smaller group size"
            )
