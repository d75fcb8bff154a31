"""What a GGUF file says of a model beside its weights: names, shapes, positions; as llama.cpp's own converter does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf
import torch
from torch import Tensor

_ROPE_SCALING = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
_YARN_KEYS = {
    "extrapolation_factor": "add_rope_scaling_yarn_ext_factor",
    "attention_factor": "add_rope_scaling_yarn_attn_factor",
    "beta_fast": "add_rope_scaling_yarn_beta_fast",
    "beta_slow": "add_rope_scaling_yarn_beta_slow",
}
# transformers' class -> llama.cpp's architecture, and whether its rotary pairs are neighbours there.
_ARCHITECTURES = {
    "LlamaForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "MistralForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "Qwen2ForCausalLM": (gguf.MODEL_ARCH.QWEN2, False),
    "Qwen3ForCausalLM": (gguf.MODEL_ARCH.QWEN3, False),
}


class GgufModel:
    """A model by its config.json, in llama.cpp's terms."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.arch, self._neighbours = _ARCHITECTURES[config["architectures"][0]]
        self._names = gguf.get_tensor_name_map(self.arch, config["num_hidden_layers"])
        self._heads = {
            "q_proj": config["num_attention_heads"],
            "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"],
        }

    def tensor_name(self, name: str) -> str | None:
        """llama.cpp's name of a tensor, None if it knows no such tensor."""
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def row_order(self, layer: str, rows: int) -> Tensor | None:
        """Which row of a layer (a tensor's name without its suffix) comes where [rows]; None: as they are.

        transformers rotates feature i of a head with feature i + D/2, llama.cpp's Llama feature 2i with 2i + 1.
        """
        heads = self._heads.get(layer.rpartition(".")[2])
        if heads is None or not self._neighbours:
            return None
        return torch.arange(rows).unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten()

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors that transformers computes: Llama 3's divisors of the rotary frequencies [D/2]."""
        rope = rope_parameters(self.config)
        if rope["rope_type"] != "llama3":
            return {}
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return {"rope_freqs.weight": 1 / ((1 - smooth) / factor + smooth)}

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        size: int = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        return size

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Sizes and positions."""
        config, rope = self.config, rope_parameters(self.config)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(_context_length(config))
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(self._heads["q_proj"])
        writer.add_head_count_kv(self._heads["k_proj"])
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in _ROPE_SCALING:
            writer.add_rope_scaling_type(_ROPE_SCALING[rope["rope_type"]])
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(original)
            for key, method in _YARN_KEYS.items():
                if rope.get(key) is not None:
                    getattr(writer, method)(rope[key])


def model_problems(config: Mapping[str, Any]) -> list[str]:
    """What llama.cpp's architectures cannot say of a model."""
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in _ARCHITECTURES:
        return [f"{architecture} cannot be written as GGUF here; known are {', '.join(_ARCHITECTURES)}"]
    problems = []
    rope = rope_parameters(config)
    if rope["rope_type"] not in ("default", "llama3", *_ROPE_SCALING):
        problems.append(f"GGUF has no name for rotary positions of type {rope['rope_type']!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("GGUF cannot say that only a part of each head is rotated")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"llama.cpp's {architecture} has silu, not {config['hidden_act']}")
    return problems


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions, wherever a config.json has them: at least rope_type and rope_theta."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**parameters, "rope_type": kind, "rope_theta": theta}


def _context_length(config: Mapping[str, Any]) -> int:
    """Positions that llama.cpp, which attends to all of them, gets right: no more than a sliding window."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    length: int = config["max_position_embeddings"]
    return min(length, window) if window else length
