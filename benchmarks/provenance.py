"""Where a figure comes from: hardware, versions, commit and command line, written beside every result."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGES = ("vllm-autoround", "torch", "triton", "transformers", "compressed-tensors", "auto-round", "vllm")


def provenance() -> dict[str, Any]:
    """What a reader needs to repeat the measurement of this process, as JSON."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command_line(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
    }


def write_result(name: str, payload: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``folder/<name>.json``: the payload and its `provenance`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"provenance": provenance(), **payload}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _command_line() -> str:
    """As typed with ``python -m`` in the repository's root, paths by their last part, without ``--results``."""
    program = Path(sys.argv[0]).resolve()
    arguments = [Path(word).name if "/" in word and Path(word).exists() else word for word in sys.argv[1:]]
    if "--results" in arguments:
        at = arguments.index("--results")
        del arguments[at : at + 2]
    if not program.is_relative_to(ROOT):
        return shlex.join(["python", program.name, *arguments])
    module = ".".join(program.relative_to(ROOT).with_suffix("").parts)
    return shlex.join(["python", "-m", module, *arguments])


def _commit() -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None without git or a repository."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if head is None or changes is None else {"id": head, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
