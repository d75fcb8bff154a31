"""The gate with real engines: lm-eval through vLLM, on the original and on what was calibrated."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from demo.problems import generate
from tests.conftest import DEMO_MODEL

pytestmark = pytest.mark.slow


def test_the_gate_scores_both_models_through_vllm_and_passes(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "problems.jsonl", tmp_path / "gate.json"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in generate("test", 10, seed=4)))
    [command] = entry_points(group="console_scripts", name="vllm-autoround")
    arguments = ["gate", demo_checkpoint, "--baseline", DEMO_MODEL, "--data", data]
    arguments += ["--num-fewshot", "2", "--min-recovery", "0.8", "--output", output]
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # One process a model instead of two: the import takes longest.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert command.load()([str(argument) for argument in arguments]) == 0
    assert "PASSED: recovery" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["metric"] == "exact_match,strict-match"
    assert result["baseline_score"] >= 0.875  # at most one of eight wrong
    assert result["recovery"] == result["score"] / result["baseline_score"]
