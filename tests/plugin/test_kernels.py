"""What vLLM's GPU kernels are fed with, shown by stand-ins that read it as those kernels do; and which kernel is asked.

The stand-ins compute in float32 from the names, types and layouts that vLLM's own compressed-tensors schemes hand over.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_autoround.format import packing
from vllm_autoround.format.activations import FP8_TENSOR, FP8_TOKEN
from vllm_autoround.format.grids import e2m1_values
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4
from vllm_autoround.kernels import wna16
from vllm_autoround.plugin import compat, float8, fp4, integer, kernels
from vllm_autoround.plugin.kernels import Part, Problem, choose_kernel

from .layers import (
    COLUMN,
    COLUMNS,
    MERGED,
    QKV,
    REPLICATED,
    ROW,
    Kind,
    all_of,
    dense,
    identify,
    loaded,
    some_schemes,
    stored,
)
from .layers import integer as integer_scheme

WEIGHTS = [scheme for scheme in some_schemes(0) if isinstance(scheme.weights, Integer) and scheme.activations is None]


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin takes the platform for one with vLLM's GPU kernels."""
    monkeypatch.setattr(kernels, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))


def relative_error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


def check(kind: Kind, scheme: QuantScheme) -> torch.nn.Module:
    """The stand-in must multiply with the dequantized weight, as exactly as a bfloat16 result shows it."""
    shards = all_of(kind, scheme, torch.bfloat16)
    biases = {shard: torch.randn(rows).bfloat16() for shard, (_, rows) in kind.shards.items()}
    layer = loaded(kind, shards, torch.bfloat16, biases)
    x = torch.randn(5, COLUMNS).bfloat16()
    exact = x.double() @ dense(shards).double().T + torch.cat(list(biases.values())).double()
    assert relative_error(layer(x)[0], exact) < 2.0**-7  # of bfloat16, twice: the product and the sum with the bias
    return layer


# --- integers -------------------------------------------------------------------------------------------------------


class MixedPrecision:
    """Stands for an ``MPLinearKernel``."""

    def __init__(self, config: Any, **names: str) -> None:
        self.config, self.names = config, names

    def process_weights_after_loading(self, part: Part) -> None:
        packed, scale = (getattr(part, self.names[name]) for name in ("w_q_param_name", "w_s_param_name"))
        assert isinstance(packed, BasevLLMParameter)
        assert (packed.input_dim, packed.output_dim, packed.packed_dim) == (1, 0, 1)
        assert isinstance(scale, BasevLLMParameter)
        assert scale.dtype is self.config.act_type
        bits, (columns, rows) = self.config.weight_type.size_bits, self.config.partition_weight_shape
        assert packed.packed_factor == 32 / bits or bits in (3, 5, 6, 7)
        values = packing.unpack(packed.data, bits, columns).float()
        groups = 1 if self.config.group_size == -1 else columns // self.config.group_size
        zero: Any = self.config.weight_type.bias
        if self.config.zero_points:
            words = getattr(part, self.names["w_zp_param_name"])
            assert (words.output_dim, words.packed_dim) == (0, 0)
            zero = packing.unpack(words.data.T.contiguous(), bits, rows).T[..., None].float()
        grouped = values.view(rows, groups, -1) - zero
        part.real_weight = (grouped * scale.data.float()[..., None]).flatten(1)

    def apply_weights(self, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        return (x.float() @ part.real_weight.T).to(x.dtype)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that a kernel was chosen for."""
    configs: list[Any] = []

    def choose(config: Any) -> type[MixedPrecision]:
        configs.append(config)
        return MixedPrecision

    monkeypatch.setattr(integer, "choose_mp_linear_kernel", choose)
    return configs


@pytest.mark.parametrize("kind", [REPLICATED, COLUMN, ROW, MERGED, QKV], ids=identify)
@pytest.mark.parametrize("scheme", WEIGHTS, ids=identify)
def test_integers(kind: Kind, scheme: QuantScheme, chosen: list[Any]) -> None:
    layer = check(kind, scheme)
    rows = sum(rows for _, rows in kind.shards.values())
    assert chosen[-1].partition_weight_shape == (COLUMNS, rows)
    assert layer.parts[0].kernel.name == "MixedPrecision"


def humming(monkeypatch: pytest.MonkeyPatch, takes_zero_points: bool) -> None:
    stand_in = type("HummingLinearKernel", (MixedPrecision,), {})
    monkeypatch.setattr(integer, "choose_mp_linear_kernel", lambda config: stand_in)
    monkeypatch.setattr(compat, "humming_takes_zero_points", lambda: takes_zero_points)


def problem(scheme: QuantScheme, **changed: Any) -> Problem:
    return Problem(
        **{"prefix": "fc1", "scheme": scheme, "rows": 256, "columns": 256, "dtype": torch.bfloat16, **changed}
    )


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_asymmetric_integers_go_to_our_own_kernel_where_humming_deviates(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    humming(monkeypatch, takes_zero_points=False)
    assert isinstance(choose_kernel(problem(integer_scheme(bits, symmetric=False))), integer.TritonKernel)
    assert choose_kernel(problem(integer_scheme(bits))).name == "HummingLinearKernel"
    humming(monkeypatch, takes_zero_points=True)
    assert choose_kernel(problem(integer_scheme(bits, symmetric=False))).name == "HummingLinearKernel"


@pytest.mark.parametrize("kind", [COLUMN, QKV], ids=identify)
def test_our_own_kernel_gets_its_layout_and_the_bias(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    humming(monkeypatch, takes_zero_points=False)
    prepared: dict[int, Any] = {}

    def prepare(weight: Any) -> tuple[Tensor, Tensor]:
        assert weight.scale.dtype is torch.bfloat16
        words = torch.randint(1 << 30, (3,), dtype=torch.int32)
        prepared[int(words[0])] = weight
        return words, torch.zeros(1, dtype=torch.int32)

    def linear(x: Tensor, words: Tensor, affine: Tensor, bits: int, bias: Tensor | None) -> Tensor:
        assert bits == 3
        weight = prepared[int(words[0])].dequantize()
        return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)

    monkeypatch.setattr(wna16, "prepare", prepare)
    monkeypatch.setattr(wna16, "wna16_linear", linear)
    check(kind, integer_scheme(3, symmetric=False))


W4A8 = NAMED_SCHEMES["W4A8_FP8"]


@pytest.mark.parametrize(
    ("offered", "humming_quantizes", "expected"),
    [
        ("CutlassW4A8LinearKernel", False, "CutlassW4A8LinearKernel, which rounds the scales of groups to fp8"),
        ("HummingLinearKernel", True, "HummingLinearKernel"),
        ("HummingLinearKernel", False, "HummingLinearKernel, weight-only: the activations stay in 16 bits"),
        ("MarlinLinearKernel", False, "MarlinLinearKernel, weight-only: the activations stay in 16 bits"),
        (None, False, "MarlinLinearKernel, weight-only: the activations stay in 16 bits"),
    ],
)
def test_fp8_activations_are_said_to_be_left_alone_where_they_are(
    offered: str | None, humming_quantizes: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``offered``: what vLLM selects for 8-bit activations, None: nothing."""
    configs = []

    def choose(config: Any) -> type:
        configs.append(config)
        if config.act_type is torch.float8_e4m3fn and offered is None:
            raise ValueError("no kernel")
        return type(offered or "MarlinLinearKernel", (MixedPrecision,), {})

    monkeypatch.setattr(integer, "choose_mp_linear_kernel", choose)
    monkeypatch.setattr(compat, "humming_quantizes_activations", lambda: humming_quantizes)
    assert choose_kernel(problem(W4A8)).name == expected
    first = configs[0]
    assert (first.act_type, first.out_type, str(first.weight_type)) == (torch.float8_e4m3fn, torch.bfloat16, "int4")


# --- FP8 ------------------------------------------------------------------------------------------------------------


class ScaledMatmul:
    """Stands for an FP8 kernel: weight [K, N], or [N, K] with a scale per block; leaves the activations alone."""

    def process_weights_after_loading(self, part: Part) -> None:
        weight = part.weight.data.float()
        assert part.weight.dtype is torch.float8_e4m3fn
        if part.weight_block_size is not None:
            scale = part.weight_scale_inv.data
            assert scale.dtype is torch.float32
            blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            part.real_weight = weight * blocks[: weight.shape[0], : weight.shape[1]]
            return
        assert (part.weight.input_dim, part.weight.output_dim) == (0, 1)
        assert part.weight_scale.dtype is torch.float32
        assert part.weight_scale.shape in ((), (weight.shape[1], 1))
        part.real_weight = weight.T * part.weight_scale.data

    def apply_weights(self, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        return (x.float() @ part.real_weight.T).to(x.dtype)


@pytest.fixture
def fp8_keys(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What FP8 kernels were asked for."""
    keys: list[dict[str, Any]] = []

    def init(**key: Any) -> ScaledMatmul:
        keys.append(key)
        return ScaledMatmul()

    monkeypatch.setattr(float8, "init_fp8_linear_kernel", init)
    monkeypatch.setattr(float8, "init_wfp8_a16_linear_kernel", init)
    return keys


FP8_SCHEMES = [
    *(NAMED_SCHEMES[name] for name in ("FP8", "FP8_STATIC", "FP8_DYNAMIC", "FP8_BLOCK")),
    QuantScheme(Float8(strategy="tensor"), FP8_TOKEN),
    *(QuantScheme(Float8(strategy=strategy)) for strategy in ("tensor", "channel", "block")),
]


@pytest.mark.parametrize("kind", [COLUMN, ROW, MERGED, QKV], ids=identify)
@pytest.mark.parametrize("scheme", FP8_SCHEMES, ids=identify)
def test_fp8(kind: Kind, scheme: QuantScheme, fp8_keys: list[dict[str, Any]]) -> None:
    layer = check(kind, scheme)
    for part in layer.parts:
        if scheme.activations == FP8_TENSOR:
            assert part.input_scale.shape == ()
            assert part.input_scale.dtype is torch.float32
        else:
            assert part.input_scale is None
    key = fp8_keys[-1]
    assert key["weight_shape"] == (layer.parts[-1].output_size_per_partition, COLUMNS)
    assert key["out_dtype"] is torch.bfloat16
    if scheme.activations is not None:
        assert key["activation_quant_key"].scale.static is (scheme.activations == FP8_TENSOR)


def test_shards_of_different_fp8_scales_ask_for_a_scale_per_row(fp8_keys: list[dict[str, Any]]) -> None:
    scheme = NAMED_SCHEMES["FP8"]
    layer = loaded(MERGED, {0: stored(scheme, 128), 1: stored(scheme, 192)}, torch.bfloat16)
    assert len(layer.parts) == 1
    assert fp8_keys[-1]["weight_quant_key"] is float8.kFp8StaticChannelSym
    assert layer.parts[0].weight_scale.shape == (320, 1)


# --- FP4 and MXFP8 --------------------------------------------------------------------------------------------------


class FourBit:
    """Stands for a kernel of NVFP4 or MXFP4: weight [N, K/2]; global scales as factors."""

    def process_weights_after_loading(self, part: Part) -> None:
        assert part.weight.dtype is torch.uint8
        values = e2m1_values(packing.unpack_nibbles(part.weight.data))
        if hasattr(part, "weight_global_scale"):
            assert part.weight_scale.dtype is torch.float8_e4m3fn
            scale = part.weight_scale.data.float() * part.weight_global_scale.data
        else:
            scale = part.weight_scale.data.view(torch.float8_e8m0fnu).float()
        part.real_weight = (values.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)

    def apply_weights(self, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        return (x.float() @ part.real_weight.T).to(x.dtype)


class EightBit(FourBit):
    """Stands for a kernel of MXFP8: weight [N, K]."""

    def process_weights_after_loading(self, part: Part) -> None:
        assert part.weight.dtype is torch.float8_e4m3fn
        scale = part.weight_scale.data.view(torch.float8_e8m0fnu).float()
        part.real_weight = (part.weight.data.float().unflatten(1, (-1, 32)) * scale[..., None]).flatten(1)


@pytest.fixture
def fp4_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """(selector, whether activations stay in 16 bits) of every kernel asked for."""
    calls: list[tuple[str, Any]] = []

    def stand_in(name: str, kernel: type) -> Callable[..., Any]:
        def init(*shape: int, use_a16: bool) -> Any:
            calls.append((name, use_a16))
            return kernel()

        return init

    monkeypatch.setattr(fp4, "init_nvfp4_linear_kernel", stand_in("nvfp4", FourBit))
    monkeypatch.setattr(compat, "init_mxfp4_linear_kernel", stand_in("mxfp4", FourBit))
    monkeypatch.setattr(compat, "init_mxfp8_linear_kernel", stand_in("mxfp8", EightBit))
    return calls


@pytest.mark.parametrize("kind", [COLUMN, ROW, MERGED, QKV], ids=identify)
@pytest.mark.parametrize("name", ["NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16"])
def test_fp4_and_mx(kind: Kind, name: str, fp4_calls: list[tuple[str, Any]]) -> None:
    check(kind, NAMED_SCHEMES[name])
    assert fp4_calls[-1] == (name.lower().removesuffix("a16"), name.endswith("A16"))


def test_nvfp4_scales_are_inverted_for_the_kernel(fp4_calls: list[tuple[str, Any]]) -> None:
    kept = stored(NAMED_SCHEMES["NVFP4"], 192)
    (part,) = loaded(COLUMN, {None: kept}, torch.bfloat16).parts
    assert kept.input_scale is not None
    divisor, weight_divisor = kept.input_scale.item(), kept.weight.global_scale.item()
    assert part.input_global_scale_inv.item() == divisor
    assert part.input_global_scale.item() == pytest.approx(1 / divisor)
    assert part.alpha.item() == pytest.approx(1 / divisor / weight_divisor)
    assert part.alpha.shape == ()


def test_marlin_is_said_to_leave_the_activations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    marlin = type("MarlinNvFp4LinearKernel", (FourBit,), {})
    monkeypatch.setattr(fp4, "init_nvfp4_linear_kernel", lambda use_a16: marlin())
    note = "MarlinNvFp4LinearKernel, weight-only: the activations stay in 16 bits"
    assert choose_kernel(problem(NAMED_SCHEMES["NVFP4"])).name == note
    assert choose_kernel(problem(NAMED_SCHEMES["NVFP4A16"])).name == "MarlinNvFp4LinearKernel"


# --- what no kernel takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(NvFp4(), FP8_TOKEN),
        QuantScheme(Mx(bits=8), FP8_TENSOR),
        QuantScheme(Integer(bits=4, group_size=128), FP8_TENSOR),
        QuantScheme(Float8(strategy="block"), FP8_TOKEN),
    ],
    ids=str,
)
def test_combinations_without_a_kernel_are_named(scheme: QuantScheme) -> None:
    with pytest.raises(ValueError, match=r"^fc1: no kernel on a GPU multiplies .*; calibrate the layer with another"):
        choose_kernel(problem(scheme))


def test_float32_has_no_kernel() -> None:
    with pytest.raises(ValueError, match=r"^fc1: no kernel on a GPU takes float32 activations; use --dtype bfloat16$"):
        choose_kernel(problem(integer_scheme(4), dtype=torch.float32))


def test_the_reasons_of_vllms_selector_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(config: Any) -> type:
        raise ValueError("Failed to find a kernel")

    monkeypatch.setattr(integer, "choose_mp_linear_kernel", choose)
    with pytest.raises(ValueError, match=r"^fc1: vLLM has no kernel for int4 .*: Failed to find a kernel$"):
        choose_kernel(problem(integer_scheme(4)))


def test_activations_per_block_need_whole_blocks() -> None:
    with pytest.raises(ValueError, match=r"^fc1: vLLM has no kernel for .*: 192 input features on a rank are not"):
        choose_kernel(problem(NAMED_SCHEMES["FP8_BLOCK"], columns=192))
