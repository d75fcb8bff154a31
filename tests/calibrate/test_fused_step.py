"""The fused step on Triton's interpreter, in a process of its own: interpreting is chosen when kernels are defined."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from calibrate.rounding import targets
from tests.conftest import REPOSITORY
from vllm_autoround.format.scheme import QuantScheme

pytest.importorskip("triton")


def test_the_kernel_equals_the_reference_on_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/calibrate/interpreted_fused_step.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "31 passed" in done.stdout


@pytest.mark.parametrize(
    ("scheme", "columns", "fused"),
    [
        ("W4A16G128", 768, True),
        ("W3A16G-1", 600, True),
        ("NVFP4", 48, True),
        ("MXFP4", 96, True),
        ("FP8_STATIC", 600, True),
        ("FP8", 768, False),  # a scale of all rows
        ("FP8_BLOCK", 768, False),  # of 128 rows
    ],
)
def test_the_kernel_is_for_groups_within_a_row(scheme: str, columns: int, fused: bool) -> None:
    from calibrate.kernel_parts import supports

    [target] = targets([torch.ones(256, columns)], QuantScheme.parse(scheme).weights)
    assert supports(target) is fused
