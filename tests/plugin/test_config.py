"""AutoRoundConfig: which checkpoints it claims, what it checks before loading, and the method of each layer."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm.plugins
from safetensors.torch import save_file
from transformers import LlamaConfig
from vllm.config import ModelConfig
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend

import vllm_autoround
from vllm_autoround.format.dialects.compressed_tensors import write_config
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import FORMAT_VERSION, MARKER, KVCache, Manifest
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import quantize
from vllm_autoround.plugin.config import AutoRoundConfig
from vllm_autoround.plugin.embedding import AutoRoundEmbeddingMethod
from vllm_autoround.plugin.linear import AutoRoundLinearMethod

from .layers import PACKED, config_of, integer

W4, W2, W4_ASYM = integer(4), integer(2), integer(4, symmetric=False)
FP8_STATIC = NAMED_SCHEMES["FP8_STATIC"]
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


# --- registration ---------------------------------------------------------------------------------------------------


def test_entry_point_makes_the_method_known(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry_point,) = entry_points(group="vllm.general_plugins", name="autoround")
    assert entry_point.value == "vllm_autoround:register"

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    without = [name for name in QUANTIZATION_METHODS if name != "autoround"]
    monkeypatch.setattr("vllm.model_executor.layers.quantization.QUANTIZATION_METHODS", without)
    monkeypatch.setattr("vllm.model_executor.layers.quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG", customized := {})
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    vllm.plugins.load_general_plugins()
    assert "autoround" in without
    assert customized["autoround"] is AutoRoundConfig
    assert get_quantization_config("autoround") is AutoRoundConfig


def test_registering_twice_is_harmless() -> None:
    (entry_point,) = entry_points(group="vllm.general_plugins", name="autoround")
    entry_point.load()()
    entry_point.load()()
    assert QUANTIZATION_METHODS.count("autoround") == 1
    assert get_quantization_config("autoround") is AutoRoundConfig


def test_importing_the_package_imports_neither_vllm_nor_torch() -> None:
    script = "import sys, vllm_autoround; print(sorted({'vllm', 'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- which checkpoints are ours -------------------------------------------------------------------------------------

FOREIGN = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "group_size": 128},
    {"quant_method": "auto-round", "bits": 2, "packing_format": "auto_round:auto_gptq"},
    {"quant_method": "fp8"},
]


def hf_config(marked: bool, **marker: Any) -> LlamaConfig:
    return LlamaConfig(**({MARKER: {"format_version": FORMAT_VERSION, **marker}} if marked else {}))


@pytest.mark.parametrize(
    ("user", "marked", "claims"),
    [
        (None, True, True),
        (None, False, False),
        ("autoround", True, True),
        ("autoround", False, True),
        ("compressed-tensors", True, False),
        ("compressed-tensors", False, False),
        ("inc", True, False),
        ("inc", False, False),
    ],
)
def test_claims_on_request_or_by_marker(user: str | None, marked: bool, claims: bool) -> None:
    for quantization_config in [write_config(Manifest(schemes={"lm_head": W4})), *FOREIGN]:
        name = AutoRoundConfig.override_quantization_method(quantization_config, user, hf_config(marked))
        assert name == ("autoround" if claims else None)


def test_claims_nothing_unasked_without_a_model_config() -> None:
    assert AutoRoundConfig.override_quantization_method(FOREIGN[0], None) is None
    assert AutoRoundConfig.override_quantization_method(FOREIGN[0], "autoround") == "autoround"


@pytest.mark.parametrize(
    ("user", "marked", "method"),
    [
        (None, True, "autoround"),
        (None, False, "compressed-tensors"),
        ("autoround", True, "autoround"),
        ("autoround", False, "autoround"),
        ("compressed-tensors", True, "compressed-tensors"),
    ],
)
def test_vllm_asks_in_this_order(tmp_path: Path, user: str | None, marked: bool, method: str) -> None:
    """All of vLLM's own methods are asked too, and its own class reads the checkpoint unless we claim it."""
    vllm_autoround.register()
    # By its class, or vLLM inspects the architecture in another process, which takes seconds.
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        quantization_config=write_config(Manifest(schemes={f"{MLP}.down_proj": W4})),
        **({MARKER: {"format_version": FORMAT_VERSION}} if marked else {}),
    )
    config.save_pretrained(tmp_path)
    chosen = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16", quantization=user)
    assert chosen.quantization == method


@pytest.mark.parametrize("foreign", FOREIGN[:3], ids=lambda config: config["quant_method"])
def test_checkpoints_of_others_are_claimed_on_request_only(tmp_path: Path, foreign: dict[str, Any]) -> None:
    """Also where a method of vLLM's own would take them."""
    vllm_autoround.register()
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=64, num_attention_heads=2, quantization_config=foreign
    )
    config.save_pretrained(tmp_path)
    common = {"model": str(tmp_path), "skip_tokenizer_init": True, "dtype": "float16"}
    assert ModelConfig(**common, quantization="autoround").quantization == "autoround"
    assert ModelConfig(**common).quantization != "autoround"


# --- reading the manifest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_cache", "strategy"), [("fp8", "tensor"), ("fp8_per_head", "attn_head")])
def test_from_config_reads_the_manifest(kv_cache: KVCache, strategy: str) -> None:
    schemes = {f"{MLP}.down_proj": W2, f"{ATTENTION}.o_proj": W4_ASYM, f"{MLP}.up_proj": FP8_STATIC}
    manifest = Manifest(schemes=schemes, ignore=("lm_head",), kv_cache=kv_cache)
    written = json.loads(json.dumps(write_config(manifest)))
    # vLLM adds these before it calls from_config.
    config = AutoRoundConfig.from_config(written | {"total_num_heads": 4, "total_num_kv_heads": 2})
    assert config.manifest == manifest
    assert {name: layer.scheme for name, layer in config.layers.items()} == manifest.schemes
    assert config.kv_cache_scheme == {"strategy": strategy}
    assert config.get_name() == "autoround"
    assert config.packed_modules_mapping == {}


def test_without_kv_cache_the_attribute_that_vllm_reads_is_none() -> None:
    assert AutoRoundConfig.from_config(write_config(Manifest(schemes={}))).kv_cache_scheme is None


NOT_UNDERSTOOD = [
    {"quant_method": "fp8"},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    {"quant_method": "compressed-tensors", "config_groups": {}, "surprise": 1},
]


@pytest.mark.parametrize("foreign", NOT_UNDERSTOOD, ids=lambda config: config["quant_method"])
def test_what_is_not_understood_is_refused_before_loading(foreign: dict[str, Any], tmp_path: Path) -> None:
    config = AutoRoundConfig.from_config(foreign)
    save_in_two_files(checkpoint_tensors(), tmp_path)
    with pytest.raises(ManifestError):
        config.maybe_update_config(str(tmp_path))
    with pytest.raises(ManifestError):
        config.get_quant_method(torch.nn.Module(), "model.norm")


# As compressed-tensors' own tools write it, with classes and patterns.
BY_CLASS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": W4.weights.args()}},
    "ignore": ["re:.*lm_head"],
}


def test_a_config_of_patterns_is_read_with_the_checkpoints_tensors(tmp_path: Path) -> None:
    tensors = layer_tensors(f"{MLP}.down_proj", W4) | {"lm_head.weight": torch.ones(32, 64)}
    save_in_two_files(tensors, tmp_path)
    config = AutoRoundConfig.from_config(BY_CLASS)
    assert config.manifest is None
    config.maybe_update_config(str(tmp_path))
    assert {name: layer.scheme for name, layer in config.layers.items()} == {f"{MLP}.down_proj": W4}


def test_a_config_of_patterns_without_tensors_is_refused(tmp_path: Path) -> None:
    config = AutoRoundConfig.from_config(BY_CLASS)
    with pytest.raises(ManifestError, match=r"are not available: download the checkpoint and serve the folder$"):
        config.maybe_update_config(str(tmp_path))


def test_a_config_survives_the_way_to_another_process() -> None:
    config = config_of({f"{MLP}.down_proj": W4, f"{MLP}.up_proj": FP8_STATIC})
    copy = pickle.loads(pickle.dumps(config))
    assert copy.layers == config.layers
    assert copy.manifest == config.manifest


def test_mapper_renames_layers_and_keeps_the_names_on_disk() -> None:
    """As in multimodal models, whose language model vLLM puts elsewhere."""
    config = config_of({f"{MLP}.down_proj": W2, "lm_head": W4, "model.visual.merger": W4_ASYM})
    config.apply_vllm_mapper(
        WeightsMapper(
            orig_to_new_prefix={
                "model.visual.": "visual.",
                "lm_head.": "language_model.lm_head.",
                "model.": "language_model.model.",
            },
            orig_to_new_suffix={"lm_head": "language_model.lm_head"},
        )
    )
    assert {name: layer.scheme for name, layer in config.layers.items()} == {
        f"language_model.{MLP}.down_proj": W2,
        "language_model.lm_head": W4,
        "visual.merger": W4_ASYM,
    }
    assert config.manifest is not None
    assert set(config.manifest.schemes) == {f"{MLP}.down_proj", "lm_head", "model.visual.merger"}
    layer = ColumnParallelLinear(
        64, 32, bias=False, quant_config=config, prefix=f"language_model.{MLP}.down_proj", params_dtype=torch.float32
    )
    assert isinstance(layer.quant_method, AutoRoundLinearMethod)
    assert schemes_of(layer.quant_method) == [W2]


def schemes_of(method: AutoRoundLinearMethod) -> list[QuantScheme | None]:
    """Of the layers of the checkpoint that a layer of vLLM stands for."""
    return [layer and layer.scheme for layer in method.layers]


# --- the check of the files before loading --------------------------------------------------------------------------

SCALES = {f"{ATTENTION}.{name}": torch.tensor([0.5]) for name in ("k_scale", "v_scale", "q_scale")}


def layer_tensors(layer: str, scheme: QuantScheme) -> dict[str, torch.Tensor]:
    tensors = scheme.weights.to_tensors(quantize(torch.randn(32, 64), scheme.weights))
    if scheme.activations is not None and scheme.activations.static is not None:
        tensors[scheme.activations.static] = torch.ones(1)
    return {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}


CHECKED = {f"{MLP}.down_proj": W4, f"{ATTENTION}.o_proj": W4_ASYM, f"{MLP}.fc2": FP8_STATIC}


def checkpoint_tensors() -> dict[str, torch.Tensor]:
    """The layers of CHECKED, and a norm."""
    tensors = {"model.norm.weight": torch.ones(64)}
    for layer, scheme in CHECKED.items():
        tensors |= layer_tensors(layer, scheme)
    return tensors


def save_in_two_files(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    names = sorted(tensors)
    for index in range(2):
        part = {name: tensors[name] for name in names[index::2]}
        save_file(part, folder / f"model-0000{index + 1}-of-00002.safetensors", metadata={"format": "pt"})


def check(tensors: dict[str, torch.Tensor], folder: Path, kv_cache: bool = False, **marker: Any) -> None:
    save_in_two_files(tensors, folder)
    config = AutoRoundConfig(write_config(Manifest(schemes=CHECKED, kv_cache="fp8" if kv_cache else None)))
    config.maybe_update_config(str(folder), hf_config=hf_config(marked=True, **marker))


def test_files_that_keep_their_promises(tmp_path: Path) -> None:
    check(checkpoint_tensors(), tmp_path)


def test_files_that_keep_their_promises_with_kv_scales(tmp_path: Path) -> None:
    check(checkpoint_tensors() | SCALES, tmp_path, kv_cache=True)


@pytest.mark.parametrize("missing", sorted(set(checkpoint_tensors()) - {"model.norm.weight"}))
def test_missing_tensor(tmp_path: Path, missing: str) -> None:
    tensors = checkpoint_tensors()
    del tensors[missing]
    with pytest.raises(ManifestError, match=f"^1 promised tensors are missing, the first is {missing}$"):
        check(tensors, tmp_path)


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_unclaimed_tensor(tmp_path: Path, suffix: str) -> None:
    tensors = checkpoint_tensors() | {f"{MLP}.up_proj.{suffix}": torch.ones(2, 2)}
    with pytest.raises(ManifestError, match=rf"{MLP}\.up_proj"):
        check(tensors, tmp_path)


def test_zero_points_of_a_symmetric_layer_are_unclaimed(tmp_path: Path) -> None:
    name = f"{MLP}.down_proj.weight_zero_point"
    with pytest.raises(ManifestError, match=f"^1 tensors belong to no quantized layer, the first is {name}$"):
        check(checkpoint_tensors() | {name: torch.zeros(4, 2, dtype=torch.int32)}, tmp_path)


def test_kv_scales_without_a_kv_scheme(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"self_attn\.k_scale is there but kv_cache_scheme is not"):
        check(checkpoint_tensors() | SCALES, tmp_path)


def test_kv_scheme_without_kv_scales(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="promises KV-cache scales, but there are none"):
        check(checkpoint_tensors(), tmp_path, kv_cache=True)


@pytest.mark.parametrize("missing", ["k_scale", "v_scale", "q_scale"])
def test_one_attention_lacks_a_scale(tmp_path: Path, missing: str) -> None:
    second = {name.replace("layers.0", "layers.1"): scale.clone() for name, scale in SCALES.items()}
    del second[f"model.layers.1.self_attn.{missing}"]
    with pytest.raises(ManifestError, match=rf"^model\.layers\.1\.self_attn has KV-cache scales but lacks {missing}$"):
        check(checkpoint_tensors() | SCALES | second, tmp_path, kv_cache=True)


def test_newer_format_version(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=f"format version {FORMAT_VERSION + 1}, .* upgrade vllm-autoround$"):
        check(checkpoint_tensors(), tmp_path, format_version=FORMAT_VERSION + 1)


def test_checkpoint_of_someone_else_has_no_format_version(tmp_path: Path) -> None:
    save_in_two_files(checkpoint_tensors(), tmp_path)
    config = AutoRoundConfig(write_config(Manifest(schemes=CHECKED)))
    config.maybe_update_config(str(tmp_path), hf_config=hf_config(marked=False))
    config.maybe_update_config(str(tmp_path))  # vLLM 0.26 passes hf_config, other callers need not


# --- the method of each layer ---------------------------------------------------------------------------------------


def qkv(config: AutoRoundConfig) -> LinearBase:
    return QKVParallelLinear(64, 32, 4, 2, bias=False, quant_config=config, prefix=f"{ATTENTION}.qkv_proj")


def gate_up(config: AutoRoundConfig) -> LinearBase:
    return MergedColumnParallelLinear(64, [64, 64], bias=False, quant_config=config, prefix=f"{MLP}.gate_up_proj")


def test_fused_layer_takes_the_schemes_of_its_parts() -> None:
    config = config_of({f"{ATTENTION}.{name}": W2 for name in PACKED["qkv_proj"]})
    method = qkv(config).quant_method
    assert isinstance(method, AutoRoundLinearMethod)
    assert schemes_of(method) == [W2, W2, W2]
    assert isinstance(gate_up(config).quant_method, UnquantizedLinearMethod)


def test_fused_layer_of_mixed_schemes() -> None:
    config = config_of({f"{ATTENTION}.q_proj": W4, f"{ATTENTION}.v_proj": FP8_STATIC})
    assert schemes_of(qkv(config).quant_method) == [W4, None, FP8_STATIC]


def test_a_layer_that_is_fused_in_the_checkpoint_too() -> None:
    config = config_of({f"{ATTENTION}.qkv_proj": W4})
    assert schemes_of(qkv(config).quant_method) == [W4]


def test_same_name_in_another_layer_changes_nothing() -> None:
    config = config_of({f"{MLP}.gate_proj": W4, f"{MLP}.up_proj": W4, "model.layers.10.mlp.gate_proj": W2})
    assert schemes_of(gate_up(config).quant_method) == [W4, W4]


def test_unlisted_linear_is_not_quantized() -> None:
    layer = ColumnParallelLinear(64, 32, bias=False, quant_config=config_of({f"{MLP}.fc2": W4}), prefix=f"{MLP}.fc1")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_listed_embedding() -> None:
    layer = VocabParallelEmbedding(
        500, 64, quant_config=config_of({"model.embed_tokens": W4}), prefix="model.embed_tokens"
    )
    assert isinstance(layer.quant_method, AutoRoundEmbeddingMethod)


@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_known_from_the_models_config(tmp_path: Path, tied: bool) -> None:
    save_in_two_files(checkpoint_tensors(), tmp_path)
    config = AutoRoundConfig(write_config(Manifest(schemes=CHECKED)))
    config.maybe_update_config(str(tmp_path), hf_config=LlamaConfig(tie_word_embeddings=tied))
    assert config.tied is tied


def make_experts(config: AutoRoundConfig) -> torch.nn.Module:
    # Named FusedMoEFactory from 0.30 on.
    create = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
    return create(
        num_experts=4,
        top_k=2,
        hidden_size=64,
        intermediate_size=64,
        params_dtype=torch.bfloat16,
        quant_config=config,
        prefix=f"{MLP}.experts",
    )


def test_quantized_experts_are_refused() -> None:
    with pytest.raises(
        NotImplementedError, match=r"mlp\.experts: quantized mixture-of-experts layers are not supported$"
    ):
        make_experts(config_of({f"{MLP}.experts.3.up_proj": W4}))


def make_latent_attention(config: AutoRoundConfig) -> MLAAttention:
    return MLAAttention(
        num_heads=4,
        scale=0.1,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        q_lora_rank=None,
        kv_lora_rank=64,
        kv_b_proj=None,
        quant_config=config,
        prefix=f"{ATTENTION}.attn",
        attn_backend=TritonMLABackend,
    )


def test_latent_attention_with_kv_scales_is_refused() -> None:
    with pytest.raises(
        NotImplementedError, match=r"self_attn\.attn: KV-cache scales of latent attention are not supported$"
    ):
        make_latent_attention(config_of({}, kv_cache="fp8"))


def test_our_own_checkpoints_always_have_a_scale_of_queries(tmp_path: Path) -> None:
    scales = {name: scale for name, scale in SCALES.items() if not name.endswith("q_scale")}
    with pytest.raises(ManifestError, match=r"lacks q_scale|without q_scale"):
        check(checkpoint_tensors() | scales, tmp_path, kv_cache=True)
