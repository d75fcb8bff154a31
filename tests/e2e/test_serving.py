"""Calibrated here, served by real vLLM on the CPU: tokens, scales, tensor parallelism, HTTP, and the other readers."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from calibrate.vllm_environment import vllm_environment
from demo.problems import generate
from tests.conftest import DEMO_MODEL
from tests.e2e.engine import run_engine
from tests.e2e.reference import greedy_tokens, reference_model
from vllm_autoround.format.manifest import KV_SCALES
from vllm_autoround.format.reader import read_tensors, tensor_files

pytestmark = pytest.mark.slow
SCRIPTS = Path(sys.executable).parent


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


def test_vllm_serve_answers_over_http(demo_checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(SCRIPTS / "vllm"), "serve", str(demo_checkpoint), "--quantization", "autoround"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "512"]
    server = subprocess.Popen(
        command,
        env=vllm_environment(tmp_path) | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    body = {
        "model": str(demo_checkpoint),
        "prompt": "Question: Tom has 12 apples and buys 30 more. How many apples does Tom have now?\nAnswer:",
        "max_tokens": 64,
        "temperature": 0,
        "stop": ["Question:"],
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        text = _answer(server, request, deadline=time.monotonic() + 300)
    finally:
        server.terminate()
        server.wait(timeout=60)
    assert "<<12+30=42>>42" in text
    assert text.rstrip().endswith("#### 42")


def _answer(server: subprocess.Popen[bytes], request: urllib.request.Request, deadline: float) -> str:
    """The completion's text, once the server listens."""
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended before it answered"
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return str(json.load(response)["choices"][0]["text"])
        except (ConnectionError, urllib.error.URLError):
            time.sleep(1)
    raise TimeoutError("the server did not answer")


def test_the_gate_scores_both_models_through_vllm_and_passes(demo_checkpoint: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "problems.jsonl", tmp_path / "gate.json"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in generate("test", 10, seed=4)))
    command = [SCRIPTS / "vllm-autoround", "gate", demo_checkpoint, "--baseline", DEMO_MODEL, "--data", data]
    command += ["--num-fewshot", "2", "--min-recovery", "0.8", "--output", output]
    # One process a model instead of two: the import takes longest.
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "PASSED: recovery" in run.stdout
    result = json.loads(output.read_text())
    assert result["metric"] == "exact_match,strict-match"
    assert result["baseline_score"] >= 0.875  # at most one of eight wrong
    assert result["recovery"] == result["score"] / result["baseline_score"]
