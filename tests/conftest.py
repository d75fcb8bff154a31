"""Fixtures shared by all tests."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

# Before the libraries that read them are imported; child processes inherit them. Nothing here needs the Hub, whose
# retries take half a minute where there is none. One thread each is fastest where several tests run at once: threads
# that wait for each other at a barrier wait for whoever else has the core.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch

from demo.problems import as_text, generate

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"  # reference model and data that some checkouts have beside them
DEMO_MODEL = REPOSITORY / "demo" / "model"
DEMO_SETTINGS: dict[str, Any] = {
    "scheme": "W4A16",
    "kv_cache": "fp8",
    "iters": 16,
    "batch_size": 4,
    "seqlen": 256,
    "nsamples": 16,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"the shared reference data is absent ({SHARED.name}/)"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_texts() -> list[str]:
    """Training-split word problems, ten a text."""
    problems = list(generate("train", 400, seed=11))
    return ["\n\n".join(map(as_text, problems[i : i + 10])) for i in range(0, len(problems), 10)]


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory, demo_texts: list[str]) -> Path:
    """The demo model at W4A16 g128 with FP8 KV scales, briefly tuned; one for all workers of pytest-xdist."""
    from calibrate import calibrate

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = folder / "w4a16-fp8kv"
    with (folder / "w4a16-fp8kv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():  # it gets its name when it is finished
            calibrate(DEMO_MODEL, out, dataset=demo_texts, **DEMO_SETTINGS)
    return out
