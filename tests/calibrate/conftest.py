"""Tiny random models of the supported families."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

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
