"""Layers, configs and shapes of checkpoints in the dialects of auto-round, GPTQ and AWQ."""

from typing import Any

import torch

from vllm_autoround.format.layouts import LAYOUTS
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

ROWS, COLUMNS = 256, 768
BLOCK = "model.layers"
Q, K, UP, DOWN = (
    f"{BLOCK}.{name}" for name in ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.mlp.up_proj", "1.mlp.down_proj")
)
HEAD = "lm_head"


def scheme(bits: int = 4, group: int | None = 128, symmetric: bool = True) -> QuantScheme:
    return QuantScheme(Integer(bits=bits, group_size=group, symmetric=symmetric))


def shapes_of(schemes: dict[str, QuantScheme], layout: str, *unquantized: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,)}
    shapes |= {f"{layer}.weight": (ROWS, COLUMNS) for layer in unquantized}
    for layer, scheme_ in schemes.items():
        specs = LAYOUTS[layout].specs(scheme_, ROWS, COLUMNS, torch.bfloat16)
        shapes |= {f"{layer}.{suffix}": spec.shape for suffix, spec in specs.items()}
    return shapes


def auto_round_config(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": BLOCK,
        "autoround_version": "0.16.1",
        "iters": 50,
    } | changes


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False} | changes


def awq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"} | changes
