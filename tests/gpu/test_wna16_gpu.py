"""The compiled Triton kernel: bfloat16, Llama's shapes, CUDA graphs and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import SHAPES
from tests.kernels.test_wna16 import GROUPS, PATHS, ROWS, Run, check, check_weights, random_weight, some_columns
from vllm_autoround.format.weights import Integer, QuantizedWeight
from vllm_autoround.kernels import wna16
from vllm_autoround.kernels.wna16 import prepare, wna16_linear

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
# Every width with two group sizes, one with and one without zero points; every group size with two widths or more.
TYPES = [
    Integer(bits=bits, group_size=GROUPS[(bits + 3 * symmetric) % 6], symmetric=bool(symmetric))
    for bits in range(2, 9)
    for symmetric in (0, 1)
]


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_small_weights(type_: Integer) -> None:
    """An odd number of output rows; rows of activations around the borders of the tiles."""
    dtype = DTYPES[TYPES.index(type_) % 2]
    weight = random_weight(type_, 97, some_columns(type_), dtype)
    for rows in (*ROWS, 32, 33, 64, 65):
        check(wna16.fused, weight, rows, dtype)
    check(wna16.unpacked, weight, 130, dtype)
    for run in PATHS:
        check(run, weight, 3, dtype, torch.randn(97).to(dtype))


@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_identity(bits: int, dtype: torch.dtype, run: Run) -> None:
    """All of a weight, element by element."""
    weight = random_weight(Integer(bits=bits, group_size=128, symmetric=False), 192, 1024, dtype)
    check_weights(run, weight, torch.arange(1024), dtype)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("extreme", [0, 1])
def test_extreme_codes(bits: int, extreme: int) -> None:
    type_ = Integer(bits=bits, group_size=128, symmetric=False)
    weight = random_weight(type_, 64, 1024, torch.bfloat16)
    weight.codes.fill_(extreme * type_.max_code)
    weight.zero_point[:, ::2], weight.zero_point[:, 1::2] = 0, type_.max_code
    for run in PATHS:
        check(run, weight, 16, torch.bfloat16)


@pytest.mark.parametrize("bits", range(2, 9))
def test_llama_shapes(bits: int) -> None:
    """Decode and prefill with the layers of a Llama-3-8B, as vLLM merges them."""
    shape = SHAPES["llama-3-8b"]
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    for rows, columns in ((qkv, shape.hidden), (2 * shape.mlp, shape.hidden), (shape.hidden, shape.mlp)):
        weight = random_weight(Integer(bits=bits, group_size=128, symmetric=False), rows, columns, torch.bfloat16)
        for batch in (1, 16, 64, 300):
            check(_dispatched, weight, batch, torch.bfloat16)


def _dispatched(x: Tensor, words: Tensor, affine: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    return wna16_linear(x, words, affine, bits, bias)


def three_bits() -> QuantizedWeight:
    return random_weight(Integer(bits=3, group_size=128, symmetric=False), 4096, 4096, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_cuda_graph(rows: int) -> None:
    """A replay on other activations equals a call; without a graph, nothing waits for the GPU."""
    prepared, bias = prepare(three_bits()), torch.randn(4096).bfloat16()
    x = torch.randn(rows, 4096).bfloat16()
    wna16_linear(x, *prepared, 3, bias)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wna16_linear(x, *prepared, 3, bias)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = wna16_linear(x, *prepared, 3, bias)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, expected)


def test_same_input_same_output() -> None:
    prepared = prepare(three_bits())
    for rows in (1, 16, 64):
        x = torch.randn(rows, 4096).bfloat16()
        first = wna16_linear(x, *prepared, 3)
        assert all(torch.equal(first, wna16_linear(x, *prepared, 3)) for _ in range(20))


def test_activations_at_odd_addresses() -> None:
    """Slices that begin off the alignment that loads of several elements need."""
    prepared = prepare(three_bits())
    wide = torch.randn(5, 4096 + 7).bfloat16()
    out = wna16_linear(wide[:, 3:-4], *prepared, 3)
    assert torch.equal(out, wna16_linear(wide[:, 3:-4].contiguous(), *prepared, 3))


def test_torch_compile() -> None:
    """One graph, with a number of rows that the compiler does not know."""
    prepared = prepare(three_bits())

    def layer(x: Tensor) -> Tensor:
        return torch.relu(wna16_linear(x * 2, *prepared, 3)) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (3, 20, 150):
        x = torch.randn(rows, 4096).bfloat16()
        assert torch.equal(compiled(x), layer(x))
