"""A checkpoint in a vLLM engine of its own process, as a user would load it: seconds to load, and greedy tokens.

    python -m benchmarks.engine CHECKPOINT

The last line of its output is the `EngineRun` as JSON behind `MARK`; `run_engine` is that command from Python.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.provenance import ROOT

MARK = "ENGINE RUN "
_PROMPT = list(range(1, 17))  # token ids that every model has
_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """How the checkpoint was served."""

    load_seconds: float  # of LLM(...), imports not included
    generate_seconds: float  # of the first request
    tokens: list[int]
    logprobs: list[float]  # of these tokens


def run_engine(checkpoint: Path) -> EngineRun:
    """Load and generate in a new process, whose output goes to stderr.

    Raises:
        RuntimeError: the engine failed, or a log probability is not finite.
    """
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",  # everything is local
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    command = [sys.executable, "-m", "benchmarks.engine", str(checkpoint.resolve())]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        raise RuntimeError(f"the engine gave no result (status {done.returncode}):\n{done.stdout[-6000:]}")
    run = EngineRun(**json.loads(found[-1].removeprefix(MARK)))
    # NaN in a layer gives tokens all the same.
    if len(run.tokens) != _MAX_TOKENS or not all(map(math.isfinite, run.logprobs)):
        raise RuntimeError(f"the engine gave {len(run.tokens)} tokens with log probabilities {run.logprobs}")
    return run


def main() -> int:
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(sys.argv[1], quantization="autoround", enforce_eager=True, max_model_len=512, max_num_seqs=8)
    load_seconds = time.perf_counter() - begin
    parameters = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS, ignore_eos=True, logprobs=0)
    begin = time.perf_counter()
    [output] = llm.generate([{"prompt_token_ids": _PROMPT}], parameters)
    generate_seconds = time.perf_counter() - begin
    [answer] = output.outputs
    run = EngineRun(
        load_seconds=load_seconds,
        generate_seconds=generate_seconds,
        tokens=list(answer.token_ids),
        logprobs=[step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)],
    )
    print(f"\n{MARK}{json.dumps(asdict(run))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
