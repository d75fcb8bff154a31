"""Our own checkpoints' quantization_config, to and fro, what is refused, and the check of a manifest's promises."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from vllm_autoround.format.dialects import read_manifest
from vllm_autoround.format.dialects.compressed_tensors import write_config
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import Manifest, verify_tensors
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Integer

W4 = QuantScheme(Integer(bits=4, group_size=128))
MANIFEST = Manifest(
    schemes={
        "model.layers.0.self_attn.q_proj": W4,
        "model.layers.0.mlp.up_proj": QuantScheme(Integer(bits=3, group_size=None, symmetric=False)),
        "lm_head": W4,
    },
    ignore=("model.layers.0.mlp.down_proj",),
    kv_cache="fp8",
)
KV = [f"model.layers.0.self_attn.{letter}_scale" for letter in "qkv"]


def shapes_of(manifest: Manifest, rows: int = 256, columns: int = 768) -> dict[str, tuple[int, ...]]:
    return {
        f"{layer}.{suffix}": spec.shape
        for layer, scheme in manifest.schemes.items()
        for suffix, spec in manifest.layout_of(layer).specs(scheme, rows, columns, torch.bfloat16).items()
    }


def test_round_trip_through_the_library() -> None:
    config = write_config(MANIFEST)
    assert read_manifest(config) == MANIFEST
    parsed = QuantizationConfig.model_validate(config)
    assert {tuple(group.targets) for group in parsed.config_groups.values()} == {
        ("model.layers.0.self_attn.q_proj", "lm_head"),
        ("model.layers.0.mlp.up_proj",),
    }
    assert parsed.kv_cache_scheme is not None
    assert parsed.kv_cache_scheme.num_bits == 8


def test_every_scheme_survives_with_and_without_the_tensors() -> None:
    integers = [QuantScheme(Integer(bits=bits, group_size=32, symmetric=bits % 2 == 0)) for bits in range(2, 9)]
    schemes = {f"model.layers.{i}.mlp.up_proj": s for i, s in enumerate([*integers, *NAMED_SCHEMES.values()])}
    manifest = Manifest(schemes=schemes, kv_cache="fp8_per_head")
    config = write_config(manifest)
    assert config["format"] == "mixed-precision"
    assert read_manifest(config) == manifest
    scales = {name: (4, 1, 1) for name in KV}
    assert read_manifest(config, {**shapes_of(manifest), **scales}) == manifest


def test_our_words_are_known_to_be_dense_without_the_tensors() -> None:
    """By the version that we write; compressed-tensors changed these words in place."""
    config = write_config(MANIFEST)
    assert read_manifest(config).layout_name("model.layers.0.mlp.up_proj") == "compressed-tensors"
    del config["version"]
    with pytest.raises(
        ManifestError, match=r"mlp.up_proj: it cannot be told whether its 3-bit codes are packed densely"
    ):
        read_manifest(config)
    del config["config_groups"]["group_1"]  # 4 bits are the same either way
    read_manifest(config)


def test_keys_that_vllm_adds_are_known() -> None:
    config = {**write_config(MANIFEST), "total_num_heads": 32, "total_num_kv_heads": 8}
    assert read_manifest(config) == MANIFEST


def with_weights(**changes: Any) -> dict[str, Any]:
    config = write_config(MANIFEST)
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


def with_group(**changes: Any) -> dict[str, Any]:
    config = write_config(MANIFEST)
    config["config_groups"]["group_0"] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**write_config(MANIFEST), "sparsity_config": {"format": "24"}}, "unknown key 'sparsity_config'"),
        ({**write_config(MANIFEST), "transform_config": {"config_groups": {"u": 1}}}, "unknown key 'transform_config'"),
        ({**write_config(MANIFEST), "quant_method": "quark"}, "quant_method 'quark' is not understood"),
        ({**write_config(MANIFEST), "quantization_status": "frozen"}, "not a compressed checkpoint"),
        (with_weights(actorder="group"), "actorder"),
        (with_weights(type="float"), "group_size = 128 is not supported"),
        (with_weights(num_bits=9), "weight bits must be 2 to 8"),
        (with_weights(block_structur=[1, 2]), "compressed-tensors rejects"),
        (with_group(targets=["Linear"]), "target 'Linear' is a pattern or a class"),
        (with_group(targets=["re:.*v_proj"]), "is a pattern or a class"),
        (with_group(targets=["model.layers.0.mlp.up_proj"]), "named twice"),
        (with_group(targets=["model.layers.0.mlp.down_proj"]), "named twice"),
        (with_group(format="nvfp4-pack-quantized"), "format must be 'pack-quantized', got 'nvfp4-pack-quantized'"),
        (with_group(weights=None), "group_0 does not quantize weights"),
        (
            with_group(input_activations={"num_bits": 8, "strategy": "token", "dynamic": True}),
            "8-bit int input activations, dynamic per token, are not supported",
        ),
        (
            {**write_config(MANIFEST), "kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
            "kv_cache_scheme.type = 'int' is not supported",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(config)


def test_an_empty_extension_changes_nothing() -> None:
    config = {**write_config(MANIFEST), "sparsity_config": {}, "transform_config": None}
    assert read_manifest(config) == MANIFEST


def test_only_our_own_layout_is_written() -> None:
    with pytest.raises(ManifestError, match="lm_head has padded tensors"):
        write_config(replace(MANIFEST, other_layouts={"lm_head": "padded"}))


def test_tensors_are_compared_with_the_promise() -> None:
    good = MANIFEST.layer_tensors() | set(KV) | {"model.norm.weight"}
    verify_tensors(MANIFEST, good)
    cases = {
        "lm_head.weight_scale": (good - {"lm_head.weight_scale"}, "missing, the first is lm_head.weight_scale"),
        "zero point": (good - {"model.layers.0.mlp.up_proj.weight_zero_point"}, "missing, the first is .*zero_point"),
        "unclaimed": (good | {"model.layers.1.mlp.up_proj.weight_packed"}, "belong to no quantized layer"),
        "half": (good - {KV[0]}, "self_attn has KV-cache scales but lacks q_scale"),
        "none": (good - set(KV), "promises KV-cache scales, but there are none"),
    }
    for names, message in cases.values():
        with pytest.raises(ManifestError, match=message):
            verify_tensors(MANIFEST, names)
    without = Manifest(schemes=MANIFEST.schemes)
    with pytest.raises(ManifestError, match="would find no home"):
        verify_tensors(without, good)


def test_other_tools_leave_the_queries_scale_out() -> None:
    manifest = replace(MANIFEST, kv_scales=("k_scale", "v_scale"))
    verify_tensors(manifest, MANIFEST.layer_tensors() | set(KV[1:]))
    with pytest.raises(ManifestError, match="lacks v_scale"):
        verify_tensors(manifest, MANIFEST.layer_tensors() | {KV[1]})
    found = read_manifest(write_config(MANIFEST), {**shapes_of(MANIFEST), KV[1]: (1,), KV[2]: (1,)})
    assert found == manifest


def test_shapes_are_compared_with_the_promise() -> None:
    config, scales = write_config(MANIFEST), {name: (1,) for name in KV}
    good = {**shapes_of(MANIFEST), **scales}
    assert read_manifest(config, good) == MANIFEST
    cases = {
        "bits": ({"lm_head.weight_packed": (256, 48)}, "lm_head .*the codes of 384 input features do not fit 6 groups"),
        "ragged": ({"lm_head.weight_packed": (256, 88)}, "lm_head .*ragged: 704 input features in 6 groups of 128"),
        "rows": ({"lm_head.weight_scale": (64, 6)}, r"lm_head.weight_scale has shape \[64, 6\], expected \[256, 6\]"),
        "head": ({KV[1]: (8, 1, 1)}, "k_scale has shape .*one scale per tensor"),
    }
    for changed, message in cases.values():
        with pytest.raises(ManifestError, match=message):
            read_manifest(config, {**good, **changed})
