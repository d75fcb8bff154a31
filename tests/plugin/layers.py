"""vLLM's own parallel layers, made and loaded shard by shard as vLLM does it, and what they must compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_autoround.format.layouts import COMPRESSED_TENSORS, LAYOUTS
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Integer, QuantizedWeight, quantize
from vllm_autoround.plugin.config import AutoRoundConfig
from vllm_autoround.plugin.embedding import AutoRoundEmbeddingMethod
from vllm_autoround.plugin.linear import AutoRoundLinearMethod

COLUMNS = 512  # K of every layer; a multiple of every group size, also when two ranks split it
VOCABULARY = 500  # not a multiple of 64, to which vLLM pads; nor do zero points of every width fill whole words
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
INTEGERS = [
    QuantScheme(Integer(bits=bits, group_size=group_size, symmetric=symmetric))
    for bits in range(2, 9)
    for symmetric in (True, False)
    for group_size in (32, 128, None)
]
FLOATS = [scheme for name, scheme in NAMED_SCHEMES.items() if name != "W4AFP8"]  # one value, two names
SCHEMES = INTEGERS + FLOATS

Shard = int | str | None  # what vLLM calls loaded_shard_id; None: the layer is not fused


def integer(bits: int, group_size: int | None = 32, symmetric: bool = True) -> QuantScheme:
    return QuantScheme(Integer(bits=bits, group_size=group_size, symmetric=symmetric))


def some_schemes(offset: int) -> list[QuantScheme]:
    """Every integer width in both symmetries, each with one group size, another for another ``offset``; all floats."""
    return [scheme for index, scheme in enumerate(INTEGERS) if index % 3 == (index // 3 + offset) % 3] + FLOATS


@dataclass(frozen=True)
class Kind:
    """A class of layer as vLLM's models create and load it."""

    label: str
    layer: type[torch.nn.Module]
    name: str  # of the layer, inside its parent
    create: Callable[..., torch.nn.Module]
    shards: dict[Shard, tuple[str, int]]  # shard id -> name on disk, output rows over all ranks
    parent: str = "model.layers.0."
    splits_input: bool = False
    copied: tuple[Shard, ...] = ()  # shards that both of two ranks hold in full

    @property
    def names(self) -> dict[Shard, str]:
        """Shard id -> full name on disk."""
        return {shard: self.parent + name for shard, (name, _) in self.shards.items()}


def _replicated(**common: Any) -> torch.nn.Module:
    return ReplicatedLinear(COLUMNS, 96, **common)


def _row(**common: Any) -> torch.nn.Module:
    # Each rank returns its part of the sum; the bias may not be added to a part.
    return RowParallelLinear(COLUMNS, 96, reduce_results=common["bias"], **common)


def head(rows: int = VOCABULARY) -> Kind:
    def create(**common: Any) -> torch.nn.Module:
        return ParallelLMHead(rows, COLUMNS, **common)

    return Kind("lm_head", ParallelLMHead, "lm_head", create, {None: ("lm_head", rows)}, parent="")


def embedding(rows: int = VOCABULARY) -> Kind:
    def create(bias: bool = False, **common: Any) -> torch.nn.Module:
        return VocabParallelEmbedding(rows, COLUMNS, **common)

    name = "embed_tokens"
    return Kind("embedding", VocabParallelEmbedding, name, create, {None: (name, rows)}, parent="model.")


def column(rows: int = 192) -> Kind:
    def create(**common: Any) -> torch.nn.Module:
        return ColumnParallelLinear(COLUMNS, rows, **common)

    return Kind("column", ColumnParallelLinear, "fc1", create, {None: ("fc1", rows)})


def merged(gate: int = 128, up: int = 192) -> Kind:
    def create(**common: Any) -> torch.nn.Module:
        return MergedColumnParallelLinear(COLUMNS, [gate, up], **common)

    shards: dict[Shard, tuple[str, int]] = {0: ("gate_proj", gate), 1: ("up_proj", up)}
    return Kind("merged", MergedColumnParallelLinear, "gate_up_proj", create, shards)


def qkv(head_size: int = 32, heads: int = 4, kv_heads: int = 2) -> Kind:
    def create(**common: Any) -> torch.nn.Module:
        return QKVParallelLinear(COLUMNS, head_size, heads, kv_heads, **common)

    kv_rows = kv_heads * head_size
    shards: dict[Shard, tuple[str, int]] = {
        "q": ("q_proj", heads * head_size),
        "k": ("k_proj", kv_rows),
        "v": ("v_proj", kv_rows),
    }
    copied = ("k", "v") if kv_heads == 1 else ()
    return Kind(f"qkv{kv_heads}", QKVParallelLinear, "qkv_proj", create, shards, copied=copied)


REPLICATED = Kind("replicated", ReplicatedLinear, "gate", _replicated, {None: ("gate", 96)}, copied=(None,))
ROW = Kind("row", RowParallelLinear, "down_proj", _row, {None: ("down_proj", 96)}, splits_input=True)
COLUMN, MERGED, QKV, QKV_ONE_KV_HEAD = column(), merged(), qkv(), qkv(kv_heads=1)
KINDS = [REPLICATED, COLUMN, ROW, MERGED, QKV, QKV_ONE_KV_HEAD]
# The same with parts that two ranks can split into blocks of 128 rows.
WIDE_KINDS = [REPLICATED, column(512), ROW, merged(256, 512), qkv(head_size=128), qkv(head_size=128, kv_heads=1)]


def identify(value: object) -> str:
    """The id of a parameter of a test."""
    return value.label if isinstance(value, Kind) else str(value)


@dataclass(frozen=True)
class Stored:
    """One layer of a checkpoint."""

    scheme: QuantScheme | None
    weight: QuantizedWeight | Tensor  # a tensor if it is not quantized
    input_scale: Tensor | None = None
    layout: str = COMPRESSED_TENSORS

    def tensors(self) -> dict[str, Tensor]:
        if isinstance(self.weight, Tensor):
            return {"weight": self.weight}
        tensors = dict(LAYOUTS[self.layout].to_tensors(self.weight))
        if self.input_scale is not None:
            assert self.scheme is not None
            assert self.scheme.activations is not None
            tensors[str(self.scheme.activations.static)] = self.input_scale
        return tensors

    def dequantize(self) -> Tensor:
        return self.weight.float() if isinstance(self.weight, Tensor) else self.weight.dequantize()

    def acts_on(self, x: Tensor) -> Tensor:
        """What of x [..., K] the layer multiplies with."""
        if self.scheme is None or self.scheme.activations is None:
            return x.float()
        return self.scheme.activations.fake_quantize(x, self.input_scale)


def random_weight(scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """Integers: random codes, scales of both signs, zero points; else a random weight, rounded."""
    type_ = scheme.weights
    if not isinstance(type_, Integer):
        weight = torch.randn(rows, columns) * torch.randn(rows, 1).exp()
        return quantize(weight.to(dtype), type_, type_.global_scale(torch.tensor(4.0)))
    groups = type_.tile(rows, columns).tiles(rows, columns)[1]
    scale = (torch.rand(rows, groups) + 0.5) * torch.randn(rows, groups).sign() * 0.02
    zero = None if type_.symmetric else torch.randint(0, type_.max_code + 1, (rows, groups), dtype=torch.uint8)
    codes = torch.randint(0, type_.max_code + 1, (rows, columns), dtype=torch.uint8)
    return QuantizedWeight(type=type_, codes=codes, scale=scale.to(dtype), zero_point=zero)


def stored(
    scheme: QuantScheme | None,
    rows: int,
    dtype: torch.dtype = torch.float32,
    layout: str = COMPRESSED_TENSORS,
    amax: float = 3.0,
) -> Stored:
    if scheme is None:
        return Stored(None, torch.randn(rows, COLUMNS).to(dtype))
    scale = scheme.activations and scheme.activations.calibrated(torch.tensor(amax))
    weight = random_weight(scheme, rows, COLUMNS, dtype)
    if layout.startswith("gptq") and weight.zero_point is not None:  # which may store it minus one
        weight = replace(weight, zero_point=weight.zero_point.clamp(min=1))
    return Stored(scheme, weight, scale, layout)


def all_of(
    kind: Kind, scheme: QuantScheme, dtype: torch.dtype = torch.float32, layout: str = COMPRESSED_TENSORS
) -> dict[Shard, Stored]:
    """Every shard of a layer, all in one scheme and layout."""
    return {shard: stored(scheme, rows, dtype, layout) for shard, (_, rows) in kind.shards.items()}


def config_of(
    layers: Mapping[str, Stored | QuantScheme], kv_cache: Any = None, ignore: tuple[str, ...] = ()
) -> AutoRoundConfig:
    """The plugin's config for these layers, past the reading of a file."""
    schemes, layouts = {}, {}
    for name, layer in layers.items():
        scheme = layer.scheme if isinstance(layer, Stored) else layer
        if scheme is not None:
            schemes[name] = scheme
            layouts[name] = layer.layout if isinstance(layer, Stored) else COMPRESSED_TENSORS
    return adopting(Manifest(schemes=schemes, kv_cache=kv_cache, ignore=ignore, other_layouts=layouts))


def adopting(manifest: Manifest) -> AutoRoundConfig:
    config = AutoRoundConfig({})
    config._adopt(manifest)
    config.packed_modules_mapping = PACKED  # vLLM sets it from the model's class
    return config


def create(
    kind: Kind,
    shards: Mapping[Shard, Stored],
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    config: AutoRoundConfig | None = None,
) -> torch.nn.Module:
    """The layer of the current rank; by default its config is past the reading of a file."""
    config = config or config_of({kind.names[shard]: layer for shard, layer in shards.items()})
    layer = kind.create(bias=bias, params_dtype=dtype, quant_config=config, prefix=kind.parent + kind.name)
    assert isinstance(layer.quant_method, AutoRoundLinearMethod | AutoRoundEmbeddingMethod)
    spoil(layer)
    return layer


def spoil(layer: torch.nn.Module) -> None:
    """What the loaders do not write must not pass for zeros."""
    for parameter in layer.parameters():
        parameter.data.fill_(float("nan") if parameter.is_floating_point() else 0x55)


def load(layer: torch.nn.Module, tensors: Mapping[str, Tensor], shard: Shard) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def loaded(
    kind: Kind,
    shards: Mapping[Shard, Stored],
    dtype: torch.dtype = torch.float32,
    biases: Mapping[Shard, Tensor] | None = None,
    config: AutoRoundConfig | None = None,
) -> torch.nn.Module:
    """The layer of the current rank with its share of every shard, ready for use."""
    layer = create(kind, shards, dtype, biases is not None, config)
    for shard, kept in shards.items():
        load(layer, kept.tensors() | ({"bias": biases[shard]} if biases else {}), shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def rounding_bound(x: Tensor, weight: Tensor, terms: int) -> Tensor:
    """The most that float32 may miss x @ weight.T by, in whatever order it adds ``terms`` products.

    gamma_n |x| |W|^T with gamma_n = n u / (1 - n u) and u = 2^-24 (Higham, Accuracy and Stability, section 3.1).
    """
    unit = 2.0**-24
    return terms * unit / (1 - terms * unit) * (x.double().abs() @ weight.double().abs().T)


def assembled(kind: Kind, outputs: Sequence[Tensor]) -> dict[Shard, list[Tensor]]:
    """The output of each shard over all ranks, from those of the ranks; several where each rank has all of it."""
    if kind.splits_input:
        return {None: [torch.stack(list(outputs)).sum(0)]}
    # A rank holds its part of every shard, one after the other.
    sizes = [rows if shard in kind.copied else rows // len(outputs) for shard, (_, rows) in kind.shards.items()]
    if len(sizes) == 1:
        sizes = [outputs[0].shape[-1]]  # with the padding of a vocabulary
    parts = zip(*(output.split(sizes, dim=-1) for output in outputs), strict=True)
    return {
        shard: list(own) if shard in kind.copied else [torch.cat(own, dim=-1)]
        for shard, own in zip(kind.shards, parts, strict=True)
    }


def truth(x: Tensor, shards: Mapping[Shard, Stored]) -> tuple[Tensor, Tensor]:
    """(float64 output of all shards for x [..., K], the most that float32 may miss it by)."""
    acting = [(layer.acts_on(x), layer.dequantize()) for layer in shards.values()]
    exact = torch.cat([values.double() @ weight.double().T for values, weight in acting], dim=-1)
    return exact, torch.cat([rounding_bound(values, weight, COLUMNS) for values, weight in acting], dim=-1)


def dense(shards: Mapping[Shard, Stored]) -> Tensor:
    """The float32 weight of the whole layer."""
    return torch.cat([layer.dequantize() for layer in shards.values()])


def probe(layer: torch.nn.Module) -> Tensor:
    """The weight that the layer multiplies with, exactly: row i of x = I picks column i, and adds zeros to it.

    Of layers that leave the activations alone.
    """
    return layer(torch.eye(layer.input_size_per_partition))[0].T
