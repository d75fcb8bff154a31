"""Layers of different schemes, layouts and scales that vLLM fuses into one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import NvFp4, QuantizedWeight, quantize

from .conftest import TensorParallel
from .layers import (
    COLUMNS,
    MERGED,
    QKV,
    QKV_ONE_KV_HEAD,
    Kind,
    Shard,
    Stored,
    all_of,
    assembled,
    config_of,
    dense,
    identify,
    integer,
    load,
    loaded,
    probe,
    qkv,
    stored,
    truth,
)

NVFP4, FP8, FP8_STATIC, MXFP4 = (NAMED_SCHEMES[name] for name in ("NVFP4", "FP8", "FP8_STATIC", "MXFP4"))
W4, W8, W3, W4_ASYM = integer(4), integer(8, None), integer(3), integer(4, symmetric=False)

MIXES: list[tuple[Kind, list[QuantScheme | None], int]] = [  # and how many calls they take
    (MERGED, [W3, W4], 2),
    (MERGED, [W4, W4_ASYM], 2),
    (MERGED, [None, W4], 2),
    (MERGED, [FP8, MXFP4], 2),
    (MERGED, [NAMED_SCHEMES["MXFP4A16"], MXFP4], 2),  # the same weights, other activations
    (QKV, [W4, W4, W8], 2),
    (QKV, [W4, W8, W4], 2),  # the shards of a call are not neighbours
    (QKV, [W4, None, None], 2),
    (QKV, [None, NVFP4, None], 2),
    (QKV, [W3, FP8_STATIC, NVFP4], 3),
    (QKV_ONE_KV_HEAD, [W4, W8, W4], 2),
    (QKV_ONE_KV_HEAD, [W4_ASYM, None, FP8], 3),
]


def mixed(kind: Kind, schemes: list[QuantScheme | None], dtype: torch.dtype = torch.float32) -> dict[Shard, Stored]:
    return {
        shard: stored(scheme, rows, dtype)
        for (shard, (_, rows)), scheme in zip(kind.shards.items(), schemes, strict=True)
    }


def name_of(mix: object) -> str:
    return ", ".join(map(str, mix)) if isinstance(mix, list) else identify(mix)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("kind", "schemes", "calls"), MIXES, ids=name_of)
def test_mixed_schemes(kind: Kind, schemes: list[QuantScheme | None], calls: int, with_bias: bool) -> None:
    shards = mixed(kind, schemes)
    biases = {shard: torch.randn(rows) for shard, (_, rows) in kind.shards.items()} if with_bias else None
    layer = loaded(kind, shards, biases=biases)
    x = torch.randn(2, 3, COLUMNS)
    exact, bound = truth(x, shards)
    if biases:
        bias = torch.cat(list(biases.values())).double()
        exact, bound = exact + bias, bound * 2 + (COLUMNS + 1) * 2.0**-23 * bias.abs()
    assert ((layer(x)[0].double() - exact).abs() <= bound).all()
    assert len(layer.parts) == calls


@pytest.mark.parametrize(("kind", "schemes", "calls"), MIXES, ids=name_of)
def test_mixed_schemes_on_two_ranks(
    kind: Kind, schemes: list[QuantScheme | None], calls: int, tensor_parallel: TensorParallel
) -> None:
    shards = mixed(kind, schemes)
    x = torch.randn(5, COLUMNS)
    outputs = []
    for rank in range(2):
        with tensor_parallel(rank, 2):
            outputs.append(loaded(kind, shards)(x)[0].double())
    for shard, wholes in assembled(kind, outputs).items():
        exact, bound = truth(x, {shard: shards[shard]})
        for whole in wholes:
            assert ((whole - exact).abs() <= bound).all()


def test_more_ranks_than_key_value_heads(tensor_parallel: TensorParallel) -> None:
    """Four ranks, two key-value heads: neighbours hold the same one."""
    kind = qkv(heads=4, kv_heads=2)
    shards = mixed(kind, [W4, W8, W3])
    weights = {shard: layer.dequantize() for shard, layer in shards.items()}
    for rank in range(4):
        with tensor_parallel(rank, 4):
            q, k, v = probe(loaded(kind, shards)).split(32)
        assert torch.equal(q, weights["q"].split(32)[rank])
        assert torch.equal(k, weights["k"].split(32)[rank // 2])
        assert torch.equal(v, weights["v"].split(32)[rank // 2])


def test_half_precision_shards_that_are_not_quantized() -> None:
    shards = mixed(MERGED, [W4, None], torch.bfloat16)
    layer = loaded(MERGED, shards, torch.bfloat16)
    x = torch.eye(COLUMNS).bfloat16()
    assert torch.equal(layer(x)[0].T, dense(shards).bfloat16())


def nvfp4_with(global_scale: float, rows: int, input_scale: float = 100.0) -> Stored:
    weight = quantize(torch.randn(rows, COLUMNS), NvFp4(), torch.tensor([global_scale]))
    return Stored(NVFP4, weight, torch.tensor([input_scale]))


def test_different_global_scales_stay_exact() -> None:
    """Foreign checkpoints have them; vLLM's maximum would scale the weights of the other shards."""
    shards: dict[Shard, Stored] = {0: nvfp4_with(300.0, 128), 1: nvfp4_with(500.0, 192)}
    layer = loaded(MERGED, shards)
    x = torch.randn(5, COLUMNS)
    exact, bound = truth(x, shards)
    assert ((layer(x)[0].double() - exact).abs() <= bound).all()
    assert len(layer.parts) == 2


def test_different_input_scales_stay_exact() -> None:
    shards: dict[Shard, Stored] = {0: nvfp4_with(300.0, 128, 90.0), 1: nvfp4_with(300.0, 192, 170.0)}
    layer = loaded(MERGED, shards)
    x = torch.randn(5, COLUMNS)
    exact, bound = truth(x, shards)
    assert ((layer(x)[0].double() - exact).abs() <= bound).all()
    assert len(layer.parts) == 2


def test_equal_global_scales_share_a_call() -> None:
    shards: dict[Shard, Stored] = {0: nvfp4_with(300.0, 128), 1: nvfp4_with(300.0, 192)}
    assert len(loaded(MERGED, shards).parts) == 1


def test_different_scales_per_tensor_become_scales_per_row_of_one_call() -> None:
    """vLLM rounds the weights again, to the largest of them."""
    shards = all_of(QKV, FP8)
    for shard, factor in (("q", 1.0), ("k", 3.0), ("v", 0.7)):
        weight = shards[shard].weight
        assert isinstance(weight, QuantizedWeight)
        shards[shard] = replace(shards[shard], weight=replace(weight, scale=weight.scale * factor))
    layer = loaded(QKV, shards)
    x = torch.randn(5, COLUMNS)
    exact, bound = truth(x, shards)
    assert ((layer(x)[0].double() - exact).abs() <= bound).all()
    (part,) = layer.parts
    assert part.kernel.weight.type.strategy == "channel"


def test_blocks_that_would_cover_rows_of_two_shards() -> None:
    scheme = NAMED_SCHEMES["FP8_BLOCK"]
    for sizes, calls in (([128, 192], 1), ([192, 128], 2)):
        config = config_of({"mlp.gate_proj": scheme, "mlp.up_proj": scheme})
        layer = MergedColumnParallelLinear(
            COLUMNS, sizes, bias=False, params_dtype=torch.float32, quant_config=config, prefix="mlp.gate_up_proj"
        )
        shards: dict[Shard, Stored] = {index: stored(scheme, rows) for index, rows in enumerate(sizes)}
        for shard, kept in shards.items():
            load(layer, kept.tensors(), shard)
        layer.quant_method.process_weights_after_loading(layer)
        x = torch.randn(5, COLUMNS)
        exact, bound = truth(x, shards)
        assert ((layer(x)[0].double() - exact).abs() <= bound).all()
        assert len(layer.parts) == calls


# --- layouts --------------------------------------------------------------------------------------------------------


def test_different_layouts_of_one_scheme_share_a_call() -> None:
    shards: dict[Shard, Stored] = {0: stored(W4, 128, layout="gptq"), 1: stored(W4, 192, layout="awq")}
    layer = loaded(MERGED, shards)
    assert torch.equal(probe(layer), dense(shards))
    assert len(layer.parts) == 1


def test_contents_that_a_layout_refuses_name_the_layer() -> None:
    """A zero point of 16 as some writers of GPTQ leave it."""
    layer = stored(W4_ASYM, 128, layout="gptq")
    tensors = layer.tensors()
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    other = stored(W4_ASYM, 192, layout="gptq")
    config = config_of({"mlp.gate_proj": layer, "mlp.up_proj": other})
    vllm_layer = MERGED.create(bias=False, params_dtype=torch.float32, quant_config=config, prefix="mlp.gate_up_proj")
    load(vllm_layer, tensors, 0)
    load(vllm_layer, other.tensors(), 1)
    with pytest.raises(ValueError, match=r"^mlp\.gate_up_proj: "):
        vllm_layer.quant_method.process_weights_after_loading(vllm_layer)


def test_a_tensor_that_the_scheme_of_the_shard_does_not_have() -> None:
    shards = mixed(MERGED, [W4, W4_ASYM])
    config = config_of({"mlp.gate_proj": shards[0], "mlp.up_proj": shards[1]})
    layer = MERGED.create(bias=False, params_dtype=torch.float32, quant_config=config, prefix="mlp.gate_up_proj")
    zeros = shards[1].tensors()["weight_zero_point"]
    with pytest.raises(ValueError, match=r"^mlp\.gate_up_proj: shard 0 has no weight_zero_point by its scheme"):
        layer.weight_zero_point.weight_loader(layer.weight_zero_point, zeros, 0)


def test_layers_of_different_schemes_cannot_be_told_apart_among_more_shards() -> None:
    config = config_of({"mlp.gate_proj": W4, "mlp.up_proj": W8})
    with pytest.raises(
        ValueError, match=r"^mlp\.gate_up_proj: 2 layers of the checkpoint, quantized differently, make 3"
    ):
        MergedColumnParallelLinear(COLUMNS, [32, 32, 32], bias=False, quant_config=config, prefix="mlp.gate_up_proj")
