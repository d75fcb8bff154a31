"""The accuracy gate: the checkpoint's lm-eval score, through vLLM, against the original model's.

lm-eval runs in a process of its own for each model, so that the engines' memory is given back in between.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from calibrate.config import CalibrationError
from calibrate.vllm_environment import is_installed, vllm_environment
from vllm_autoround.format.manifest import MARKER

_LOCAL_TASK = "gsm8k_local"
# The filter whose score decides, where a task has it; a task without it is judged by its first metric.
_PRIMARY_FILTER = "strict-match"
_MOST_RECOVERY = 2.0  # anything above is a percentage by mistake


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What to compare, on what, and how much may be lost."""

    model: str  # the quantized checkpoint
    baseline: str
    task: str = "gsm8k"
    tasks_dir: Path | None = None
    data: Path | None = None  # problems in GSM8K's format; the first num_fewshot become the examples
    limit: int | None = None
    num_fewshot: int = 5
    min_recovery: float = 0.98
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    output: Path | None = None  # JSON result; default: gate.json in the checkpoint, if that is a local folder
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """Both scores and the verdict."""

    metric: str
    baseline_score: float
    score: float
    stderr: float | None  # of the quantized model's score
    recovery: float  # score / baseline_score
    passed: bool


def run_gate(config: GateConfig) -> GateResult:
    """Score both models, print the comparison, write it as JSON.

    Raises:
        CalibrationError: bad input, a missing package, an lm-eval run that failed, or a baseline that scores 0.
    """
    _check(config)
    with tempfile.TemporaryDirectory(prefix="vllm-autoround-gate-") as scratch:
        task, tasks_dir = config.task, config.tasks_dir
        if config.data is not None:
            task, tasks_dir = _LOCAL_TASK, _write_local_task(config.data, config.num_fewshot, Path(scratch))
        environment = vllm_environment(Path(scratch))
        # Both models' arguments first: a misspelt checkpoint must not cost the baseline's whole evaluation.
        runs = [_model_arguments(model, config) for model in (config.baseline, config.model)]
        before, after = (_evaluate(run, task, tasks_dir, config, environment, Path(scratch)) for run in runs)
    result = _compare(before.scores, after.scores, config.min_recovery, before.higher_is_better)
    print(_table(config, task, result, before.scores, after.scores))  # noqa: T201
    _write(config, result, before.scores, after.scores)
    return result


def _check(config: GateConfig) -> None:
    missing = [path for path in (config.data, config.tasks_dir) if path is not None and not path.exists()]
    checks = {
        "lm-eval is not installed; pip install 'vllm-autoround[eval]'": find_spec("lm_eval") is not None,
        "vLLM is not installed; pip install 'vllm-autoround[cuda]' or 'vllm-autoround[cpu]'": find_spec("vllm")
        is not None,
        f"{', '.join(map(str, missing))} does not exist": not missing,
        f"--data holds problems in GSM8K's format; it goes with --task gsm8k, not {config.task}": config.data is None
        or config.task == "gsm8k",
        f"one task at a time, got {config.task}": "," not in config.task,
        f"num-fewshot must be at least 0, got {config.num_fewshot}": config.num_fewshot >= 0,
        f"limit must be at least 1, got {config.limit}": config.limit is None or config.limit >= 1,
        f"min-recovery is a ratio like 0.98, got {config.min_recovery}": 0 < config.min_recovery <= _MOST_RECOVERY,
        f"--output {config.output} cannot be written: its folder does not exist": config.output is None
        or config.output.absolute().parent.is_dir(),
    }
    if problems := [message for message, holds in checks.items() if not holds]:
        raise CalibrationError("\n".join(problems))


def _write_local_task(data: Path, num_fewshot: int, scratch: Path) -> Path:
    """A task like lm-eval's gsm8k on a local file: a folder with its definition and two data files.

    The examples and the scored problems are disjoint.
    """
    problems = _read_problems(data)
    if len(problems) <= num_fewshot:
        raise CalibrationError(f"{data} has {len(problems)} problems; {num_fewshot} examples leave none to score")
    splits = {"train": problems[:num_fewshot] or problems[:1], "test": problems[num_fewshot:]}
    folder = scratch / "tasks"
    folder.mkdir()
    files = {}
    for split, rows in splits.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(path)
    definition = {
        "include": str(_lm_eval_folder() / "tasks" / "gsm8k" / "gsm8k.yaml"),  # prompt, filters and metric are its own
        "task": _LOCAL_TASK,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "fewshot_config": {"sampler": "first_n"},
    }
    # JSON is YAML
    (folder / f"{_LOCAL_TASK}.yaml").write_text(json.dumps(definition), encoding="utf-8")
    return folder


def _read_problems(path: Path) -> list[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    problems = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            problems.append({"question": row["question"], "answer": row["answer"]})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{path}, line {number}: not an object with 'question' and 'answer' ({error!r})"
            ) from error
    return problems


def _lm_eval_folder() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise CalibrationError("lm-eval is not installed; pip install 'vllm-autoround[eval]'")
    return Path(spec.origin).parent


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """What lm-eval reports for one task."""

    scores: dict[str, Any]  # "metric,filter" -> value, and the standard errors
    higher_is_better: dict[str, bool]  # by metric


def _evaluate(
    arguments: dict[str, Any],
    task: str,
    tasks_dir: Path | None,
    config: GateConfig,
    environment: dict[str, str],
    scratch: Path,
) -> _Evaluation:
    """Run lm-eval on one model."""
    model = arguments["pretrained"]
    output = scratch / f"result-{len(list(scratch.iterdir()))}"
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "vllm", "--batch_size", "auto"),
        *("--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())),
        *("--tasks", task, "--num_fewshot", str(config.num_fewshot), "--output_path", str(output)),
    ]
    if tasks_dir is not None:
        command += ["--include_path", str(tasks_dir)]
    if config.limit is not None:
        command += ["--limit", str(config.limit)]
    print(f"scoring {model} ...", file=sys.stderr, flush=True)  # noqa: T201
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    results = sorted(output.rglob("results_*.json"))
    if process.returncode or not results:
        print(process.stdout, file=sys.stderr)  # noqa: T201
        raise CalibrationError(f"lm-eval failed on {model} (exit status {process.returncode}); its output is above")
    content: dict[str, Any] = json.loads(results[-1].read_text(encoding="utf-8"))
    return _Evaluation(content["results"][task], content.get("higher_is_better", {}).get(task, {}))


def _model_arguments(model: str, config: GateConfig) -> dict[str, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{model} has no tokenizer that can be loaded: {error}") from error
    begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    arguments: dict[str, Any] = {
        "pretrained": model,
        "dtype": "auto",
        "add_bos_token": begins_with_bos,  # as the tokenizer does by itself; lm-eval's own default varies
        "tensor_parallel_size": config.tensor_parallel_size,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if _has_marker(Path(model)):
        arguments["quantization"] = "autoround"
    if not is_installed("vllm"):
        arguments["enforce_eager"] = True  # on the CPU, compiling takes longer than it saves
    return arguments


def _has_marker(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and MARKER in json.loads(config.read_text(encoding="utf-8"))


def _compare(
    before: dict[str, Any], after: dict[str, Any], min_recovery: float, higher_is_better: dict[str, bool]
) -> GateResult:
    metric = _primary_metric(before)
    score, baseline_score = float(after[metric]), float(before[metric])
    if baseline_score == 0:
        raise CalibrationError(f"the baseline scores 0 in {metric}: nothing to compare with")
    name, _, filter_name = metric.partition(",")
    if higher_is_better.get(name) is False:
        raise CalibrationError(f"{name} is better when lower; the gate compares scores that are better when higher")
    stderr = after.get(f"{name}_stderr,{filter_name}")
    recovery = score / baseline_score
    return GateResult(
        metric=metric,
        baseline_score=baseline_score,
        score=score,
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        recovery=recovery,
        passed=recovery >= min_recovery,
    )


def _metrics(results: dict[str, Any]) -> list[str]:
    return [key for key, value in results.items() if "," in key and "_stderr" not in key and isinstance(value, float)]


def _primary_metric(results: dict[str, Any]) -> str:
    metrics = _metrics(results)
    if not metrics:
        raise CalibrationError(f"lm-eval reports no metric for this task: {sorted(results)}")
    return next((key for key in metrics if key.endswith(f",{_PRIMARY_FILTER}")), metrics[0])


def _table(config: GateConfig, task: str, result: GateResult, before: dict[str, Any], after: dict[str, Any]) -> str:
    shown = "all problems" if config.limit is None else f"{config.limit} problems"
    lines = [
        f"{task}, {config.num_fewshot}-shot, {shown}",
        f"{'metric':<32}{'baseline':>10}{'quantized':>11}{'recovery':>10}",
    ]
    for metric in _metrics(before):
        recovery = f"{after[metric] / before[metric]:.4f}" if before[metric] else "-"
        lines.append(f"{metric:<32}{before[metric]:>10.4f}{after[metric]:>11.4f}{recovery:>10}")
    verdict = "PASSED" if result.passed else "FAILED"
    lines.append(f"{verdict}: recovery {result.recovery:.4f} of {result.metric}, at least {config.min_recovery} asked")
    return "\n".join(lines)


def _write(config: GateConfig, result: GateResult, before: dict[str, Any], after: dict[str, Any]) -> None:
    output = config.output
    if output is None and Path(config.model).is_dir():
        output = Path(config.model) / "gate.json"
    if output is None:
        return
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    content = {**asdict(result), "settings": settings, "baseline_results": before, "results": after}
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
