"""Write golden_autoround.json: what auto-round's own fake-quantizers make of one small weight.

Run in an environment of its own, from the repository's root:

    python -m venv ar && ar/bin/pip install auto-round==0.16.1
    ar/bin/python tests/format/make_golden_autoround.py
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("golden_autoround.json")
CLIP_LOW, CLIP_HIGH = 0.75, 0.9  # beta and alpha of every group
CORNER = (slice(126, 130), slice(120, 136))  # of a weight [130, 200], where four blocks of 128 x 128 meet


def golden_weight(rows: int, columns: int) -> torch.Tensor:
    """Numbers in (-0.51, 0.51) by integer arithmetic, the same everywhere, with awkward groups of 32 in two rows."""
    index = torch.arange(rows * columns)
    weight = ((index * 7919 % 1009) - 504).reshape(rows, columns) / 1000
    weight[0, :32] = 0
    weight[0, 32] = 40.0  # one outlier
    weight[0, 64:96] *= 1e-7
    weight[0, 96:128] = weight[0, 96:128].abs()
    weight[1, :32] = -weight[1, :32].abs()
    return weight


def main() -> None:
    from auto_round.data_type.fp8 import quant_block_fp_sym, quant_fp8_sym
    from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym
    from auto_round.data_type.mxfp import quant_mx
    from auto_round.data_type.nvfp import calculate_gparam, nv_fp4

    weight = golden_weight(3, 128)
    clips = {"min_scale": torch.full((12,), CLIP_LOW), "max_scale": torch.full((12,), CLIP_HIGH)}
    out: dict[str, Any] = {"auto_round": version("auto-round"), "torch": torch.__version__}
    for bits in (2, 3, 4, 8):
        for name, quantizer in (("sym", quant_tensor_sym), ("asym", quant_tensor_asym)):
            for suffix, arguments in (("", {}), ("_clipped", clips)):
                quantized, scale, zero = quantizer(weight, bits=bits, group_size=32, **arguments)
                steps = (quantized.reshape(-1, 32) / scale).round()
                out[f"int{bits}_{name}{suffix}"] = {
                    "scale": scale.flatten().tolist(),
                    "code": (steps + zero).int().flatten().tolist(),
                    "zero": zero.int().flatten().tolist() if name == "asym" else zero,
                }
    for bits in (4, 8):
        quantized, exponent, _ = quant_mx(weight, bits=bits, group_size=32)
        value = quantized.reshape(-1, 32) / torch.exp2(exponent)
        out[f"mxfp{bits}"] = {"exponent": exponent.int().flatten().tolist(), "value": value.flatten().tolist()}
    for name, divisor in (("nvfp4", calculate_gparam(weight)), ("nvfp4_shared", calculate_gparam(weight * 3))):
        quantized, scale, _ = nv_fp4(weight, global_scale=divisor)
        value = (quantized.reshape(-1, 16) * divisor / scale.clamp(min=2.0**-9) * 2).round() / 2
        out[name] = {
            "global_scale": divisor.item(),
            "scale": scale.flatten().tolist(),
            "value": value.flatten().tolist(),
        }
    quantized, scale, _ = quant_fp8_sym(weight)
    out["fp8_channel"] = {"scale": scale.flatten().tolist(), "value": as_e4m3(quantized / scale)}
    quantized, scale, _ = quant_block_fp_sym(golden_weight(130, 200))
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :200]
    out["fp8_block"] = {"scale": scale.flatten().tolist(), "value": as_e4m3((quantized / spread)[CORNER])}
    FILE.write_text(json.dumps(out, separators=(",", ":")) + "\n")


def as_e4m3(values: torch.Tensor) -> list[float]:
    """Quotients that a division left a unit of 2^-24 off the grid, on the grid."""
    return values.to(torch.float8_e4m3fn).float().flatten().tolist()


if __name__ == "__main__":
    main()
