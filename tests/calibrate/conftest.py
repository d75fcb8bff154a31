"""Tiny random models of the supported families, and changed copies of the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.conftest import DEMO_MODEL

QUICK: dict[str, Any] = {"iters": 2, "batch_size": 2, "seqlen": 64, "nsamples": 4}
COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
OPT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "qwen3": lambda: tf.Qwen3Config(**COMMON),
    "mistral": lambda: tf.MistralConfig(**COMMON),
    "opt": lambda: tf.OPTConfig(**OPT),
    "gemma": lambda: tf.GemmaConfig(**COMMON),
    "gemma2": lambda: tf.Gemma2Config(**COMMON, **SLIDING),
    "gemma3": lambda: tf.Gemma3TextConfig(**COMMON, **SLIDING),
}


def make_model(config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=FAMILIES)
def family_model(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    return make_model(FAMILIES[request.param]())


def save_tiny(folder: Path, config: tf.PreTrainedConfig, *, untie: bool = True) -> Path:
    """A tiny random model with the demo model's tokenizer."""
    config.vocab_size, config.tie_word_embeddings = 1024, not untie
    make_model(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    return folder


def copied_model(folder: Path, **changes: torch.Tensor | float | None) -> Path:
    """The demo model with some tensors filled with a number, or left out (None)."""
    folder.mkdir()
    for path in DEMO_MODEL.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name].flatten()[5 : None if value == 1e38 else 6] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
