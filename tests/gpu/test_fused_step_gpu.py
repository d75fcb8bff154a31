"""The fused step and scale search, compiled for the GPU, against their references: number for number."""

from __future__ import annotations

import pytest
import torch

from tests.calibrate.fused_step_cases import (
    ALL_TYPES,
    SOME_TYPES,
    check,
    check_both_ways,
    check_search,
    check_transpose,
)
from vllm_autoround.format.weights import Float8, Integer, NvFp4, WeightType

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ALL_TYPES, ids=str)
def test_every_type_against_the_cpu(kind: WeightType) -> None:
    check(kind, "cuda", shape=(67, 768))


@pytest.mark.parametrize("kind", SOME_TYPES, ids=str)
def test_against_the_reference_on_the_gpu(kind: WeightType) -> None:
    check(kind, "cuda", shape=(130, 1024), reference_device="cuda", steps=12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", SOME_TYPES, ids=str)
def test_every_dtype_without_momentum(kind: WeightType, dtype: torch.dtype) -> None:
    out = torch.bfloat16 if dtype == torch.float16 else dtype
    check(kind, "cuda", shape=(33, 512), dtype=dtype, out=out, momentum=0.0)


@pytest.mark.parametrize(
    "kind", [Integer(bits=4, group_size=None, symmetric=False), Float8(strategy="channel")], ids=str
)
@pytest.mark.parametrize("columns", [3072, 11008, 14336])
def test_rows_longer_than_a_chunk(kind: WeightType, columns: int) -> None:
    check(kind, "cuda", shape=(9, columns))


@pytest.mark.parametrize("kind", ALL_TYPES, ids=str)
def test_the_search_against_the_cpu(kind: WeightType) -> None:
    check_search(kind, "cuda", shape=(67, 768))


@pytest.mark.parametrize("kind", [Integer(bits=3, group_size=None), Float8(strategy="channel")], ids=str)
def test_the_search_in_rows_longer_than_a_chunk(kind: WeightType) -> None:
    check_search(kind, "cuda", shape=(9, 14336))


@pytest.mark.parametrize("kind", [Integer(bits=4, group_size=128), NvFp4()], ids=str)
def test_a_layer_of_real_size(kind: WeightType) -> None:
    check(kind, "cuda", shape=(4096, 4096), reference_device="cuda", steps=3)


@pytest.mark.parametrize("shape", [(64, 128), (80, 48), (1040, 4112)])
def test_the_transpose(shape: tuple[int, int]) -> None:
    check_transpose("cuda", shape)


@pytest.mark.parametrize("shape", [(64, 128), (80, 48), (1040, 4112)])
def test_both_ways(shape: tuple[int, int]) -> None:
    check_both_ways("cuda", shape)
