"""Layers beyond the matrix: bias, half precision, layers fused on disk, words that ranks share; what is refused."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme

from .conftest import TensorParallel
from .layers import (
    COLUMN,
    COLUMNS,
    FLOATS,
    INTEGERS,
    KINDS,
    MERGED,
    QKV,
    Kind,
    all_of,
    config_of,
    create,
    dense,
    identify,
    integer,
    load,
    loaded,
    probe,
    random_weight,
    some_schemes,
    stored,
    truth,
)


@pytest.mark.parametrize("kind", KINDS, ids=identify)
@pytest.mark.parametrize("scheme", [integer(3, symmetric=False), NAMED_SCHEMES["FP8"]], ids=identify)
def test_bias(kind: Kind, scheme: QuantScheme) -> None:
    shards = all_of(kind, scheme)
    biases = {shard: torch.randn(rows) for shard, (_, rows) in kind.shards.items()}
    x = torch.randn(2, 3, COLUMNS)
    exact, bound = truth(x, shards)
    bias = torch.cat(list(biases.values())).double()
    bound = bound * (COLUMNS + 1) / COLUMNS + (COLUMNS + 1) * 2.0**-23 * bias.abs()  # one term more
    assert ((loaded(kind, shards, biases=biases)(x)[0].double() - exact - bias).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", some_schemes(2), ids=identify)
def test_half_precision_is_rounded_once(scheme: QuantScheme, dtype: torch.dtype) -> None:
    """Nothing but the result is rounded: neither the weight to 16 bits nor, as vLLM's CPU kernel does, x to int8."""
    shards = all_of(MERGED, scheme, dtype)
    x = torch.randn(5, COLUMNS).to(dtype)
    output, _ = loaded(MERGED, shards, dtype)(x)

    exact, in_float32 = truth(x, shards)
    # Rounding a number to the nearest of p significant bits moves it by 2^-p of itself at most, or, where float16 is
    # subnormal, by half of its smallest number.
    once = torch.finfo(dtype).eps / 2 * (exact.abs() + in_float32) + torch.finfo(dtype).smallest_normal / 2
    assert output.dtype is dtype
    assert ((output.double() - exact).abs() <= in_float32 + once).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_layers_fused_on_disk(bits: int, tensor_parallel: TensorParallel) -> None:
    """As Phi-3 has them: qkv_proj and gate_up_proj are single layers of the checkpoint and come without a shard id."""
    scheme = integer(bits, symmetric=False)
    for kind in (QKV, MERGED):
        sizes = [rows for _, rows in kind.shards.values()]
        whole = stored(scheme, sum(sizes))
        prefix = f"model.layers.0.{kind.name}"
        common = {"bias": False, "params_dtype": torch.float32, "prefix": prefix}
        parts = []
        for ranks in (1, 2):
            for rank in range(ranks):
                with tensor_parallel(rank, ranks):
                    layer = kind.create(quant_config=config_of({prefix: whole}), **common)
                    load(layer, whole.tensors(), None)
                    layer.quant_method.process_weights_after_loading(layer)
                    parts.append(probe(layer))
        assert torch.equal(parts[0], whole.dequantize())
        for shard in whole.dequantize().split(sizes):
            rows = len(shard) // 2
            assert torch.equal(torch.cat([parts[1][:rows], parts[2][:rows]]), shard)
            parts[1:] = [part[rows:] for part in parts[1:]]


def test_some_shards_fused_on_disk() -> None:
    """As Qwen3.5 has them: the checkpoint's first tensor holds two of three shards of one layer."""
    scheme = NAMED_SCHEMES["FP8"]
    config = config_of({"mlp.gate_proj": scheme, "mlp.up_proj": scheme})
    layer = MergedColumnParallelLinear(
        COLUMNS,
        [32, 64, 96],
        bias=False,
        params_dtype=torch.float32,
        quant_config=config,
        prefix="mlp.gate_up_proj",
    )
    above, below = stored(scheme, 96), stored(scheme, 96)
    for shard, layer_of_file in (((0, 1), above), (2, below)):
        for name, tensor in layer_of_file.tensors().items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, COLUMNS)
    exact, bound = truth(x, {0: above, 1: below})
    assert ((layer(x)[0].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("scheme", "kind", "columns", "rows", "message"),
    [
        pytest.param(
            integer(4, 128),
            RowParallelLinear,
            384,
            64,
            r"tensor parallelism leaves 192 of 384 input features to a rank, which cuts through a group of 128",
            id="group",
        ),
        pytest.param(
            NAMED_SCHEMES["FP8_BLOCK"],
            RowParallelLinear,
            384,
            64,
            r"tensor parallelism leaves 192 of 384 input features to a rank, which cuts through a group of 128",
            id="columns-of-a-block",
        ),
        pytest.param(
            NAMED_SCHEMES["FP8_BLOCK"],
            ColumnParallelLinear,
            256,
            192,
            r"tensor parallelism leaves 96 of 192 output rows to a rank, which cuts through a group of 128",
            id="rows-of-a-block",
        ),
    ],
)
def test_partition_that_cuts_through_a_group_is_refused(
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
    way_out = "use fewer ranks or calibrate with a smaller group size"
    with tensor_parallel(0, 2), pytest.raises(ValueError, match=rf"^lm\.proj: {message}; {way_out}$"):
        make()


@pytest.mark.parametrize(
    ("scheme", "kind", "columns", "rows"),
    [
        pytest.param(integer(3, 16), RowParallelLinear, 96, 64, id="word"),
        pytest.param(integer(3, None), RowParallelLinear, 80, 64, id="word-per-channel"),
        pytest.param(integer(4, 32, False), ColumnParallelLinear, 64, 24, id="zero-points"),
        pytest.param(integer(5, None, False), ColumnParallelLinear, 40, 36, id="zero-points-per-channel"),
    ],
)
def test_words_that_two_ranks_share(
    scheme: QuantScheme, kind: type[torch.nn.Module], columns: int, rows: int, tensor_parallel: TensorParallel
) -> None:
    """Both load the word at the border, and drop the codes that are not theirs."""
    weight = random_weight(scheme, rows, columns)
    tensors = weight.type.to_tensors(weight)
    splits_input = kind is RowParallelLinear
    common = {"bias": False, "params_dtype": torch.float32} | ({"reduce_results": False} if splits_input else {})
    for rank, expected in enumerate(weight.dequantize().chunk(2, dim=int(splits_input))):
        with tensor_parallel(rank, 2):
            layer = kind(columns, rows, quant_config=config_of({"fc1": scheme}), prefix="fc1", **common)
            load(layer, tensors, None)
            layer.quant_method.process_weights_after_loading(layer)
            assert torch.equal(probe(layer), expected)


def test_zero_points_of_shards_that_fill_no_whole_words() -> None:
    scheme = integer(4, symmetric=False)
    layer = MergedColumnParallelLinear(
        COLUMNS,
        [8, 12],
        bias=False,
        params_dtype=torch.float32,
        quant_config=config_of({"mlp.gate_proj": scheme, "mlp.up_proj": scheme}),
        prefix="mlp.gate_up_proj",
    )
    shards = {0: stored(scheme, 8), 1: stored(scheme, 12)}
    for shard, kept in shards.items():
        load(layer, kept.tensors(), shard)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(probe(layer), dense(shards))


@pytest.mark.parametrize("scheme", [integer(4), integer(4, symmetric=False), *FLOATS], ids=identify)
def test_wrong_shapes_do_not_load(scheme: QuantScheme) -> None:
    layer = create(COLUMN, {None: stored(scheme, 192)})
    weight = random_weight(scheme, 160, COLUMNS // 2)
    for name, tensor in weight.type.to_tensors(weight).items():
        if tensor.numel() <= 2:
            continue  # one number for the layer, or its shape
        parameter = getattr(layer, name)
        with pytest.raises(ValueError, match=rf"^model\.layers\.0\.fc1: {name} has shape \[.*\], expected \["):
            parameter.weight_loader(parameter, tensor)


@pytest.mark.parametrize(
    ("scheme", "suffix", "dtype"),
    [
        (NAMED_SCHEMES["FP8"], "weight", torch.bfloat16),
        (NAMED_SCHEMES["NVFP4"], "weight_scale", torch.float32),
        (NAMED_SCHEMES["MXFP4"], "weight_scale", torch.bfloat16),
        (integer(4), "weight_packed", torch.int64),
    ],
    ids=str,
)
def test_types_that_would_change_the_meaning_do_not_load(scheme: QuantScheme, suffix: str, dtype: torch.dtype) -> None:
    kept = stored(scheme, 192)
    parameter = getattr(create(COLUMN, {None: kept}), suffix)
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.fc1: {suffix} has type {dtype}, expected "):
        parameter.weight_loader(parameter, kept.tensors()[suffix].to(dtype))


def test_powers_of_two_may_come_in_their_own_type() -> None:
    kept = stored(NAMED_SCHEMES["MXFP4A16"], 192)
    layer = create(COLUMN, {None: kept})
    tensors = kept.tensors()
    load(layer, tensors | {"weight_scale": tensors["weight_scale"].view(torch.float8_e8m0fnu)}, None)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(probe(layer), kept.dequantize())


def test_scales_in_float32_are_not_rounded_to_the_models_type() -> None:
    """Foreign checkpoints have such; the exact value matters where it multiplies 448."""
    kept = stored(NAMED_SCHEMES["FP8_DYNAMIC"], 192, torch.float32)
    layer = loaded(COLUMN, {None: kept}, torch.bfloat16)
    assert torch.equal(layer.parts[0].kernel.weight.scale, kept.weight.scale)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_input_scales_that_are_none_are_named(value: float) -> None:
    kept = stored(NAMED_SCHEMES["FP8_STATIC"], 192)
    layer = create(COLUMN, {None: kept})
    load(layer, kept.tensors() | {"input_scale": torch.tensor([value])}, None)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.fc1: input_scale is .*, not a scale; calibrate"):
        layer.quant_method.process_weights_after_loading(layer)


def test_processing_twice_is_harmless() -> None:
    kept = all_of(COLUMN, INTEGERS[0])
    layer = loaded(COLUMN, kept)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(probe(layer), dense(kept))
    assert not list(layer.named_parameters())
