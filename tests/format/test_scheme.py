"""Schemes: names, errors, tensors, and the library's presets of the same name."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from vllm_autoround.format import activations
from vllm_autoround.format.errors import SchemeError
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4

# What a value means; observers are the library's business.
MEANING = (
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "block_structure",
    "dynamic",
    "scale_dtype",
    "zp_dtype",
)


@pytest.mark.parametrize(
    ("name", "group_size", "weights"),
    [
        ("W4A16", None, Integer(bits=4, group_size=128)),
        ("w4a16", 32, Integer(bits=4, group_size=32)),
        ("W4A16", -1, Integer(bits=4, group_size=None)),
        ("W2A16G64", None, Integer(bits=2, group_size=64)),
        ("W2A16_G64", None, Integer(bits=2, group_size=64)),
        ("W8A16G-1", None, Integer(bits=8, group_size=None)),
        ("W3A16_ASYM", None, Integer(bits=3, group_size=128, symmetric=False)),
        ("W3A16_ASYM_G32", None, Integer(bits=3, group_size=32, symmetric=False)),
        ("W3A16G32_ASYM", None, Integer(bits=3, group_size=32, symmetric=False)),
        ("w5a16g16_asym", 16, Integer(bits=5, group_size=16, symmetric=False)),
        ("W6A16G256", None, Integer(bits=6, group_size=256)),
        ("w7a16_asym", -1, Integer(bits=7, group_size=None, symmetric=False)),
    ],
)
def test_integer_names(name: str, group_size: int | None, weights: Integer) -> None:
    assert QuantScheme.parse(name, group_size) == QuantScheme(weights)


@pytest.mark.parametrize(
    ("name", "weights", "activation_type"),
    [
        ("FP8", Float8(strategy="tensor"), activations.FP8_TENSOR),
        ("fp8_static", Float8(strategy="channel"), activations.FP8_TENSOR),
        ("FP8_DYNAMIC", Float8(strategy="channel"), activations.FP8_TOKEN),
        ("FP8_BLOCK", Float8(strategy="block"), activations.FP8_GROUP),
        ("nvfp4", NvFp4(), activations.NVFP4),
        ("NVFP4A16", NvFp4(), None),
        ("MXFP4", Mx(bits=4), activations.MXFP4),
        ("MXFP4A16", Mx(bits=4), None),
        ("mxfp8", Mx(bits=8), activations.MXFP8),
        ("MXFP8A16", Mx(bits=8), None),
        ("W4A8_FP8", Integer(bits=4, group_size=128), activations.FP8_TOKEN),
        ("W4AFP8", Integer(bits=4, group_size=128), activations.FP8_TOKEN),
    ],
)
def test_other_names(name: str, weights: Any, activation_type: Any) -> None:
    assert QuantScheme.parse(name) == QuantScheme(weights, activation_type)
    assert name.upper() in NAMED_SCHEMES


def test_the_table_above_is_whole() -> None:
    assert len(NAMED_SCHEMES) == 12


@pytest.mark.parametrize(
    ("name", "group_size", "message"),
    [
        ("W4A8", None, "unknown scheme 'W4A8'; known are W2A16 to W8A16, .* FP8_STATIC"),
        ("W4A16_SYM", None, "unknown scheme"),
        ("W4A16G64_G64x", None, "unknown scheme"),
        ("", None, "unknown scheme ''"),
        ("W1A16", None, "weight bits must be 2 to 8, got 1"),
        ("W9A16", None, "weight bits must be 2 to 8, got 9"),
        ("W4A16G100", None, "group size must be one of 16, 32, 64, 128, 256 or -1 for per channel, got 100"),
        ("W4A16", 0, "group size must be one of"),
        ("W4A16G64", 128, "'W4A16G64' contradicts the group size 128; leave one of them out"),
        ("W4A16G64_ASYM_G32", None, "contradicts the group size 32"),
        ("FP8_STATIC", 128, "FP8_STATIC has no group size to choose, got 128; leave it out"),
        ("NVFP4", 32, "NVFP4 has no group size to choose, got 32"),
    ],
)
def test_bad_names_are_refused(name: str, group_size: int | None, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        QuantScheme.parse(name, group_size)


@pytest.mark.parametrize(("name", "group_size"), [("NVFP4", 16), ("MXFP4", 32), ("W4A8_FP8", 128), ("W4A16G64", 64)])
def test_a_group_size_said_twice_is_fine(name: str, group_size: int) -> None:
    assert QuantScheme.parse(name, group_size) == QuantScheme.parse(name)


def meaning(args: QuantizationArgs | None) -> dict[str, Any] | None:
    return None if args is None else {key: getattr(args, key) for key in MEANING}


@pytest.mark.parametrize(
    "name", [*sorted(NAMED_SCHEMES.keys() & PRESET_SCHEMES.keys()), "W4A16", "W4A16_ASYM", "W8A16"]
)
def test_presets_of_compressed_tensors_mean_the_same(name: str) -> None:
    scheme, preset = QuantScheme.parse(name), PRESET_SCHEMES[name]
    assert meaning(QuantizationArgs(**scheme.weights.args())) == meaning(preset["weights"])
    ours = None if scheme.activations is None else QuantizationArgs(**scheme.activations.args())
    assert meaning(ours) == meaning(preset.get("input_activations"))


def test_no_preset_of_a_supported_kind_is_left_out() -> None:
    """What the library has and we have not: 8-bit integer activations."""
    ours = NAMED_SCHEMES.keys() | {"W4A16", "W4A16_ASYM", "W8A16"}
    assert PRESET_SCHEMES.keys() - ours == {"UNQUANTIZED", "W8A8", "INT8", "W4A8"}


@pytest.mark.parametrize(
    ("name", "rows", "columns", "message"),
    [
        (
            "W4A16",
            8,
            704,
            "mlp: in_features 704 is not a multiple of the group size 128; use a group size of 16, 32, 64,",
        ),
        ("W4A16", 8, 100, "mlp: in_features 100 .* quantize it per channel, or ignore the layer"),
        ("NVFP4", 8, 24, "mlp: in_features 24 is not a multiple of 16, the group of nvfp4; ignore the layer"),
        ("MXFP4", 8, 48, "mlp: in_features 48 is not a multiple of 32, the group of mxfp4"),
        ("MXFP8A16", 8, 40, "mlp: in_features 40 is not a multiple of 32, the group of mxfp8"),
    ],
)
def test_layers_that_do_not_fit_are_refused(name: str, rows: int, columns: int, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        QuantScheme.parse(name).check_layer("mlp", rows, columns)


@pytest.mark.parametrize("name", ["W4A16G-1", "FP8_STATIC", "FP8_DYNAMIC", "FP8"])
def test_layers_of_any_width_fit_types_without_groups(name: str) -> None:
    QuantScheme.parse(name).check_layer("mlp", 7, 100)


@pytest.mark.parametrize("name", NAMED_SCHEMES)
def test_specs_of_a_scheme_are_those_of_its_weights_and_the_activations_scalar(name: str) -> None:
    scheme = QuantScheme.parse(name)
    specs = scheme.specs(256, 512, torch.bfloat16)
    extra = specs.keys() - scheme.weights.specs(256, 512, torch.bfloat16).keys()
    expected = {"FP8": "input_scale", "FP8_STATIC": "input_scale", "NVFP4": "input_global_scale"}
    assert extra == ({expected[name]} if name in expected else set())
    for suffix in extra:
        assert specs[suffix].shape == (1,)
        assert specs[suffix].dtype == torch.float32
        assert specs[suffix].scalar


def test_schemes_are_values() -> None:
    assert QuantScheme.parse("W4A16") == QuantScheme.parse("w4a16g128")
    assert len({QuantScheme.parse(name) for name in NAMED_SCHEMES}) == len(NAMED_SCHEMES) - 1  # W4AFP8 is W4A8_FP8
    assert str(QuantScheme.parse("W3A16_ASYM")) == "int3 asymmetric g128, 16-bit activations"
    assert str(QuantScheme.parse("FP8_BLOCK")) == "fp8 per block, fp8 dynamic per 128 activations"
