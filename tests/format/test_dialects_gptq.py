"""The dialects of GPTQ and AWQ: rules by pattern, what is written, and what is refused."""

from typing import Any

import pytest
import transformers

from tests.format.foreign import DOWN, HEAD, UP, K, Q, awq_config, gptq_config, scheme, shapes_of
from vllm_autoround.format.dialects import awq, gptq, read_manifest
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.scheme import NAMED_SCHEMES


def test_dynamic_rules_first_match_from_the_beginning() -> None:
    dynamic = {
        "-:.*down_proj": {},
        r"+:.*layers\.1\..*": {"bits": 2, "group_size": 64},
        r"+:.*up_proj.*": {"bits": 8},
        r"q_proj": {"bits": 8},  # found within, but not at the beginning
        f"+:{K}": {"sym": False},
    }
    schemes = {Q: scheme(), K: scheme(symmetric=False), UP: scheme(2, 64)}
    manifest = read_manifest(gptq_config(dynamic=dynamic), shapes_of(schemes, "gptq+g_idx", DOWN, HEAD))
    assert manifest.schemes == schemes
    assert (manifest.layout, manifest.ignore) == ("gptq+g_idx", (HEAD, DOWN))


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_the_second_version_stores_zero_points_as_they_are(key: str) -> None:
    shapes = shapes_of({Q: scheme()}, "gptq")
    assert read_manifest(gptq_config(), shapes).layout == "gptq"
    assert read_manifest(gptq_config(**{key: "gptq_v2"}), shapes).layout == "gptq_v2"


def test_desc_act_without_effect_is_read() -> None:
    for changes in ({"group_size": -1}, {"static_groups": True}):
        whole = changes.get("group_size") == -1
        schemes = {Q: scheme(4, None if whole else 128)}
        config = gptq_config(desc_act=True, **changes)
        assert read_manifest(config, shapes_of(schemes, "gptq+g_idx")).schemes == schemes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"desc_act": True}, "desc_act is true.*not supported.*quantize again with desc_act=False"),
        ({"dynamic": {"+:.*": {"desc_act": True}}}, "desc_act is true"),
        ({"dynamic": {"-:.*q_proj": {}}}, "leaves .*q_proj unquantized, but its tensors are quantized"),
        ({"dynamic": {"+:.*": {"adapter": "lora"}}}, "unknown key 'adapter'"),
        ({"dynamic": {"+:*": {"bits": 4}}}, "is not a regular expression"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not understood"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "disagree: 'gptq', 'gptq_v2'"),
        ({"is_marlin_format": True}, "unknown key 'is_marlin_format'"),
        ({"pack_dtype": "int8"}, "pack_dtype 'int8' is not supported"),
        ({"sym": None}, "lacks 'sym'"),
        ({"group_size": 1024}, "group size must be one of"),
    ],
)
def test_what_gptq_says_and_we_do_not_understand(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(gptq_config(**changes), shapes_of({Q: scheme()}, "gptq"))


@pytest.mark.parametrize("layout", ["gptq", "gptq+g_idx", "gptq_v2", "gptq_v2+g_idx"])
def test_gptq_is_written_and_found_again(layout: str) -> None:
    schemes = {Q: scheme(), K: scheme(8, None), UP: scheme(3, symmetric=False), HEAD: scheme()}
    config = gptq.write_config(Manifest(schemes=schemes, ignore=(DOWN,), layout=layout))
    assert (config["checkpoint_format"], config["lm_head"]) == (layout.removesuffix("+g_idx"), True)
    assert list(config["dynamic"].values()) == [
        {"bits": 8, "group_size": -1, "sym": True},
        {"bits": 3, "group_size": 128, "sym": False},
        {},
    ]
    assert read_manifest(config, shapes_of(schemes, layout, DOWN)).schemes == schemes


def test_what_gptq_cannot_say() -> None:
    for scheme_ in (scheme(5), NAMED_SCHEMES["NVFP4"], NAMED_SCHEMES["W4A8_FP8"]):
        with pytest.raises(ManifestError, match="cannot say"):
            gptq.write_config(Manifest(schemes={Q: scheme_}, layout="gptq"))
    with pytest.raises(ManifestError, match="has gptq or gptq_v2 tensors, not awq"):
        gptq.write_config(Manifest(schemes={Q: scheme()}, layout="awq"))
    with pytest.raises(ManifestError, match="KV-cache"):
        gptq.write_config(Manifest(schemes={Q: scheme()}, layout="gptq", kv_cache="fp8"))


def test_awq_under_both_names_of_its_keys() -> None:
    schemes = {Q: scheme(symmetric=False)}
    shapes = shapes_of(schemes, "awq", HEAD)
    config = awq_config(modules_to_not_convert=[HEAD, "gate"])
    for changed in (config, {**config, "bits": None, "w_bit": 4, "group_size": None, "q_group_size": 128}):
        found = read_manifest({key: value for key, value in changed.items() if value is not None}, shapes)
        assert (found.schemes, found.layout, found.ignore) == (schemes, "awq", (HEAD,))


def test_awq_is_written_and_found_again() -> None:
    manifest = Manifest(
        schemes={Q: scheme(symmetric=False), K: scheme(symmetric=False)}, ignore=(HEAD, DOWN), layout="awq"
    )
    config = awq.write_config(manifest)
    assert config["modules_to_not_convert"] == [HEAD, DOWN]
    assert read_manifest(config, shapes_of(dict(manifest.schemes), "awq", HEAD, DOWN)).schemes == manifest.schemes


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"schemes": {Q: scheme()}}, "cannot say int4 symmetric .*whose zero points are all 8"),
        ({"schemes": {Q: scheme(4, None, False)}}, "only 4 bits with zero points, in groups"),
        ({"schemes": {Q: scheme(8, 128, False)}}, "only 4 bits"),
        ({"schemes": {Q: NAMED_SCHEMES["MXFP4"]}}, "only 4 bits"),
        ({"schemes": {Q: scheme(symmetric=False), K: scheme(4, 32, False)}}, "has one scheme for every layer"),
        ({"schemes": {Q: scheme(symmetric=False)}, "layout": "gptq"}, "has awq tensors only"),
        ({"schemes": {Q: scheme(symmetric=False)}, "kv_cache": "fp8"}, "KV-cache"),
        ({"schemes": {UP: scheme(symmetric=False)}, "ignore": ("1.mlp.up",)}, "would skip .*up_proj too"),
    ],
)
def test_what_awq_cannot_say(manifest: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        awq.write_config(Manifest(**({"layout": "awq"} | manifest)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv"}, "version 'gemv' is not supported, only gemm"),
        ({"bits": 1}, "weight bits must be"),
        ({"scales": "fancy"}, "unknown key 'scales'"),
        ({"bits": 8}, r"q_proj.scales has shape \[6, 256\], expected \[6, 128\]"),
    ],
)
def test_what_awq_says_and_we_do_not_understand(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(awq_config(**changes), shapes_of({Q: scheme(symmetric=False)}, "awq"))


def test_configs_of_transformers() -> None:
    """Which writes every key of its classes, GPTQ's also for AWQ: there sym is a default that means nothing."""
    schemes, asymmetric = {Q: scheme()}, {Q: scheme(symmetric=False)}
    config = {**transformers.AwqConfig(bits=4, group_size=128).to_dict(), "quant_method": "awq"}
    assert config["sym"]
    assert read_manifest(config, shapes_of(asymmetric, "awq")).schemes == asymmetric
    config = {**transformers.GPTQConfig(bits=4).to_dict(), "quant_method": "gptq"}
    assert read_manifest(config, shapes_of(schemes, "gptq+g_idx")).schemes == schemes
