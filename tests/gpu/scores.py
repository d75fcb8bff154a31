"""What several checkpoints say in real vLLM: log-probabilities of given texts, greedy tokens, and the kernels behind.

One process for many checkpoints, because importing vLLM takes longest; `scores_of` starts a few, and another if one
dies.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
MARK = "SCORES "
LANES = 4  # processes at once
# With a fixed size of the cache vLLM does not measure what is free, and does not mind others that take and give back.
SHARED_GPU = {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 1 << 30}


def probe(model: Any) -> dict[str, Any]:
    """Runs in the worker: the kernels of each layer, and the scales of each attention layer."""
    return {
        "kernels": {
            name: [part.kernel.name for part in module.parts]
            for name, module in model.named_modules()
            if hasattr(module, "parts")
        },
        "scales": {
            name: {letter: getattr(module, f"_{letter}_scale").flatten().tolist() for letter in "qkv"}
            for name, module in model.named_modules()
            if hasattr(module, "_k_scale_float")
        },
    }


def score(model: str, settings: dict[str, Any], texts: list[list[int]], prompts: list[list[int]]) -> dict[str, Any]:
    """Log-probabilities of ``texts`` (token ids) from their second token on, and 24 greedy tokens for each prompt."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, **SHARED_GPU}
    llm = LLM(model, **{**defaults, **settings})
    try:
        scored = llm.generate(
            [{"prompt_token_ids": ids} for ids in texts], SamplingParams(max_tokens=1, prompt_logprobs=0)
        )
        greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
        return {
            "logprobs": [
                [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)]
                for out, ids in zip(scored, texts, strict=True)
            ],
            "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
            **llm.apply_model(probe)[0],
        }
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def scores_of(requests: list[dict[str, Any]], texts: list[list[int]], prompts: list[list[int]]) -> list[dict[str, Any]]:
    """`score` of each request (its ``model`` and ``settings``), or its ``error``."""
    with ThreadPoolExecutor(LANES) as pool:
        lanes = list(pool.map(lambda lane: _in_one_lane(requests[lane::LANES], texts, prompts), range(LANES)))
    return [lanes[index % LANES][index // LANES] for index in range(len(requests))]


def _in_one_lane(
    requests: list[dict[str, Any]], texts: list[list[int]], prompts: list[list[int]]
) -> list[dict[str, Any]]:
    environment = os.environ | {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `probe` is handed over as a function
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    results: list[dict[str, Any]] = []
    while len(results) < len(requests):
        job = {"requests": requests[len(results) :], "texts": texts, "prompts": prompts}
        run = subprocess.run(
            [sys.executable, "-m", "tests.gpu.scores"],
            cwd=REPOSITORY,
            env=environment,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
        )
        results += [json.loads(line.removeprefix(MARK)) for line in run.stdout.splitlines() if line.startswith(MARK)]
        if len(results) < len(requests):  # the next one took the process with it
            log = (run.stdout + run.stderr)[-6000:]
            results.append({"error": f"the process ended with status {run.returncode}:\n{log}"})
    return results


def main() -> None:
    """Score every request of the job on the standard input; a line of output each."""
    job = json.load(sys.stdin)
    for request in job["requests"]:
        try:
            result = score(request["model"], request.get("settings", {}), job["texts"], job["prompts"])
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            result = {"error": f"{type(error).__name__}: {error}"}
        print(f"\n{MARK}{json.dumps(result)}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
