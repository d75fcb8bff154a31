"""One model in six schemes, calibrated by the command line and served by real vLLM on the CPU."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from calibrate.cli import main
from tests.conftest import DEMO_MODEL
from tests.e2e.engine import run_engine
from tests.e2e.reference import greedy_tokens

pytestmark = pytest.mark.slow
LAYERS = {  # beside W4A16; every kind of fused layer is mixed, and one has a shard that is not quantized
    "v_proj": "W8A16",
    "gate_proj": "W3A16",
    "layers.0.mlp.down_proj": "FP8_DYNAMIC",
    "layers.1.mlp.down_proj": "MXFP4A16",
    "layers.2.mlp.down_proj": "NVFP4A16",
    "layers.3.mlp.down_proj": "ignore",
    "layers.3.self_attn.q_proj": "ignore",
    "lm_head": "W8A16",
}


@pytest.fixture
def command(tmp_path: Path, demo_texts: list[str]) -> list[str]:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo_texts))
    command = ["calibrate", str(DEMO_MODEL), str(tmp_path / "out"), "--dataset", str(texts)]
    command += ["--scheme", "W4A16", "--kv-cache", "fp8"]  # vLLM's CPU attention has no scales per head
    for pattern, scheme in LAYERS.items():
        command += ["--layer", f"{pattern}={scheme}"]
    return [*command, "--iters", "8", "--batch-size", "4", "--seqlen", "128", "--nsamples", "8"]


def test_greedy_tokens_of_a_mixed_model(command: list[str], prompts: list[list[int]], tmp_path: Path) -> None:
    assert main(command) == 0
    out = tmp_path / "out"
    result = run_engine(out, prompts, dtype="float32")
    assert result["tokens"] == greedy_tokens(out, prompts, 24)

    assert result["methods"]["lm_head"] == "AutoRoundLinearMethod"  # untied from the embedding
    assert all(scales["dtype"].startswith("fp8") for scales in result["scales"].values())
    reference = re.findall(r"(\w+) of (.*), (\S.*) activations: the float32 reference", result["log"])
    assert set(reference) == {
        *(("QKVParallelLinear", f"int{bits} symmetric g128", "16-bit") for bits in (4, 8)),
        *(("MergedColumnParallelLinear", f"int{bits} symmetric g128", "16-bit") for bits in (3, 4)),
        *(("RowParallelLinear", type_, "16-bit") for type_ in ("int4 symmetric g128", "mxfp4", "nvfp4")),
        ("RowParallelLinear", "fp8 per channel", "fp8 dynamic per token"),
        ("ParallelLMHead", "int8 symmetric g128", "16-bit"),
    }


def test_stock_vllm_refuses_the_mixture_and_says_how_to_resolve_it(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--stock-vllm"]) == 2
    assert not (tmp_path / "out").exists()
    messages = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(messages) == 8  # two fused layers in each of four blocks
    for block in range(4):
        for module, shards in (("self_attn", "q_proj|k_proj|v_proj"), ("mlp", "gate_proj|up_proj")):
            layer = f"model.layers.{block}.{module}"
            (message,) = [message for message in messages if f"error: {layer}: stock vLLM fuses" in message]
            way_out = message.partition("give them one with --layer ")[2]
            assert ast.literal_eval(way_out.partition(", or")[0]) == f"re:{re.escape(layer)}[.]({shards})$=SCHEME"
            assert way_out.endswith("or leave --stock-vllm out and serve with the plugin")
