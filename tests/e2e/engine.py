"""A real vLLM engine in a process of its own: greedy tokens, and what the workers hold."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]


def probe(model: Any) -> dict[str, Any]:
    """Runs in a worker: scales by attention layer, and the class of every linear method."""
    scales = {
        name: {"q": m._q_scale_float, "k": m._k_scale_float, "v": m._v_scale_float, "dtype": m.kv_cache_dtype}
        for name, m in model.named_modules()
        if hasattr(m, "_k_scale_float")
    }
    methods = {
        name: type(m.quant_method).__name__
        for name, m in model.named_modules()
        if name.endswith("_proj") or name.endswith("lm_head")
    }
    return {"scales": scales, "methods": methods}


def generate(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of ``request["prompts"]`` (token ids) and the probe of each worker."""
    from vllm import LLM, SamplingParams

    llm = LLM(request["model"], enforce_eager=True, max_model_len=512, max_num_seqs=8, **request.get("settings", {}))
    params = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], params)
    probes = llm.apply_model(probe)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "scales": probes[0]["scales"],
        "methods": probes[0]["methods"],
    }


def run_engine(
    model: Path, prompts: list[list[int]], *, max_tokens: int = 24, plugins: bool = True, **settings: Any
) -> dict[str, Any]:
    """`generate` in a process of its own; ``plugins=False`` is stock vLLM."""
    # No process for the scheduler between this one and the workers, and none for a single worker: each imports vLLM.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | ({} if plugins else {"VLLM_PLUGINS": ""})
    request = {"model": str(model), "prompts": prompts, "max_tokens": max_tokens, "settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        log, result = Path(folder) / "log", Path(folder) / "result.json"
        status = _answer(request | {"environment": environment, "log": str(log), "result": str(result)})
        output = log.read_text(errors="replace") if log.exists() else ""
        if result.exists():
            return {**json.loads(result.read_text()), "log": output}
    raise RuntimeError(f"the engine gave no result (status {status}):\n{output[-6000:]}")


def _answer(request: dict[str, Any]) -> str:
    """The exit status of the process of this request."""
    if torch.cuda.is_available():  # a driver need not survive a fork
        process = _start()
        process.communicate(json.dumps(request | {"alone": True}))
        return str(process.returncode)
    process = _shared()
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(request | {"alone": False}) + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip() or f"{process.wait()} of all engines"


@cache
def _shared() -> subprocess.Popen[str]:
    """The process that forks, one for all tests here; it ends with its standard input."""
    process = _start()
    atexit.register(process.communicate)
    return process


def _start() -> subprocess.Popen[str]:
    environment = os.environ | {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `probe` travels to the workers by pickle
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    command = [sys.executable, "-m", "tests.e2e.engine_main"]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
