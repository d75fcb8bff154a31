"""Calibrated here, served by real vLLM on the CPU: tokens, scales, tensor parallelism, and the other readers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.e2e.engine import run_engine
from tests.e2e.reference import greedy_tokens, reference_model
from vllm_autoround.format.manifest import KV_SCALES
from vllm_autoround.format.reader import read_tensors, tensor_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def without_kv(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint without its KV-cache part, so that only weights differ from the original."""
    folder = tmp_path_factory.mktemp("plain") / "w4a16"
    folder.mkdir()
    for path in demo_checkpoint.iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: t for name, t in load_file(path).items() if name.rpartition(".")[2] not in KV_SCALES}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        elif path.name != "model.safetensors.index.json":
            (folder / path.name).write_bytes(path.read_bytes())
    index = {"weight_map": {name: path.name for name, path in tensor_files(folder).items()}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_greedy_tokens_of_two_ranks(without_kv: Path, prompts: list[list[int]]) -> None:
    """Of one rank: tests/e2e/test_mixed.py."""
    result = run_engine(without_kv, prompts, dtype="float32", quantization="autoround", tensor_parallel_size=2)
    assert result["tokens"] == greedy_tokens(without_kv, prompts, 24)
    methods = {name: method for name, method in result["methods"].items() if "lm_head" not in name}
    assert set(methods.values()) == {"AutoRoundLinearMethod"}
    assert len(methods) == 4 * 4  # qkv, o, gate_up and down in four blocks
    kernels = set(re.findall(r"(\w+) of int4 symmetric g128, 16-bit activations: the float32 reference", result["log"]))
    assert kernels == {"QKVParallelLinear", "RowParallelLinear", "MergedColumnParallelLinear"}


@pytest.fixture(scope="module")
def served(demo_checkpoint: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """The plugin on the whole checkpoint, claimed by its marker alone.

    float16, because it is the only type in which vLLM's own CPU kernel neither fails nor quantizes activations.
    """
    return run_engine(demo_checkpoint, prompts, dtype="float16")


def test_the_marker_alone_claims_the_checkpoint_and_the_engine_has_the_files_scales(
    served: dict[str, Any], demo_checkpoint: Path
) -> None:
    assert "AutoRoundLinearMethod" in served["methods"].values()
    stored = {name: t.item() for name, t in read_tensors(demo_checkpoint) if name.rpartition(".")[2] in KV_SCALES}
    assert len(stored) == 12
    for layer in range(4):
        engine = served["scales"][f"model.layers.{layer}.self_attn.attn"]
        assert engine["dtype"].startswith("fp8")
        for letter in "qkv":
            assert engine[letter] == stored[f"model.layers.{layer}.self_attn.{letter}_scale"]


def test_stock_vllm_loads_the_checkpoint_without_the_plugin(
    served: dict[str, Any], demo_checkpoint: Path, prompts: list[list[int]]
) -> None:
    stock = run_engine(demo_checkpoint, prompts, plugins=False, dtype="float16")
    assert "AutoRoundLinearMethod" not in stock["methods"].values()
    assert stock["scales"] == served["scales"]
    pairs = [pair for a, b in zip(stock["tokens"], served["tokens"], strict=True) for pair in zip(a, b, strict=True)]
    assert sum(a == b for a, b in pairs) >= 0.9 * len(pairs)  # two kernels; greedy paths may part at a near tie


@torch.no_grad()
def test_transformers_loads_the_checkpoint_with_the_logits_of_the_dequantized_weights(
    demo_checkpoint: Path, without_kv: Path, prompts: list[list[int]]
) -> None:
    ids = torch.tensor([prompts[0]])
    expected = reference_model(without_kv)(ids).logits
    loaded = tf.AutoModelForCausalLM.from_pretrained(without_kv, dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, expected)
    # With the KV scheme transformers rounds keys and values to fp8 (relative step 2^-3) with the file's scales.
    with_kv = tf.AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)(ids).logits
    error = (with_kv - expected).norm() / expected.norm()
    assert 0 < error < 2**-4
