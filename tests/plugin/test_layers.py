"""Packed weights in vLLM's own parallel layers, loaded shard by shard as vLLM loads them, against dense weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_autoround.format.codec import QuantizedWeight
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.plugin.config import AutoRoundConfig
from vllm_autoround.plugin.linear import AutoRoundLinearMethod

from .conftest import TensorParallel

COLUMNS = 256  # K of every layer; a multiple of every group size, also when two ranks split it
HEAD_SIZE, HEADS, KV_HEADS = 32, 4, 2
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
GROUP_SIZES = (32, 128, None)
SCHEMES = [
    QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for group_size in GROUP_SIZES
]

Shard = int | str | None  # what vLLM calls loaded_shard_id; None: the layer is not fused


def some_schemes(offset: int) -> list[QuantScheme]:
    """Every width in both symmetries, each with one group size; another one for another ``offset``."""
    return [scheme for index, scheme in enumerate(SCHEMES) if index % 3 == (index // 3 + offset) % 3]


@dataclass(frozen=True)
class Kind:
    """A class of layer as vLLM's models create and load it."""

    label: str
    name: str  # of the layer, inside its parent
    create: Callable[..., torch.nn.Module]
    shards: dict[Shard, tuple[str, int]]  # shard id -> name on disk, output rows over all ranks
    splits_input: bool = False


def _replicated(**common: Any) -> torch.nn.Module:
    return ReplicatedLinear(COLUMNS, 96, **common)


def _column(**common: Any) -> torch.nn.Module:
    return ColumnParallelLinear(COLUMNS, 192, **common)


def _row(**common: Any) -> torch.nn.Module:
    # Each rank returns its part of the sum; the bias may not be added to a part.
    reduce_results = common["bias"]
    return RowParallelLinear(COLUMNS, 96, reduce_results=reduce_results, **common)


def _merged(**common: Any) -> torch.nn.Module:
    return MergedColumnParallelLinear(COLUMNS, [128, 192], **common)


def _qkv(**common: Any) -> torch.nn.Module:
    return QKVParallelLinear(COLUMNS, HEAD_SIZE, HEADS, KV_HEADS, **common)


def _one_kv_head(**common: Any) -> torch.nn.Module:
    return QKVParallelLinear(COLUMNS, HEAD_SIZE, HEADS, 1, **common)


def _qkv_shards(kv_heads: int) -> dict[Shard, tuple[str, int]]:
    kv_rows = kv_heads * HEAD_SIZE
    return {"q": ("q_proj", HEADS * HEAD_SIZE), "k": ("k_proj", kv_rows), "v": ("v_proj", kv_rows)}


REPLICATED = Kind("replicated", "gate", _replicated, {None: ("gate", 96)})
COLUMN = Kind("column", "fc1", _column, {None: ("fc1", 192)})
ROW = Kind("row", "down_proj", _row, {None: ("down_proj", 96)}, splits_input=True)
MERGED = Kind("merged", "gate_up_proj", _merged, {0: ("gate_proj", 128), 1: ("up_proj", 192)})
QKV = Kind("qkv", "qkv_proj", _qkv, _qkv_shards(KV_HEADS))
# Two ranks hold the same key and value head.
QKV_ONE_KV_HEAD = Kind("qkv-one-kv-head", "qkv_proj", _one_kv_head, _qkv_shards(1))
KINDS = [REPLICATED, COLUMN, ROW, MERGED, QKV, QKV_ONE_KV_HEAD]


def _id(value: object) -> str | None:
    if isinstance(value, Kind):
        return value.label
    return str(value).lower().replace(" ", "-") if isinstance(value, QuantScheme) else None


def random_weight(scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    """Random codes, zero points and scales; every second scale is negative."""
    groups = scheme.groups(columns)
    scale = (torch.rand(rows, groups) + 0.5) / 2**scheme.bits
    scale[:, ::2] *= -1
    scale[1::2] *= -1
    zero_point = torch.randint(0, scheme.max_code + 1, (rows, groups), dtype=torch.uint8)
    if scheme.symmetric:
        zero_point.fill_(scheme.zero_code)
    codes = torch.randint(0, scheme.max_code + 1, (rows, columns), dtype=torch.uint8)
    return QuantizedWeight(scheme, codes, scale.to(dtype), zero_point)


def random_weights(kind: Kind, scheme: QuantScheme, dtype: torch.dtype = torch.float32) -> dict[Shard, QuantizedWeight]:
    return {shard: random_weight(scheme, rows, COLUMNS, dtype) for shard, (_, rows) in kind.shards.items()}


def config_of(schemes: dict[str, QuantScheme]) -> AutoRoundConfig:
    config = AutoRoundConfig(Manifest(schemes=schemes))
    config.packed_modules_mapping = PACKED  # vLLM sets it from the model's class
    return config


def create(kind: Kind, scheme: QuantScheme, dtype: torch.dtype = torch.float32, bias: bool = False) -> torch.nn.Module:
    config = config_of({f"model.layers.0.{name}": scheme for name, _ in kind.shards.values()})
    layer = kind.create(bias=bias, params_dtype=dtype, quant_config=config, prefix=f"model.layers.0.{kind.name}")
    assert isinstance(layer.quant_method, AutoRoundLinearMethod)
    for parameter in layer.parameters():  # what the loaders do not write must not pass for zeros
        parameter.data.fill_(float("nan") if parameter.is_floating_point() else 0x55555555)
    return layer


def load(layer: torch.nn.Module, tensors: dict[str, Tensor], shard: Shard) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def loaded(
    kind: Kind,
    weights: dict[Shard, QuantizedWeight],
    dtype: torch.dtype = torch.float32,
    biases: dict[Shard, Tensor] | None = None,
) -> torch.nn.Module:
    """The layer of the current rank with its share of ``weights``, ready for use."""
    scheme = next(iter(weights.values())).scheme
    layer = create(kind, scheme, dtype, bias=biases is not None)
    for shard, weight in weights.items():
        load(layer, weight.tensors() | ({"bias": biases[shard]} if biases else {}), shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def dense(weights: dict[Shard, QuantizedWeight]) -> Tensor:
    """The float32 weight of the whole layer."""
    return torch.cat([weight.dequantize() for weight in weights.values()])


def probe(layer: torch.nn.Module) -> Tensor:
    """The weight that the layer multiplies with, exactly: row i of x = I picks column i, and adds zeros to it."""
    return layer(torch.eye(layer.input_size_per_partition))[0].T


def rounding_bound(x: Tensor, weight: Tensor, terms: int) -> Tensor:
    """The most that float32 may miss x @ weight.T by, in whatever order it adds ``terms`` products.

    gamma_n |x| |W|^T with gamma_n = n u / (1 - n u) and u = 2^-24 (Higham, Accuracy and Stability, section 3.1).
    """
    unit = 2.0**-24
    return terms * unit / (1 - terms * unit) * (x.double().abs() @ weight.double().abs().T)


@pytest.mark.parametrize("kind", KINDS, ids=_id)
@pytest.mark.parametrize("scheme", SCHEMES, ids=_id)
def test_identity_probe_returns_the_dequantized_weight(kind: Kind, scheme: QuantScheme) -> None:
    weights = random_weights(kind, scheme)
    assert torch.equal(probe(loaded(kind, weights)), dense(weights))


@pytest.mark.parametrize(
    ("kind", "scheme"), [(kind, scheme) for index, kind in enumerate(KINDS) for scheme in some_schemes(index)], ids=_id
)
def test_two_ranks_hold_the_weight_of_one(kind: Kind, scheme: QuantScheme, tensor_parallel: TensorParallel) -> None:
    weights = random_weights(kind, scheme)
    parts = []
    for rank in range(2):
        with tensor_parallel(rank, 2):
            parts.append(probe(loaded(kind, weights)))

    if kind is REPLICATED:
        assert torch.equal(parts[0], dense(weights))
        assert torch.equal(parts[1], dense(weights))
    elif kind.splits_input:
        assert torch.equal(torch.cat(parts, dim=1), dense(weights))
    else:
        # A rank holds a share of every shard, one after the other; one that cannot be split it holds in full.
        for shard, weight in weights.items():
            replicated = kind is QKV_ONE_KV_HEAD and shard in ("k", "v")
            rows = weight.codes.shape[0] if replicated else weight.codes.shape[0] // 2
            held = [part[:rows] for part in parts]
            parts = [part[rows:] for part in parts]
            for whole in held if replicated else [torch.cat(held)]:
                assert torch.equal(whole, weight.dequantize())
        assert all(len(part) == 0 for part in parts)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kind", KINDS, ids=_id)
@pytest.mark.parametrize("scheme", some_schemes(0), ids=_id)
def test_forward_equals_a_dense_layer(kind: Kind, scheme: QuantScheme, with_bias: bool) -> None:
    weights = random_weights(kind, scheme)
    biases = {shard: torch.randn(rows) for shard, (_, rows) in kind.shards.items()} if with_bias else None
    x = torch.randn(5, COLUMNS)
    output, _ = loaded(kind, weights, biases=biases)(x)

    weight = dense(weights)
    truth = x.double() @ weight.double().T
    bound = rounding_bound(x, weight, COLUMNS + 1)
    if biases:
        bias = torch.cat(list(biases.values())).double()
        truth += bias
        bound += (COLUMNS + 1) * 2.0**-23 * bias.abs()  # one product more, of the bias and 1; gamma_n < 2 n u
    assert output.dtype is torch.float32
    assert ((output.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("scheme", some_schemes(1), ids=_id)
def test_two_ranks_sum_to_the_output_of_one(scheme: QuantScheme, tensor_parallel: TensorParallel) -> None:
    weights = random_weights(ROW, scheme)
    x = torch.randn(5, COLUMNS)
    total = torch.zeros(5, 96)
    for rank, part in enumerate(x.chunk(2, dim=1)):
        with tensor_parallel(rank, 2):
            total += loaded(ROW, weights)(part)[0]

    truth = x.double() @ dense(weights).double().T
    assert ((total.double() - truth).abs() <= rounding_bound(x, dense(weights), COLUMNS)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [COLUMN, ROW, QKV], ids=_id)
@pytest.mark.parametrize("scheme", some_schemes(2), ids=_id)
def test_half_precision_is_rounded_once(kind: Kind, scheme: QuantScheme, dtype: torch.dtype) -> None:
    """Nothing but the result is rounded: neither the weight to 16 bits nor, as vLLM's CPU kernel does, x to int8."""
    weights = random_weights(kind, scheme, dtype)
    x = torch.randn(5, COLUMNS).to(dtype)
    output, _ = loaded(kind, weights, dtype)(x)

    weight = dense(weights)
    truth = x.double() @ weight.double().T
    in_float32 = rounding_bound(x, weight, COLUMNS)
    # Rounding a number to the nearest of p significant bits moves it by 2^-p of itself at most, or, where float16 is
    # subnormal, by half of its smallest number.
    once = torch.finfo(dtype).eps / 2 * (truth.abs() + in_float32) + torch.finfo(dtype).smallest_normal / 2
    assert output.dtype is dtype
    assert ((output.double() - truth).abs() <= in_float32 + once).all()


@pytest.mark.parametrize("kind", [COLUMN, ROW, MERGED, QKV], ids=_id)
def test_vllm_picks_the_loader_of_packed_parameters(kind: Kind) -> None:
    """It does so by the name of the method's class."""
    layer = create(kind, QuantScheme(bits=4, group_size=32, symmetric=False))
    for parameter in layer.parameters():
        assert parameter.weight_loader == layer.weight_loader_v2


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_fused_on_disk(bits: int) -> None:
    """As Phi-3 has them: qkv_proj and gate_up_proj are single layers of the checkpoint and come without a shard id."""
    scheme = QuantScheme(bits=bits, group_size=32, symmetric=False)
    for kind in (QKV, MERGED):
        rows = sum(rows for _, rows in kind.shards.values())
        weight = random_weight(scheme, rows, COLUMNS, torch.float32)
        layer = kind.create(
            bias=False,
            params_dtype=torch.float32,
            quant_config=config_of({f"model.layers.0.{kind.name}": scheme}),
            prefix=f"model.layers.0.{kind.name}",
        )
        load(layer, weight.tensors(), None)
        layer.quant_method.process_weights_after_loading(layer)
        assert torch.equal(probe(layer), weight.dequantize())


def create_head(vocabulary: int, scheme: QuantScheme) -> torch.nn.Module:
    layer = ParallelLMHead(
        vocabulary,
        COLUMNS,
        params_dtype=torch.float32,
        quant_config=config_of({"lm_head": scheme}),
        prefix="lm_head",
    )
    for parameter in layer.parameters():
        parameter.data.fill_(float("nan") if parameter.is_floating_point() else 0x55555555)
    return layer


def loaded_head(weight: QuantizedWeight) -> torch.nn.Module:
    layer = create_head(weight.codes.shape[0], weight.scheme)
    load(layer, weight.tensors(), None)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def head_rows(layer: torch.nn.Module) -> Tensor:
    """The weight that the head multiplies with: [rows of this rank with padding, K]."""
    return layer.quant_method.apply(layer, torch.eye(COLUMNS), bias=layer.bias).T


# Not multiples of 64, to which vLLM pads. Zero points are packed along the rows: those of 500 fill whole words at
# 8 bits, those of 480 at every width.
HEADS_OF = [
    (scheme, 500 if scheme.symmetric or scheme.bits == 8 else 480) for scheme in SCHEMES if scheme.group_size != 128
]


@pytest.mark.parametrize(("scheme", "vocabulary"), HEADS_OF, ids=_id)
def test_lm_head_with_a_padded_vocabulary(
    scheme: QuantScheme, vocabulary: int, tensor_parallel: TensorParallel
) -> None:
    weight = random_weight(scheme, vocabulary, COLUMNS, torch.float32)
    expected = torch.zeros(512, COLUMNS)  # a row of padding is a row of zeros
    expected[:vocabulary] = weight.dequantize()

    assert torch.equal(head_rows(loaded_head(weight)), expected)
    for rank, rows in enumerate(expected.chunk(2)):
        with tensor_parallel(rank, 2):
            assert torch.equal(head_rows(loaded_head(weight)), rows)


def test_logits_of_a_head_without_bias() -> None:
    head = loaded_head(random_weight(QuantScheme(bits=6, group_size=128), 500, COLUMNS, torch.float32))
    hidden = torch.randn(3, COLUMNS)
    logits = LogitsProcessor(500)(head, hidden)

    weight = head_rows(head)[:500]
    truth = hidden.double() @ weight.double().T
    assert logits.shape == truth.shape
    assert ((logits.double() - truth).abs() <= rounding_bound(hidden, weight, COLUMNS)).all()


def test_lm_head_whose_zero_points_do_not_fill_words() -> None:
    weight = random_weight(QuantScheme(bits=4, group_size=32, symmetric=False), 500, COLUMNS, torch.float32)
    with pytest.raises(ValueError, match=r"^lm_head: "):
        loaded_head(weight)


def test_quantized_lm_head_cannot_be_tied_to_the_embedding() -> None:
    head = create_head(500, QuantScheme(bits=4, group_size=32))
    with pytest.raises(ValueError, match=r"^lm_head: "):
        head.tie_weights(VocabParallelEmbedding(500, COLUMNS))


@pytest.mark.parametrize(
    ("scheme", "kind", "columns", "rows", "message"),
    [
        pytest.param(
            QuantScheme(bits=4, group_size=128),
            RowParallelLinear,
            384,
            64,
            r"lm\.proj: tensor parallelism leaves 192 of 384 input features to a rank, which cuts through a group of "
            r"128; use fewer ranks or calibrate with a smaller group size",
            id="group",
        ),
        pytest.param(
            QuantScheme(bits=3, group_size=16),
            RowParallelLinear,
            96,
            64,
            r"lm\.proj: tensor parallelism leaves 48 input features of 3 bits to a rank, which is not a whole number "
            r"of 32-bit words; use fewer ranks",
            id="word",
        ),
        pytest.param(
            QuantScheme(bits=3, group_size=None),
            RowParallelLinear,
            80,
            64,
            r"lm\.proj: tensor parallelism leaves 40 input features of 3 bits to a rank, which is not a whole number "
            r"of 32-bit words; use fewer ranks",
            id="word-per-channel",
        ),
        pytest.param(
            QuantScheme(bits=4, group_size=32, symmetric=False),
            ColumnParallelLinear,
            64,
            24,
            r"lm\.proj: 12 output rows with zero points of 4 bits are not a whole number of 32-bit words; use fewer "
            r"ranks or a symmetric scheme",
            id="zero-points",
        ),
    ],
)
def test_partition_that_cuts_is_refused(
    scheme: QuantScheme,
    kind: type[torch.nn.Module],
    columns: int,
    rows: int,
    message: str,
    tensor_parallel: TensorParallel,
) -> None:
    def make() -> torch.nn.Module:
        return kind(columns, rows, bias=False, quant_config=config_of({"lm.proj": scheme}), prefix="lm.proj")

    make()  # one rank holds all of it
    with tensor_parallel(0, 2), pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_zero_points_of_a_fused_layer_fill_whole_words_in_each_shard() -> None:
    """Words are cut at the border of the shards too, with one rank as well; the sum of the shards says nothing."""
    scheme = QuantScheme(bits=4, group_size=32, symmetric=False)
    with pytest.raises(ValueError, match=r"^mlp\.gate_up_proj: 12 output rows with zero points of 4 bits are not"):
        MergedColumnParallelLinear(
            64,
            [8, 12, 12],
            bias=False,
            quant_config=config_of({"mlp.gate_proj": scheme, "mlp.up_proj": scheme}),
            prefix="mlp.gate_up_proj",
        )


def test_words_need_not_be_whole_where_nothing_is_cut(tensor_parallel: TensorParallel) -> None:
    """40 codes of 3 bits leave the last of 4 words half empty; the ranks of a column-parallel layer split rows only."""
    scheme = QuantScheme(bits=3, group_size=None)
    weight = random_weight(scheme, 64, 40, torch.float32)
    for rank, rows in enumerate(weight.dequantize().chunk(2)):
        with tensor_parallel(rank, 2):
            layer = ColumnParallelLinear(
                40, 64, bias=False, params_dtype=torch.float32, quant_config=config_of({"fc1": scheme}), prefix="fc1"
            )
            load(layer, weight.tensors(), None)
            assert torch.equal(layer(torch.eye(40))[0].T, rows)


@pytest.mark.parametrize("symmetric", [True, False])
def test_wrong_shapes_do_not_load(symmetric: bool) -> None:
    scheme = QuantScheme(bits=4, group_size=32, symmetric=symmetric)
    layer = create(COLUMN, scheme)
    for name, tensor in random_weight(scheme, 192, COLUMNS // 2, torch.float32).tensors().items():
        if name == "weight_shape":
            continue  # two numbers, whatever they say
        parameter = getattr(layer, name)
        with pytest.raises((AssertionError, RuntimeError)):
            parameter.weight_loader(parameter, tensor)
