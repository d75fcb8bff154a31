"""transformers on what a checkpoint stands for, in float32: the tokens that a right engine has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_autoround.format.activations import ActivationType
from vllm_autoround.format.grids import E4M3
from vllm_autoround.format.reader import dequantized_state_dict, read_manifest, read_tensors

_ATTENTION = "fp8_kv_cache"


@torch.no_grad()
def greedy_tokens(checkpoint: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """``count`` tokens after each prompt, with the checkpoint's weights, activations and KV cache."""
    model = reference_model(checkpoint)
    tokens = []
    for ids in prompts:
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        tokens.append(out[0, len(ids) :].tolist())
    return tokens


def reference_model(checkpoint: Path) -> Any:
    """The dequantized weights in the unquantized model's class."""
    manifest = read_manifest(checkpoint)
    config = tf.AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(dequantized_state_dict(checkpoint, torch.float32), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    for layer, scheme in manifest.schemes.items():
        if scheme.activations is not None:
            _quantize_input(model.get_submodule(layer), scheme.activations)
    if manifest.kv_cache == "fp8":
        _store_keys_and_values(model, dict(read_tensors(checkpoint, ("k_scale", "v_scale"))))
    return model


def _quantize_input(layer: torch.nn.Module, type_: ActivationType) -> None:
    assert type_.static is None, "no test here has static activations"
    layer.register_forward_pre_hook(lambda _, inputs: (type_.fake_quantize(inputs[0], None),))


def _store_keys_and_values(model: Any, scales: Mapping[str, Tensor]) -> None:
    """As vLLM's CPU attention keeps them: E4M3 with the layer's scales, after RoPE. Queries stay as they are."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        k, v = (scales[f"model.layers.{module.layer_idx}.self_attn.{letter}_scale"] for letter in "kv")
        return sdpa_attention_forward(module, query, _truncate(key / k) * k, _truncate(value / v) * v, *args, **kwargs)

    tf.AttentionInterface.register(_ATTENTION, attend)
    tf.AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.config._attn_implementation = _ATTENTION


def _truncate(x: Tensor) -> Tensor:
    """The grid's value next to x towards 0, which is what vLLM 0.32 stores on the CPU; on a GPU it is the nearest."""
    clamped = x.clamp(-E4M3.highest, E4M3.highest)
    spacing = E4M3.spacing(clamped)
    return (clamped / spacing).trunc() * spacing
