"""The auto-round dialect: rules by name and by pattern, what is written, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from tests.format.foreign import (
    BLOCK,
    DOWN,
    HEAD,
    UP,
    K,
    Q,
    auto_round_config,
    awq_config,
    gptq_config,
    scheme,
    shapes_of,
)
from vllm_autoround.format import activations
from vllm_autoround.format.dialects import auto_round, read_manifest
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Float8, NvFp4


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2+g_idx"),
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:auto_awq", "awq"),
    ],
)
def test_packing_formats_of_integers(packing: str, layout: str) -> None:
    schemes = {Q: scheme(3, 64, False), UP: scheme(3, 64, False)}
    config = auto_round_config(packing_format=packing, bits=3, group_size=64, sym=False)
    manifest = read_manifest(config, shapes_of(schemes, layout, DOWN, HEAD))
    assert manifest == Manifest(schemes=schemes, ignore=(HEAD, DOWN), kv_scales=("k_scale", "v_scale"), layout=layout)


def test_extra_config_by_name_then_by_the_first_pattern_found() -> None:
    extra = {
        r".*up_proj.*": {"bits": 2, "group_size": 64},
        r"layers\.1\.": {"bits": 8, "sym": False},
        K: {"bits": 8, "act_bits": None, "group_size": None},
        DOWN: {"bits": 16},
        HEAD: {
            "bits": 4,
            "group_size": 32,
            "sym": True,
            "data_type": "int",
            "super_bits": None,
            "rotation_config": None,
        },
    }
    gate = f"{BLOCK}.1.mlp.gate_proj"
    schemes = {Q: scheme(), K: scheme(8), UP: scheme(2, 64), gate: scheme(8, 128, False), HEAD: scheme(4, 32)}
    manifest = read_manifest(auto_round_config(extra_config=extra), shapes_of(schemes, "gptq", DOWN))
    assert manifest.schemes == schemes
    assert manifest.ignore == (DOWN,)


def test_a_pattern_for_layers_of_the_blocks_is_not_about_others() -> None:
    schemes = {Q: scheme(8), HEAD: scheme(8)}
    shapes = shapes_of(schemes, "gptq")
    with pytest.raises(ManifestError, match=r"lm_head is quantized, but it is neither in block_name_to_quantize"):
        read_manifest(auto_round_config(extra_config={"q_proj|lm_head": {"bits": 8}}), shapes)
    extra = {"q_proj": {"bits": 8}, ".*head": {"bits": 8}}
    assert read_manifest(auto_round_config(extra_config=extra), shapes).schemes == schemes


def test_blocks_are_a_list_or_a_string_or_missing() -> None:
    shapes = shapes_of({Q: scheme(), HEAD: scheme()}, "gptq")
    for blocks in (f"{BLOCK}, {HEAD}", [BLOCK, HEAD], [[f"{BLOCK}.0", f"{BLOCK}.1"], [HEAD]], None):
        assert read_manifest(auto_round_config(block_name_to_quantize=blocks), shapes).schemes.keys() == {Q, HEAD}


FLOATS = {
    "FP8_STATIC": ("fp8_static", "auto_round:fp8_static"),
    "FP8_BLOCK": ("fp8_block", "auto_round:fp8"),
    "NVFP4": ("compressed-tensors", "auto_round:llm_compressor"),
    "NVFP4A16": ("compressed-tensors", "auto_round:llm_compressor"),
    "MXFP4": ("compressed-tensors", "auto_round:llm_compressor"),
    "MXFP8": ("compressed-tensors", "auto_round:llm_compressor"),
}


@pytest.mark.parametrize("name", FLOATS)
def test_float_schemes_as_auto_round_writes_them(name: str) -> None:
    layout, packing = FLOATS[name]
    manifest = Manifest(schemes={Q: NAMED_SCHEMES[name]}, ignore=(DOWN,), layout=layout)
    config = auto_round.write_config(manifest)
    assert config["packing_format"] == packing
    assert config["extra_config"] == {DOWN: {"bits": 16, "act_bits": 16}}
    assert read_manifest(config, shapes_of({Q: NAMED_SCHEMES[name]}, layout, DOWN)).schemes == manifest.schemes


def test_settings_of_the_real_tool() -> None:
    """Configs of auto-round 0.16.1's presets, typed off its schemes.py."""
    nvfp4 = {"act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "act_dynamic": True, "act_group_size": 16}
    static = {"act_bits": 8, "act_data_type": "fp", "act_dynamic": False, "act_group_size": 0, "act_sym": True}
    block = {"act_bits": 8, "act_data_type": "fp", "act_dynamic": True, "act_group_size": 128}
    cases: list[tuple[dict[str, Any], str, QuantScheme]] = [
        ({"data_type": "nv_fp", "group_size": 16, **nvfp4}, "compressed-tensors", NAMED_SCHEMES["NVFP4"]),
        ({"data_type": "nv_fp", "group_size": 16}, "compressed-tensors", QuantScheme(NvFp4())),
        ({"data_type": "fp", "bits": 8, "group_size": -1, **static}, "fp8_static", NAMED_SCHEMES["FP8_STATIC"]),
        ({"data_type": "fp", "bits": 8, "group_size": [128, 128], **block}, "fp8_block", NAMED_SCHEMES["FP8_BLOCK"]),
        ({"data_type": "fp", "bits": 8, "group_size": 0}, "fp8_static", QuantScheme(Float8(strategy="tensor"))),
    ]
    for changes, layout, expected in cases:
        config = auto_round_config(**changes)
        assert read_manifest(config, shapes_of({Q: expected}, layout)).schemes == {Q: expected}


def test_null_activations_are_not_quantized() -> None:
    quantized = {"act_bits": 4, "act_data_type": "mx_fp", "act_dynamic": True, "act_group_size": 32}
    config = auto_round_config(
        data_type="mx_fp", group_size=32, **quantized, extra_config={K: dict.fromkeys(quantized)}
    )
    schemes = {Q: NAMED_SCHEMES["MXFP4"], K: NAMED_SCHEMES["MXFP4A16"]}
    shapes = shapes_of(schemes, "compressed-tensors")
    assert read_manifest(config, shapes).schemes == schemes


def test_a_mixed_model_is_written_and_found_again() -> None:
    schemes = {Q: scheme(4), K: scheme(4), UP: scheme(2, 32), HEAD: scheme(8, None)}
    manifest = Manifest(schemes=schemes, ignore=(DOWN,), layout="gptq_v2", kv_cache="fp8_per_head")
    config = auto_round.write_config(manifest)
    assert (config["bits"], config["group_size"], config["block_name_to_quantize"]) == (4, 128, BLOCK)
    assert config["extra_config"].keys() == {UP, HEAD, DOWN}
    assert (config["static_attention_dtype"], config["static_attention_granularity"]) == ("fp8", "head")
    without_queries = auto_round.write_config(replace(manifest, kv_scales=("k_scale", "v_scale"), kv_cache="fp8"))
    assert without_queries["static_kv_dtype"] == "fp8"
    assert "static_attention_dtype" not in without_queries


def test_scales_that_no_key_announces() -> None:
    """auto-round's older releases wrote none; a shape tells which they are."""
    shapes = shapes_of({Q: scheme()}, "gptq")
    one = {f"{BLOCK}.0.self_attn.{letter}_scale": (1,) for letter in "kv"}
    assert read_manifest(auto_round_config(), {**shapes, **one}).kv_cache == "fp8"
    heads = dict.fromkeys(one, (4,))
    assert read_manifest(auto_round_config(), {**shapes, **heads}).kv_cache == "fp8_per_head"
    with pytest.raises(ManifestError, match="one scale per tensor"):
        read_manifest(auto_round_config(static_kv_dtype="fp8"), {**shapes, **heads})
    with pytest.raises(ManifestError, match="promises KV-cache scales, but there are none"):
        read_manifest(auto_round_config(static_kv_dtype="fp8"), shapes)
    for config in (gptq_config(), awq_config(zero_point=False)):
        layout = "gptq" if config["quant_method"] == "gptq" else "awq"
        with pytest.raises(ManifestError, match="would find no home"):
            read_manifest(config, {**shapes_of({Q: scheme()}, layout), **one})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing_format": "auto_round:exllamav2"}, "packing_format 'auto_round:exllamav2' is not understood"),
        ({"packing_format": None}, "packing_format None is not understood"),
        ({"bits": None}, "lacks 'bits'"),
        ({"bits": 9}, "weight bits must be 2 to 8"),
        ({"group_size": 100}, "group size must be one of"),
        ({"data_type": "mx_int", "group_size": 32}, "data_type 'mx_int' of 4 bits with group_size 32"),
        ({"data_type": "nv_fp", "group_size": 16, "sym": False}, "asymmetric nv_fp weights"),
        ({"act_bits": 8, "act_data_type": "int", "act_dynamic": True}, "quantized activations of this kind"),
        ({"super_bits": 6}, "unknown key 'super_bits'"),
        ({"rotation_configs": [{"hadamard": 1}]}, "unknown key 'rotation_configs'"),
        ({"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
        ({"static_kv_dtype": "nvfp4"}, "static_kv_dtype 'nvfp4' is not supported"),
        ({"extra_config": {Q: {"bits": 16}}}, "q_proj has 16 bits in the config, but its tensors are quantized"),
        ({"extra_config": {Q: {"rotation_config": {"a": 1}}}}, "extra_config.*unknown key 'rotation_config'"),
        ({"extra_config": {"*q": {"bits": 8}}}, "is not a regular expression"),
        ({"extra_config": {Q: {"bits": 8}}}, "q_proj .*384 input features do not fit 6 groups"),
        ({"weight_block_size": [64, 64]}, "weight_block_size"),
    ],
)
def test_what_auto_round_says_and_we_do_not_understand(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(auto_round_config(**changes), shapes_of({Q: scheme()}, "gptq"))


def test_what_auto_round_cannot_say() -> None:
    with pytest.raises(ManifestError, match="has one packing_format, which cannot be of gptq, gptq_v2"):
        auto_round.write_config(
            Manifest(schemes={Q: scheme(), K: scheme()}, layout="gptq", other_layouts={K: "gptq_v2"})
        )
    with pytest.raises(ManifestError, match="cannot be of padded"):
        auto_round.write_config(Manifest(schemes={Q: scheme()}, layout="padded"))
    with pytest.raises(ManifestError, match="cannot say int4 symmetric g128, fp8 dynamic per token"):
        auto_round.write_config(Manifest(schemes={Q: NAMED_SCHEMES["W4A8_FP8"]}, layout="gptq"))
    with pytest.raises(ManifestError, match="cannot be of"):
        auto_round.write_config(Manifest(schemes={Q: scheme(), K: NAMED_SCHEMES["NVFP4"]}, other_layouts={Q: "gptq"}))


@pytest.mark.parametrize("config", [auto_round_config(), gptq_config(), awq_config()])
def test_these_dialects_need_the_tensors_names(config: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="does not name the layers that are quantized"):
        read_manifest(config)


def test_activations_have_one_name_each() -> None:
    assert {*auto_round._ACTIVATIONS} == {*activations.ACTIVATION_TYPES}
