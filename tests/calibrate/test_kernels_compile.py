"""The kernels compile for a GPU; none is needed for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibrate.rounding import Target, targets
from calibrate.scale_search import Candidates
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, WeightType

triton = pytest.importorskip("triton")

HOPPER = ("cuda", 90, 32)
PER_GROUP = ["low_bound", "high_bound", "low_clip", "high_clip", "low_mean", "high_mean", "low_out", "high_out"]
POINTERS = dict.fromkeys([*PER_GROUP, "global_scale", "rate", "importance", "coarse", "fine"], "*fp32") | {
    "weight": "*bf16",
    "grad": "*bf16",
    "mean": "*bf16",
    "out": "*bf16",
    "offset": "*i16",
    "finite": "*i1",
}


def compiled(kernel: Any, target: Target, **constants: Any) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from calibrate.kernel_parts import layout, type_constants

    where = layout(target)
    constants |= {**type_constants(target.type), **where.constants}
    if target.global_scale is None:
        constants["global_scale"] = None
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=positions)
    options = {"num_warps": where.warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget(*HOPPER), options=options)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (Integer(bits=4, group_size=128), 1024),
        (Integer(bits=2, group_size=16, symmetric=False), 1024),
        (NvFp4(), 1024),
        (Mx(bits=4), 1024),
        (Float8(strategy="channel"), 14336),
    ],
    ids=str,
)
def test_step_and_search(kind: WeightType, columns: int) -> None:
    from calibrate.fused_search import _search
    from calibrate.fused_step import _step

    [target] = targets([torch.randn(4, columns, dtype=torch.bfloat16)], kind)
    candidates = Candidates.of(kind, tuned=True)
    fine = len(candidates.fine[0]) if candidates.fine else 0
    counts = {"COARSE": len(candidates.coarse), "ROUNDS": len(candidates.fine), "FINE": fine}
    step = {"STEP": True, "VALUES": False, "MOMENTUM": 0.7, "FRESH": 0.3, "MOST_CLIP": 2.0}
    step |= {"UNIT": 2.0**-15, "MOST_OFFSET": 32767}
    values = step | {"STEP": False, "VALUES": True, "offset": None}
    for kernel, constants in ((_search, counts), (_step, step), (_step, values)):
        ptx = compiled(kernel, target, **constants).asm["ptx"]
        assert "ld.global" in ptx
        assert ".local" not in ptx  # registers suffice


def test_what_the_search_carries_from_trial_to_trial() -> None:
    """The best clips, their error, and where a round began; the interpreter carries whatever is assigned."""
    from calibrate.fused_search import _search

    [target] = targets([torch.randn(4, 1024, dtype=torch.bfloat16)], Integer(bits=4, group_size=128))
    candidates = Candidates.of(target.type, tuned=True)
    counts = {"COARSE": len(candidates.coarse), "ROUNDS": len(candidates.fine), "FINE": len(candidates.fine[0])}
    [loop] = [line for line in compiled(_search, target, **counts).asm["ttir"].splitlines() if "scf.for" in line]
    assert loop.partition("iter_args")[2].partition(") ->")[0].count("%") == 2 * 5  # a name and its first value each


@pytest.mark.parametrize(("both_ways", "dithered"), [(False, False), (True, False), (True, True)])
def test_the_transpose(both_ways: bool, dithered: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from calibrate.fp8_matmul import COLUMN_UNIT, ROW_UNIT, STEP_UNIT
    from calibrate.fused_transpose import _turn

    tile: dict[str, int | None] = {"ROWS": 64, "COLUMNS": 128, "STRIDE": 0, "TURNED_STRIDE": 1}
    tile |= {"ROW_UNIT": ROW_UNIT, "COLUMN_UNIT": COLUMN_UNIT, "STEP_UNIT": STEP_UNIT}
    types = {"source": "*u8", "turned_scale": "*fp32", "turned": "*u8", "rows": "i32", "columns": "i32"}
    if both_ways:
        types |= {"source": "*bf16", "rows8": "*u8", "scale": "*fp32"}
    else:
        tile |= {"rows8": None, "scale": None}
    if dithered:
        types |= {"step": "*i64"}
    else:
        tile |= {"step": None}
    signature = {name: types.get(name, "constexpr") for name in _turn.arg_names}
    positions = {(_turn.arg_names.index(name),): value for name, value in tile.items()}
    source = ASTSource(fn=_turn, signature=signature, constexprs=positions)
    ptx = triton.compile(source, target=GPUTarget(*HOPPER)).asm["ptx"]
    per_thread = 64 * 128 // (4 * 32)
    assert ptx.count("cvt.rn.satfinite.e4m3x2") == per_thread // 2 * (2 if both_ways else 1)
