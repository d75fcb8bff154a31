"""``make demo``: calibrate the demo model, serve it in vLLM through the plugin, gate it. CPU only, no Hub.

Every step is a command that works the same on a real model; it is printed before it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo.problems import as_text, generate

MODEL = Path(__file__).parent / "model"
WORK = Path(".demo")
PROGRAM = Path(sys.executable).parent / "vllm-autoround"


def run(*command: str | Path) -> None:
    """Print a command as one would type it, run it, and stop the demo if it fails."""
    words = [Path(command[0]).name, *map(str, command[1:])]
    print(f"\n$ {shlex.join(words)}\n", flush=True)
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "TRANSFORMERS_VERBOSITY": "error"}
    status = subprocess.run([str(word) for word in command], env=environment, check=False).returncode
    if status:
        sys.exit(f"the command above failed with exit status {status}")


def write_data() -> tuple[Path, Path]:
    """Calibration texts from the training split, and held-out problems for the gate."""
    calibration, problems = WORK / "calibration.jsonl", WORK / "problems.jsonl"
    train = [as_text(problem) for problem in generate("train", 2000, seed=1)]
    texts = ["\n\n".join(train[begin : begin + 10]) for begin in range(0, len(train), 10)]
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    problems.write_text("".join(json.dumps(problem) + "\n" for problem in generate("test", 105, seed=1)))
    return calibration, problems


def main() -> None:
    begin = time.perf_counter()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    calibration, problems = write_data()
    out = WORK / "checkpoint"
    # Its texts do not make 128 samples of the usual 2,048 tokens.
    settings = ["--scheme", "W4A16", "--kv-cache", "fp8", "--seqlen", "512"]
    run(PROGRAM, "calibrate", MODEL, out, *settings, "--dataset", calibration)
    run(sys.executable, "-m", "demo.ask", out)
    run(PROGRAM, "gate", out, "--baseline", MODEL, "--task", "gsm8k", "--data", problems, "--num-fewshot", "5")
    print(f"\nreports: {out / 'report.json'} and {out / 'gate.json'}  ({time.perf_counter() - begin:.0f} s in all)")


if __name__ == "__main__":
    main()
