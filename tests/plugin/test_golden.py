"""Checkpoints made by other tools, loaded by vLLM's own Llama through the plugin, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import attention
from vllm.model_executor.models.llama import LlamaForCausalLM

import vllm_autoround
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import KV_SCALES
from vllm_autoround.format.reader import quantized_layers, read_manifest, read_tensors
from vllm_autoround.plugin.embedding import AutoRoundEmbeddingMethod
from vllm_autoround.plugin.kv_cache import AutoRoundKVCacheMethod
from vllm_autoround.plugin.linear import AutoRoundLinearMethod

from .test_kv_cache import PerHeadBackend

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent for pattern in ("*", ".made/*") for path in GOLDEN.glob(f"{pattern}/golden.json"))
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

if not FOLDERS:
    pytest.skip(f"no checkpoints in {GOLDEN}; tests/golden/make.sh makes them", allow_module_level=True)


def is_llama(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return bool(config["architectures"] == ["LlamaForCausalLM"])


def refused(folder: Path) -> bool:
    """Whether the format itself does not take the checkpoint; tests/format says why."""
    try:
        for _ in quantized_layers(folder, read_manifest(folder)):
            pass
    except ManifestError:
        return True
    return False


READABLE = [folder for folder in FOLDERS if is_llama(folder) and not refused(folder)]
REFUSED = [folder for folder in FOLDERS if is_llama(folder) and refused(folder)]


@pytest.fixture(autouse=True)
def _cpu_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose layers can be created on every platform; nothing attends here."""
    vllm_autoround.register()
    monkeypatch.setattr(attention, "get_attn_backend", lambda *_, **__: PerHeadBackend)


def load(folder: Path) -> LlamaForCausalLM:
    """vLLM's model with the checkpoint in it, as its loader makes it."""
    model_config = ModelConfig(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", quantization="autoround", max_model_len=64
    )
    vllm_config = VllmConfig(model_config=model_config, device_config=DeviceConfig("cpu"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(vllm_config):
            model = LlamaForCausalLM(vllm_config=vllm_config)
            model.load_weights(tensors_of(folder))
            for module in model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(method, AutoRoundLinearMethod | AutoRoundEmbeddingMethod | AutoRoundKVCacheMethod):
                    method.process_weights_after_loading(module)
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        if path.name != "expected.safetensors":
            yield from load_file(path).items()


def held(model: LlamaForCausalLM, layer: str) -> Tensor:
    """The weight that the model multiplies with in place of a layer of the checkpoint."""
    parent, _, name = layer.rpartition(".")
    fused = next((fused for fused, names in FUSED.items() if name in names), name)
    module = model.get_submodule(f"{parent}.{fused}" if parent else fused)
    if not hasattr(module, "parts"):
        return module.weight if fused == name else _cut(module.weight, module, FUSED[fused].index(name))
    index = FUSED[fused].index(name) if fused != name else 0
    (part,) = [part for part in module.parts if index in part.shards]
    whole = part.weight if hasattr(part, "weight") else part.kernel.weight.dequantize()
    return whole.split(part.sizes)[part.shards.index(index)]


def _cut(weight: Tensor, module: Any, index: int) -> Tensor:
    return weight.split(module.output_partition_sizes)[index]


@pytest.mark.parametrize("folder", READABLE, ids=lambda folder: folder.name)
def test_every_layer_is_what_the_checkpoint_stands_for(folder: Path) -> None:
    model = load(folder)
    manifest = read_manifest(folder)
    for layer, weight in quantized_layers(folder, manifest):
        expected = weight.dequantize()
        assert torch.equal(held(model, layer)[: len(expected)], expected), layer
    for name, tensor in read_tensors(folder, ("_proj.weight",)):
        layer = name.removesuffix(".weight")
        if layer not in manifest.schemes:
            assert torch.equal(held(model, layer).data, tensor), layer
    for name, tensor in tensors_of(folder):
        attention_layer, _, scale = name.rpartition(".")
        if scale in KV_SCALES:
            module = model.get_submodule(f"{attention_layer}.attn")
            heads = tensor.float().flatten().view(getattr(module, f"_{scale}").numel(), -1)
            assert getattr(module, f"_{scale}").flatten().tolist() == heads.amax(1).tolist(), name


@pytest.mark.parametrize("folder", REFUSED, ids=lambda folder: folder.name)
def test_what_the_format_refuses_does_not_load(folder: Path) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - tests/format has the messages
        load(folder)
