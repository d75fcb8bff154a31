"""``vllm serve`` on a calibrated checkpoint answers over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from calibrate.vllm_environment import vllm_environment

pytestmark = pytest.mark.slow
SCRIPTS = Path(sys.executable).parent


def test_vllm_serve_answers_over_http(demo_checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(SCRIPTS / "vllm"), "serve", str(demo_checkpoint), "--quantization", "autoround"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "512"]
    # A process for the server and one for the engine, but none for its one worker: each imports vLLM.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    server = subprocess.Popen(
        command,
        env=vllm_environment(tmp_path) | environment,
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
