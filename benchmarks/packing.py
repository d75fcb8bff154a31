"""Seconds to pack and unpack the codes of one large weight, on the CPU.

    python -m benchmarks.packing

The target: 28,672 x 4,096 codes of 3 bits packed in less than 0.5 s on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.provenance import RESULTS, write_result
from vllm_autoround.format.packing import pack, unpack

_ROUNDS = 5


def median_seconds(run: Callable[[], Tensor]) -> float:
    """Median of five runs after one warm-up."""
    run()
    seconds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=28_672)
    parser.add_argument("--columns", type=int, default=4_096)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    print(f"{'bits':>4}{'pack s':>10}{'unpack s':>10}")
    for bits in range(2, 9):
        codes = torch.randint(0, 1 << bits, (args.rows, args.columns), dtype=torch.uint8)
        words = pack(codes, bits)
        if not torch.equal(unpack(words, bits, args.columns), codes):
            raise SystemExit(f"{bits} bits: unpacking does not give back what was packed")
        row = {
            "bits": bits,
            "pack": median_seconds(lambda codes=codes, bits=bits: pack(codes, bits)),
            "unpack": median_seconds(lambda words=words, bits=bits: unpack(words, bits, args.columns)),
        }
        rows.append(row)
        print(f"{bits:>4}{row['pack']:>10.3f}{row['unpack']:>10.3f}")
    shape = {"rows": args.rows, "columns": args.columns, "threads": torch.get_num_threads()}
    print(f"\nwritten to {write_result('packing', {'shape': shape, 'rows': rows}, args.results)}")


if __name__ == "__main__":
    main()
