"""Loading the tensors of a layer's shards.

vLLM loads by parameter name, and the names of shards coincide (each has a ``weight_packed``): a parameter is a buffer
of bytes that holds the tensors of one suffix, one shard after the other, and its loader finds the shard by the id that
vLLM hands to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.utils import set_weight_attrs

from vllm_autoround.format.weights import QuantizedWeight, TensorSpec
from vllm_autoround.plugin.matrices import crop
from vllm_autoround.plugin.shards import PROBE, QuantizedLayer, Shard, check_cuts, features_each, shards_of

_ALIGNMENT = 16  # bytes; of every tensor in a buffer, so that it can be viewed in its type
_QKV = {"q": 0, "k": 1, "v": 2}

ShardId = int | str | tuple[int, ...] | None  # what vLLM calls loaded_shard_id


class Slot(NamedTuple):
    """Where in a buffer of bytes a tensor lies."""

    offset: int
    spec: TensorSpec

    @property
    def bytes(self) -> int:
        return math.prod(self.spec.shape) * self.spec.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor, sharing the buffer's memory."""
        return buffer[self.offset : self.offset + self.bytes].view(self.spec.dtype).view(self.spec.shape)


class ShardLoader:
    """Registers the parameters of a layer's shards, loads them, and gives the weights out."""

    def __init__(self, prefix: str, shards: Sequence[Shard], dtype: torch.dtype) -> None:
        self.prefix = prefix
        self.shards = shards
        self._stored = [shard.stored() for shard in shards]
        self._dtype = dtype
        self._slots: dict[str, dict[int, Slot]] = {}  # suffix -> shard -> slot
        ends: dict[str, int] = {}
        for index, shard in enumerate(self._stored):
            for suffix, spec in shard.specs(shard.rows.size, shard.columns.size, dtype).items():
                slot = Slot(ends.get(suffix, 0), spec)
                ends[suffix] = -(-(slot.offset + slot.bytes) // _ALIGNMENT) * _ALIGNMENT
                self._slots.setdefault(suffix, {})[index] = slot
        self._sizes = ends

    def register(self, layer: torch.nn.Module) -> None:
        """Create the parameters on the current default device."""
        for suffix, slots in self._slots.items():
            parameter = torch.nn.Parameter(torch.empty(self._sizes[suffix], dtype=torch.uint8), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._loader_of(suffix)})
            output_dims = {slot.spec.output_dim for slot in slots.values()}
            if len(output_dims) == 1 and None not in output_dims:
                # Some models permute the rows of what they load along this dimension.
                set_weight_attrs(parameter, {"output_dim": output_dims.pop()})
            layer.register_parameter(suffix, parameter)

    def take(self, layer: torch.nn.Module) -> list[dict[str, Tensor]]:
        """The loaded tensors of each shard, by suffix; the layer's parameters are removed."""
        tensors: list[dict[str, Tensor]] = [{} for _ in self.shards]
        for suffix, slots in self._slots.items():
            buffer = getattr(layer, suffix).data
            for index, slot in slots.items():
                tensors[index][suffix] = slot.view(buffer)
            delattr(layer, suffix)
        return tensors

    def weight(self, index: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Tensor:
        """A shard's weight [rows, columns] of this rank from its tensors; a tensor if it is not quantized.

        Raises:
            ValueError: contents that cannot be what was meant.
        """
        shard, stored = self.shards[index], self._stored[index]
        if shard.layer is None:
            return tensors["weight"]
        scheme, layout = shard.layer
        tensors = dict(tensors)
        if "weight_shape" in tensors:  # the file's is that of the whole layer
            tensors["weight_shape"] = torch.tensor([stored.rows.size, stored.columns.size])
        try:
            weight = layout.from_tensors(tensors, scheme)
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from error
        return crop(weight, shard.rows.within(stored.rows), shard.columns.within(stored.columns))

    def input_scale(self, index: int, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """A shard's static scale of its activations, [1] float32.

        Raises:
            ValueError: it is no scale.
        """
        layer = self.shards[index].layer
        if layer is None or layer.scheme.activations is None or (suffix := layer.scheme.activations.static) is None:
            return None
        scale = tensors[suffix]
        if not (scale > 0).all() or not scale.isfinite().all():
            raise ValueError(f"{self.prefix}: {suffix} is {scale.item()}, not a scale; calibrate the layer again")
        return scale.clone()

    def _loader_of(self, suffix: str) -> Callable[..., None]:
        def weight_loader(parameter: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
            self._load(suffix, parameter.data, loaded_weight, loaded_shard_id)

        return weight_loader

    def _load(self, suffix: str, buffer: Tensor, loaded: Tensor, shard_id: ShardId) -> None:
        """Copy this rank's part of a tensor of the file, which may hold several shards one below the other."""
        indices = self._indices(shard_id)
        rows = sum(self.shards[index].rows.full for index in indices)
        first = self._stored[indices[0]]
        if any(self._stored[index].layer != first.layer for index in indices):
            raise ValueError(f"{self.prefix}: the checkpoint fuses {suffix} of layers that are quantized differently")
        expected = first.specs(rows, first.columns.full, self._dtype).get(suffix)
        if expected is None:
            raise ValueError(f"{self.prefix}: shard {shard_id!r} has no {suffix} by its scheme, the checkpoint has one")
        loaded = self._checked(suffix, loaded, expected)
        units = first.specs(PROBE, PROBE, self._dtype)[suffix]
        above = 0  # rows of the fused tensor before this shard
        for index in indices:
            stored, slot = self._stored[index], self._slots[suffix][index]
            part = loaded
            begins = ((expected.output_dim, above + stored.rows.start), (expected.input_dim, stored.columns.start))
            for dim, begin in begins:
                if dim is not None:
                    start = begin / features_each(units, dim)
                    if start.denominator != 1:
                        raise ValueError(f"{self.prefix}: row {begin} of the fused {suffix} lies inside of a word")
                    part = part.narrow(dim, int(start), slot.spec.shape[dim])
            slot.view(buffer).copy_(part)
            above += self.shards[index].rows.full

    def _indices(self, shard_id: ShardId) -> list[int]:
        if shard_id is None:
            return list(range(len(self.shards)))
        ids: Sequence[Any] = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        indices = [_QKV.get(id_, -1) if isinstance(id_, str) else id_ for id_ in ids]
        if not all(0 <= index < len(self.shards) for index in indices):
            raise ValueError(f"{self.prefix}: vLLM loads shard {shard_id!r} of {len(self.shards)}, which is not known")
        return indices

    def _checked(self, suffix: str, loaded: Tensor, expected: TensorSpec) -> Tensor:
        """``loaded`` in the expected shape and kind of type; dimensions of 1 at the end may be missing or too many."""
        name = f"{self.prefix}: {suffix}"
        if loaded.dtype == torch.float8_e8m0fnu and expected.dtype == torch.uint8:
            loaded = loaded.view(torch.uint8)
        if loaded.dtype != expected.dtype and not _converts(loaded.dtype, expected.dtype):
            raise ValueError(f"{name} has type {loaded.dtype}, expected {expected.dtype}")
        shape = tuple(loaded.shape)
        while len(shape) > len(expected.shape) and shape[-1] == 1:
            shape = shape[:-1]
        shape += (1,) * (len(expected.shape) - len(shape))
        if shape != expected.shape:
            raise ValueError(f"{name} has shape {list(loaded.shape)}, expected {list(expected.shape)}")
        return loaded.reshape(shape)


def _converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a value keeps its meaning: among floating-point types of 16 bits and more, or to a wider integer."""
    if source.is_floating_point != target.is_floating_point:
        return False
    return min(source.itemsize, target.itemsize) > 1 if source.is_floating_point else source.itemsize < target.itemsize


def make_loader(
    layer: torch.nn.Module,
    prefix: str,
    layers: Sequence[QuantizedLayer | None],
    partitions: Sequence[int],
    columns: int,
    input_size: int,
    output_size: int,
    dtype: torch.dtype,
) -> ShardLoader:
    """The loader of a vLLM layer that is described as in `shards_of`; a single one of ``layers`` stands for all shards.

    Raises:
        ValueError: tensor parallelism cuts through a group, or it is unknown which shard is which layer.
    """
    if len(layers) != len(partitions):
        if len(set(layers)) > 1:
            raise ValueError(
                f"{prefix}: {len(layers)} layers of the checkpoint, quantized differently, make {len(partitions)} "
                "shards; quantize them alike"
            )
        layers = [layers[0]] * len(partitions)
    try:
        shards = shards_of(layer, layers, partitions, columns, input_size, output_size)
        for shard in shards:
            check_cuts(shard)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error
    return ShardLoader(prefix, shards, dtype)
