"""compressed-tensors' quantization_config, to and fro, and what is refused."""

from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig

from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import Manifest, from_compressed_tensors, to_compressed_tensors, verify_tensors
from vllm_autoround.format.scheme import QuantScheme

MANIFEST = Manifest(
    schemes={
        "model.layers.0.self_attn.q_proj": QuantScheme(bits=4, group_size=128),
        "model.layers.0.mlp.up_proj": QuantScheme(bits=3, group_size=None, symmetric=False),
        "lm_head": QuantScheme(bits=4, group_size=128),
    },
    ignore=("model.layers.0.mlp.down_proj",),
    kv_cache="fp8",
)
KV = [f"model.layers.0.self_attn.{letter}_scale" for letter in "qkv"]


def test_round_trip_through_the_library() -> None:
    config = to_compressed_tensors(MANIFEST)
    assert from_compressed_tensors(config) == MANIFEST
    parsed = QuantizationConfig.model_validate(config)
    assert {tuple(group.targets) for group in parsed.config_groups.values()} == {
        ("model.layers.0.self_attn.q_proj", "lm_head"),
        ("model.layers.0.mlp.up_proj",),
    }
    assert parsed.kv_cache_scheme is not None
    assert parsed.kv_cache_scheme.num_bits == 8


def test_keys_that_vllm_adds_are_known() -> None:
    config = {**to_compressed_tensors(MANIFEST), "total_num_heads": 32, "total_num_kv_heads": 8}
    assert from_compressed_tensors(config) == MANIFEST


def with_weights(**changes: Any) -> dict[str, Any]:
    config = to_compressed_tensors(MANIFEST)
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


def with_group(**changes: Any) -> dict[str, Any]:
    config = to_compressed_tensors(MANIFEST)
    config["config_groups"]["group_0"] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**to_compressed_tensors(MANIFEST), "sparsity_config": {"format": "24"}}, "unknown key 'sparsity_config'"),
        ({**to_compressed_tensors(MANIFEST), "quant_method": "gptq"}, "quant_method must be 'compressed-tensors'"),
        ({**to_compressed_tensors(MANIFEST), "quantization_status": "frozen"}, "not a compressed checkpoint"),
        (with_weights(actorder="group"), "actorder"),
        (with_weights(type="float"), "type = 'float' is not supported"),
        (with_weights(num_bits=9), "weight bits must be 2 to 8"),
        (with_weights(block_structur=[1, 2]), "compressed-tensors rejects"),
        (with_group(targets=["Linear"]), "target 'Linear' is a pattern or a class"),
        (with_group(targets=["re:.*v_proj"]), "is a pattern or a class"),
        (with_group(targets=["model.layers.0.mlp.up_proj"]), "named twice"),
        (with_group(targets=["model.layers.0.mlp.down_proj"]), "named twice"),
        (with_group(format="int-quantized"), "format must be 'pack-quantized', got 'int-quantized'"),
        (with_group(weights=None), "does not quantize weights"),
        (
            with_group(input_activations={"num_bits": 8, "strategy": "token", "dynamic": True}),
            "quantized activations are not supported",
        ),
        (
            {
                **to_compressed_tensors(MANIFEST),
                "kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"},
            },
            "kv_cache_scheme.type = 'int' is not supported",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        from_compressed_tensors(config)


def test_an_empty_extension_changes_nothing() -> None:
    config = {**to_compressed_tensors(MANIFEST), "sparsity_config": {}, "transform_config": None}
    assert from_compressed_tensors(config) == MANIFEST


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
