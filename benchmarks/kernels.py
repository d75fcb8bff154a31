"""Microseconds of the linear layers of a decoder block: our Triton kernel, vLLM's choice, and cuBLAS in bfloat16.

    python -m benchmarks.kernels            the table, kernels.json
    python -m benchmarks.kernels --sweep    which tile is best for which width and batch, kernels-sweep.json

Layers are merged as vLLM merges them. Every call is checked against float64 before it is timed, with the budget of
tests/numerics.py. Calls go round copies of the weight that together exceed the L2 cache several times, so that each
weight comes from memory, as it does when a model is served; they run in one CUDA graph, whose replays are timed.
Activations stay in the cache, as those of the layer before do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import RESULTS, write_result
from benchmarks.shapes import SHAPES, BlockShape
from tests.numerics import bf16_budget, relative_error
from vllm_autoround.format.weights import Integer, QuantizedWeight
from vllm_autoround.kernels import wna16

COLD_BYTES = 256 << 20  # five times the L2 cache of an H100
CALLS, REPLAYS = 16, 10
CUBLAS = "cuBLAS"

Linear = Callable[[Tensor], Tensor]

TILES = [
    wna16.Tile(m, n, warps, stages)
    for m, n, warps in ((16, 32, 2), (16, 64, 4), (16, 128, 4), (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4))
    for stages in (2, 4)
]
PROGRAMS = (264, 528, 1056)


def merged(shape: BlockShape) -> dict[str, tuple[int, int]]:
    """Layer -> (N, K), with the projections that vLLM joins joined."""
    linears = {name.rpartition(".")[2]: size for name, size in shape.linears().items()}
    joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    layers = {name: (sum(linears[part][0] for part in parts), shape.hidden) for name, parts in joined.items()}
    return {**layers, "o_proj": linears["o_proj"], "down_proj": linears["down_proj"]}


def random_weight(type_: Integer, rows: int, columns: int) -> QuantizedWeight:
    """Random codes and zero points, scales of both signs, on the GPU."""
    groups = type_.tile(rows, columns).tiles(rows, columns)
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": "cuda"}
    codes = torch.randint(0, type_.max_code + 1, (rows, columns), dtype=torch.uint8, **options)
    zero = None if type_.symmetric else torch.randint(0, type_.max_code + 1, groups, dtype=torch.uint8, **options)
    scale = (torch.randn(groups, **options) * 0.02).bfloat16()
    return QuantizedWeight(type=type_, codes=codes, scale=scale, zero_point=zero)


def microseconds(copies: list[Linear], x: Tensor) -> float:
    """Of one call: the median replay of a CUDA graph that goes round ``copies``."""
    calls = list(itertools.islice(itertools.cycle(copies), max(CALLS, len(copies))))
    for call in copies:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[2:])


def copies_of(size: int) -> int:
    """Copies of a weight of ``size`` bytes that make its reads cold."""
    return max(2, math.ceil(COLD_BYTES / size))


def ours(weight: QuantizedWeight) -> list[Linear]:
    """The Triton kernel on copies of a weight."""
    words, affine = wna16.prepare(weight)
    bits = weight.type.bits
    prepared = [(words.clone(), affine.clone()) for _ in range(copies_of(words.nbytes + affine.nbytes))]
    return [
        lambda x, words=words, affine=affine: wna16.wna16_linear(x, words, affine, bits) for words, affine in prepared
    ]


def cublas(weight: QuantizedWeight) -> list[Linear]:
    """A plain bfloat16 matmul on copies of the dequantized weight."""
    dense = weight.dequantize().bfloat16()
    copies = [dense.clone() for _ in range(copies_of(dense.nbytes))]
    return [lambda x, dense=dense: torch.nn.functional.linear(x, dense) for dense in copies]


def vllms_choice(weight: QuantizedWeight) -> tuple[str, list[Linear]]:
    """(name, calls) of the kernel that vLLM selects, whether or not the plugin would use it.

    Raises:
        ValueError: it has none.
    """
    from vllm.model_executor.kernels.linear import choose_mp_linear_kernel
    from vllm.scalar_type import ScalarType

    from vllm_autoround.format.scheme import QuantScheme
    from vllm_autoround.plugin import compat
    from vllm_autoround.plugin.integer import MixedPrecisionKernel
    from vllm_autoround.plugin.kernels import Part, Problem

    type_, (rows, columns) = weight.type, weight.codes.shape
    config = compat.mp_linear_layer_config(
        full_weight_shape=(columns, rows),
        partition_weight_shape=(columns, rows),
        weight_type=ScalarType.uint(type_.bits, int(type_.zero) if type_.symmetric else None),
        act_type=torch.bfloat16,
        group_size=type_.group_size,
        zero_points=not type_.symmetric,
    )
    chosen = choose_mp_linear_kernel(config)
    problem = Problem(prefix="benchmark", scheme=QuantScheme(type_), rows=rows, columns=columns, dtype=torch.bfloat16)
    calls: list[Linear] = []
    for _ in range(copies_of(rows * columns * type_.bits // 8)):
        kernel, part = MixedPrecisionKernel(chosen, config), Part(problem, (0,), (rows,))
        kernel.prepare(part, weight, None)
        calls.append(lambda x, kernel=kernel, part=part: kernel.apply(part, x, None))
    return chosen.__name__, calls


@contextlib.contextmanager
def vllm_process() -> Iterator[None]:
    """What vLLM's parameters and kernels ask for: a configuration, and rank 0 of 1."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{folder}/rendezvous", backend="gloo"
        )
        initialize_model_parallel(1, 1)
        yield


def activations(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()


def deviation(linear: Linear, weight: QuantizedWeight, x: Tensor) -> float:
    """Error of a call as a multiple of the budget; above 1 it is wrong."""
    dense = weight.dequantize()
    exact = x.double() @ dense.double().T
    return relative_error(linear(x), exact) / bf16_budget(x, dense, None, exact)


def measure(layer: str, weight: QuantizedWeight, kernels: dict[str, list[Linear]], batches: list[int]) -> list[dict]:
    """One row for each kernel and batch; a wrong result of ours stops the run, one of vLLM's is recorded."""
    rows = []
    for (kernel, calls), batch in itertools.product(kernels.items(), batches):
        x = activations(batch, weight.codes.shape[1])
        error = deviation(calls[0], weight, x)
        if kernel == "ours" and not error <= 1:
            raise SystemExit(f"{layer}, {weight.type}, {batch} rows: {error:.2f} times the error budget")
        weights = "bfloat16" if kernel == CUBLAS else str(weight.type)
        row = {"layer": layer, "weights": weights, "kernel": kernel, "rows": batch, "error": error}
        rows.append({**row, "microseconds": microseconds(calls, x)})
    return rows


def compare(types: list[Integer], layers: dict[str, tuple[int, int]], batches: list[int], vllm: bool) -> list[dict]:
    """All rows, printed as microseconds of all layers together."""
    rows = []
    print(f"{'weights':<28}{'kernel':<30}" + "".join(f"{f'M={batch}':>10}" for batch in batches))
    for index, type_ in enumerate(types):
        found = []
        for layer, (n, k) in layers.items():
            weight = random_weight(type_, n, k)
            kernels = {CUBLAS: cublas(weight)} if index == 0 else {}
            kernels["ours"] = ours(weight)
            if vllm:
                try:
                    name, calls = vllms_choice(weight)
                    kernels[name] = calls
                except (ValueError, RuntimeError, AssertionError) as error:
                    print(f"{type_}, {layer}: vLLM has no kernel: {str(error)[:100]!r}")
            found += measure(layer, weight, kernels, batches)
            del kernels
            torch.cuda.empty_cache()
        for kernel in dict.fromkeys(row["kernel"] for row in found):
            mine = [row for row in found if row["kernel"] == kernel]
            sums = [sum(row["microseconds"] for row in mine if row["rows"] == batch) for batch in batches]
            wrong = " (deviates)" if any(row["error"] > 1 for row in mine) else ""
            print(f"{mine[0]['weights']:<28}{kernel + wrong:<30}" + "".join(f"{total:>10.1f}" for total in sums))
        rows += found
    return rows


def sweep(types: list[Integer], layers: dict[str, tuple[int, int]], batches: list[int]) -> list[dict]:
    """Every tile and number of programs, and the unpacked path; printed are the best and what is chosen now."""
    rows = []
    for type_, (layer, (n, k)), batch in itertools.product(types, layers.items(), batches):
        weight, x = random_weight(type_, n, k), activations(batch, k)
        calls = ours(weight)
        found = [{"tile": "as it is", "programs": wna16.PROGRAMS, "microseconds": microseconds(calls, x)}]
        with patched(FUSED_ROWS=0):
            found.append({"tile": "unpacked", "programs": None, "microseconds": microseconds(calls, x)})
        for tile, programs in itertools.product(TILES if batch <= 256 else [], PROGRAMS):
            if tile.m > max(16, batch):
                continue
            with patched(FUSED_ROWS=batch, PROGRAMS=programs, choose_tile=lambda *_, tile=tile: tile):
                try:
                    found.append({"tile": list(tile), "programs": programs, "microseconds": microseconds(calls, x)})
                except wna16.triton.runtime.errors.OutOfResources:
                    continue
        best = min(found, key=lambda row: row["microseconds"])
        now = found[0]["microseconds"]
        choice = f"best {best['microseconds']:.1f} with {best['tile']}, {best['programs']} programs"
        print(f"{type_!s:<28}{layer:<14}M={batch:<6}{now:8.1f}, unpacked {found[1]['microseconds']:.1f}, {choice}")
        rows += [{"weights": str(type_), "layer": layer, "rows": batch, **row} for row in found]
    return rows


@contextlib.contextmanager
def patched(**values: Any) -> Iterator[None]:
    """Other values of constants of the kernel's module."""
    before = {name: getattr(wna16, name) for name in values}
    try:
        for name, value in values.items():
            setattr(wna16, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(wna16, name, value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2, 3, 5, 8])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="of activations")
    parser.add_argument("--layers", nargs="+", help="of qkv_proj, o_proj, gate_up_proj, down_proj; default: all")
    parser.add_argument("--asym-only", action="store_true", help="only weights with zero points")
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    layers = {name: size for name, size in merged(SHAPES[args.shape]).items() if name in (args.layers or [name])}
    types = [
        Integer(bits=bits, group_size=args.group_size, symmetric=symmetric)
        for bits in args.bits
        for symmetric in ((False,) if args.asym_only or args.sweep else (True, False))
    ]
    if args.sweep:
        path = write_result("kernels-sweep", {"rows": sweep(types, layers, args.rows)}, args.results)
    else:
        with contextlib.nullcontext() if args.no_vllm else vllm_process():
            rows = compare(types, layers, args.rows, not args.no_vllm)
        path = write_result("kernels", {"shape": args.shape, "group_size": args.group_size, "rows": rows}, args.results)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
