"""Run by test_fused_step.py under TRITON_INTERPRET=1: the kernels of a tuning step and of the scale search on Triton's
interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.calibrate.fused_step_cases import SOME_TYPES, check, check_both_ways, check_search, check_transpose
from tests.interpreter import patch_once_a_launch
from vllm_autoround.format.weights import Float8, Integer, NvFp4, WeightType

patch_once_a_launch()


NARROW = {  # by Triton's name: torch's, and that of their bits in torch and NumPy
    tl.bfloat16: (torch.bfloat16, torch.int16, np.int16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
}


@pytest.fixture(autouse=True)
def _exact_narrow_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts them off where the hardware rounds to nearest."""
    convert = interpreter._convert_float

    def exact(values, source, target, mode):
        raw = np.ascontiguousarray(values)
        if source == tl.float32 and target in NARROW:
            dtype, bits, _ = NARROW[target]
            return torch.from_numpy(raw.copy()).to(dtype).view(bits).numpy().view(f"u{bits.itemsize}")
        if source in NARROW and target == tl.float32:
            dtype, _, bits = NARROW[source]
            return torch.from_numpy(raw.view(bits).copy()).view(dtype).float().numpy().view(np.uint32)
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", exact)


@pytest.mark.parametrize("kind", SOME_TYPES, ids=str)
def test_every_type(kind: WeightType) -> None:
    check(kind, "cpu", shape=(9, 256))


@pytest.mark.parametrize(
    ("kind", "dtype", "out"),
    [
        (Integer(bits=4, group_size=32), torch.float16, torch.bfloat16),
        (Integer(bits=3, group_size=64, symmetric=False), torch.float32, torch.float32),
        (NvFp4(), torch.float32, torch.float32),
    ],
    ids=str,
)
def test_every_dtype_without_momentum(kind: WeightType, dtype: torch.dtype, out: torch.dtype) -> None:
    check(kind, "cpu", shape=(9, 192), dtype=dtype, out=out, momentum=0.0)


@pytest.mark.parametrize(
    "kind", [Integer(bits=4, group_size=None, symmetric=False), Float8(strategy="channel")], ids=str
)
def test_rows_longer_than_a_chunk_and_no_multiple_of_one(kind: WeightType, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("calibrate.rounding", "calibrate.kernel_parts"):
        monkeypatch.setattr(f"{module}.SUM_CHUNK", 256)
    check(kind, "cpu", shape=(9, 600), steps=3)


@pytest.mark.parametrize("kind", SOME_TYPES, ids=str)
def test_the_search(kind: WeightType) -> None:
    check_search(kind, "cpu", shape=(5, 256))


def test_the_search_before_no_tuning() -> None:
    check_search(NvFp4(), "cpu", shape=(5, 256), tuned=False)


def test_the_search_in_rows_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("calibrate.rounding", "calibrate.kernel_parts"):
        monkeypatch.setattr(f"{module}.SUM_CHUNK", 256)
    check_search(Integer(bits=3, group_size=None, symmetric=False), "cpu", shape=(5, 600))


@pytest.mark.parametrize("shape", [(64, 128), (80, 48), (16, 272)])
def test_the_transpose(shape: tuple[int, int]) -> None:
    check_transpose("cpu", shape)


@pytest.mark.parametrize("shape", [(64, 128), (80, 48), (16, 272)])
def test_both_ways(shape: tuple[int, int]) -> None:
    check_both_ways("cpu", shape)
