"""The verdict, the local task and the refusals; the scoring itself runs in tests/e2e."""

import gzip
import json
from pathlib import Path

import pytest

from calibrate.cli import main
from calibrate.config import CalibrationError
from calibrate.gate import GateConfig, _compare, _Evaluation, _model_arguments, _write_local_task, run_gate
from demo.problems import generate
from tests.conftest import DEMO_MODEL

BEFORE = {
    "alias": "gsm8k",
    "sample_len": 100,
    "exact_match,flexible-extract": 0.9,
    "exact_match,strict-match": 0.8,
    "exact_match_stderr,strict-match": 0.04,
}
HIGHER = {"exact_match": True}


@pytest.mark.parametrize(("score", "passed"), [(0.79, True), (0.784, True), (0.78, False), (0.85, True)])
def test_the_verdict_is_the_recovery_of_the_strict_match(score: float, passed: bool) -> None:
    result = _compare(BEFORE, {**BEFORE, "exact_match,strict-match": score}, min_recovery=0.98, higher_is_better=HIGHER)
    assert result.recovery == pytest.approx(score / 0.8)
    assert result.stderr == 0.04
    assert result.passed is passed


def test_a_task_without_strict_match_is_judged_by_its_first_metric() -> None:
    result = _compare({"acc,none": 0.5, "acc_norm,none": 0.6}, {"acc,none": 0.4, "acc_norm,none": 0.6}, 0.98, {})
    assert result.metric == "acc,none"
    assert not result.passed


def test_a_baseline_of_zero_is_no_baseline() -> None:
    with pytest.raises(CalibrationError, match="the baseline scores 0 in exact_match,strict-match"):
        _compare({**BEFORE, "exact_match,strict-match": 0.0}, BEFORE, 0.98, HIGHER)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_examples_and_scored_problems_are_disjoint(tmp_path: Path, suffix: str) -> None:
    problems = list(generate("test", 8, seed=3))
    content = "".join(json.dumps(problem) + "\n" for problem in problems).encode()
    data = tmp_path / f"problems.jsonl{suffix}"
    data.write_bytes(gzip.compress(content) if suffix else content)
    folder = _write_local_task(data, 3, tmp_path)
    train, test = (
        [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    assert train == problems[:3]
    assert test == problems[3:]


def test_bos_follows_the_tokenizer() -> None:
    arguments = _model_arguments(str(DEMO_MODEL), GateConfig(model="m", baseline="b"))
    assert arguments["add_bos_token"] is True  # the demo model's tokenizer begins every text with <s>
    assert "quantization" not in arguments


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "?"}\n')
    with pytest.raises(CalibrationError, match="line 1: not an object with 'question' and 'answer'"):
        run_gate(GateConfig(model="m", baseline="b", data=bad))
    bad.write_text("".join(json.dumps(problem) + "\n" for problem in generate("test", 5, seed=3)))
    with pytest.raises(CalibrationError, match="has 5 problems; 5 examples leave none to score"):
        run_gate(GateConfig(model="m", baseline="b", data=bad))
    arguments = ["gate", "m", "--baseline", "b", "--data", str(tmp_path / "gone.jsonl"), "--limit", "0"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "gone.jsonl does not exist" in error
    assert "limit must be at least 1, got 0" in error


def test_scores_that_are_better_when_lower_are_refused() -> None:
    with pytest.raises(CalibrationError, match="word_perplexity is better when lower"):
        _compare({"word_perplexity,none": 10.0}, {"word_perplexity,none": 50.0}, 0.98, {"word_perplexity": False})


@pytest.mark.parametrize(("score", "status"), [(0.8, 0), (0.7, 1)])
def test_the_exit_status_is_the_verdict(
    score: float, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With lm-eval's results given; tests/e2e and the demo run it."""
    scores = iter([BEFORE, {**BEFORE, "exact_match,strict-match": score}])
    monkeypatch.setattr("calibrate.gate._evaluate", lambda *_: _Evaluation(next(scores), HIGHER))
    output = tmp_path / "gate.json"
    assert main(["gate", str(DEMO_MODEL), "--baseline", str(DEMO_MODEL), "--output", str(output)]) == status
    assert json.loads(output.read_text())["passed"] is (status == 0)
    assert ("PASSED" if status == 0 else "FAILED") in capsys.readouterr().out


def test_a_misspelt_checkpoint_is_found_before_the_baseline_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrate.gate._evaluate", lambda *_: pytest.fail("scored"))
    with pytest.raises(CalibrationError, match="gone has no tokenizer"):
        run_gate(GateConfig(model="gone", baseline=str(DEMO_MODEL)))
