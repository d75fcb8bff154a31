"""A real vLLM engine in a process of its own: greedy tokens, and what the workers hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
MARK = "ENGINE RESULT "


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
    """`generate` in a new process; ``plugins=False`` is stock vLLM."""
    environment = os.environ | {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `probe` travels to the workers by pickle
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    if settings.get("tensor_parallel_size", 1) == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process instead of three: the import takes longest
    if not plugins:
        environment["VLLM_PLUGINS"] = ""
    request = {"model": str(model), "prompts": prompts, "max_tokens": max_tokens, "settings": settings}
    run = subprocess.run(
        [sys.executable, "-m", "tests.e2e.engine_main", json.dumps(request)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in run.stdout.splitlines():
        if line.startswith(MARK):
            return {**json.loads(line.removeprefix(MARK)), "log": run.stdout + run.stderr}
    raise RuntimeError(f"the engine gave no result (status {run.returncode}):\n{(run.stdout + run.stderr)[-6000:]}")
