"""Golden checkpoints made by auto-round: python make_autoround.py [--list] [NAME ...] (no name: all of them).

Every checkpoint is exported the way a user would, and dequantized by the module that auto-round itself loads it into.
"""

import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny
import torch
from auto_round import AutoRound, __version__
from auto_round.experimental.qmodules import FakeActQuantLinear
from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round.inference.convert_model import get_layer_config
from auto_round.utils.weight_handler import _dequant_fp8_linear_weight
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as transformers_version

TUNING = {"iters": 4, "lr": 0.01, "minmax_lr": 0.01, "nsamples": 8, "seqlen": 64, "batch_size": 4, "seed": 42}
SMALL = {"ffn": 96}  # of the checkpoints that the repository keeps
WIDE = {"hidden": 256, "ffn": 256}  # auto-round's 128x128 blocks take no smaller k_proj and no ragged block
ATTENTION = "model.layers.0.self_attn"
MIXED = {
    f"{ATTENTION}.q_proj": {"bits": 4},
    f"{ATTENTION}.v_proj": {"bits": 8},
    "model.layers.1.mlp.down_proj": {"bits": 16},
    "layers.1.self_attn.[kv]_proj": {"bits": 8},
    ".*gate_proj": {"bits": 2, "group_size": 64},
}


ZERO_LOST = (
    "a zero point of 0 cannot be stored minus one: auto-round writes 0, which reads as 1, and so shifts such groups "
    "by a step; readers must agree with the file all the same"
)
LM_HEAD = "ignore is empty, so the target Linear takes in lm_head, which is not quantized and has no scales"
RAGGED = (
    "the last group is ragged: auto-round exports it silently, while its CPU loader drops such layers "
    "and its torch module fails on them"
)


@dataclass(frozen=True)
class Case:
    """One checkpoint: what AutoRound is asked for, and what a reader must do with the result."""

    scheme: str
    options: dict[str, Any] = field(default_factory=dict)
    format: str = "auto_round"
    keep: bool = False
    refused: bool = False
    defect: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    model: dict[str, int] = field(default_factory=dict)


def integer(bits: int, sym: bool = True, group: int = 32, format: str = "auto_round", **rest: Any) -> Case:
    """Integer weights, 16-bit activations."""
    options = {"group_size": group, "sym": sym} | rest.pop("options", {})
    return Case(f"W{bits}A16", options, format, **rest)


CASES: dict[str, Case] = {
    # auto_round dialect, packing auto_round:auto_gptq
    "ar_w4_sym": integer(4),
    "ar_w2_sym": integer(2),
    "ar_w3_sym": integer(3, keep=True, model=SMALL),
    "ar_w5_sym": integer(5),
    "ar_w6_sym": integer(6),
    "ar_w7_sym": integer(7),
    "ar_w8_sym": integer(8),
    "ar_w4_sym_channel": integer(4, group=-1),
    "ar_w4_asym_gptq": integer(4, False, format="auto_round:auto_gptq"),
    "ar_w2_asym_gptq": integer(2, False, format="auto_round:auto_gptq", defect=ZERO_LOST),
    "ar_w3_asym_gptq": integer(3, False, format="auto_round:auto_gptq", defect=ZERO_LOST),
    "ar_w5_asym_gptq": integer(5, False, format="auto_round:auto_gptq"),
    "ar_w8_asym_gptq": integer(8, False, format="auto_round:auto_gptq", environment={"AR_ALLOW_W8_ASYM": "1"}),
    # packing auto_round (zero points without the minus one)
    "ar_w2_asym": integer(2, False, keep=True, model=SMALL),
    "ar_w3_asym": integer(3, False),
    "ar_w5_asym": integer(5, False),
    "ar_w8_asym": integer(8, False),
    "ar_w8_asym_allowed": integer(8, False, environment={"AR_ALLOW_W8_ASYM": "1"}),
    # packing auto_round:gptqmodel
    "ar_w4_sym_gptqmodel": integer(4, format="auto_round:gptqmodel"),
    "ar_w2_asym_gptqmodel": integer(2, False, format="auto_round:gptqmodel"),
    "ar_w4_asym_gptqmodel": integer(4, False, format="auto_round:gptqmodel"),
    # packing auto_round:auto_awq
    "ar_w4_asym_awq": integer(4, False, keep=True, model=SMALL),
    "ar_w4_sym_awq": integer(4, format="auto_round:auto_awq"),
    "ar_w5_asym_awq": integer(5, False, format="auto_round:auto_awq"),
    # mixed bits, quantized lm_head, ragged last group
    "ar_mixed_lm_head": integer(4, options={"layer_config": MIXED, "quant_lm_head": True}, keep=True, model=SMALL),
    "ar_mixed_asym": integer(4, False, options={"layer_config": MIXED}),
    "ar_ragged": integer(4, group=64, model=SMALL, defect=RAGGED),
    "ar_ragged_asym": integer(2, False, group=64, model=SMALL, defect=RAGGED),
    # other quant_methods
    "gptq_w4_sym": integer(4, format="auto_gptq"),
    "gptq_w4_asym": integer(4, False, format="auto_gptq", keep=True, model=SMALL),
    "gptq_w2_sym": integer(2, format="auto_gptq"),
    "gptq_w3_asym": integer(3, False, format="auto_gptq", defect=ZERO_LOST),
    "gptq_w8_sym": integer(8, format="auto_gptq"),
    "gptq_w5_sym": integer(5, format="auto_gptq"),
    "gptq_mixed": integer(4, format="auto_gptq", options={"layer_config": MIXED, "quant_lm_head": True}),
    "awq_w4_asym": integer(4, False, format="auto_awq"),
    "awq_w4_sym": integer(4, format="auto_awq"),
    "awq_w8_sym": integer(8, format="auto_awq"),
    "awq_one_16bit": integer(4, False, format="auto_awq", options={"layer_config": {".*down_proj": {"bits": 16}}}),
    # floating point, auto_round dialect
    "ar_fp8_static": Case("FP8_STATIC", keep=True, model=SMALL),
    "ar_fp8_block": Case("FP8_BLOCK", model=WIDE),
    "ar_fp8_block_fp8": Case("FP8_BLOCK", format="fp8", model=WIDE),
    "ar_fp8_weight_only": Case("FPW8A16"),
    "ar_nvfp4": Case("NVFP4"),
    "ar_mxfp4": Case("MXFP4"),
    "ar_mxfp8": Case("MXFP8"),
    "ar_mxint4": Case("MXINT4"),
    # KV cache and attention scales
    "ar_w4_kv": integer(4, options={"static_kv_dtype": "fp8"}),
    "ar_w4_attention": integer(4, options={"static_attention_dtype": "fp8"}),
    "ar_w4_attention_head": integer(
        4, options={"static_attention_dtype": "fp8", "static_attention_granularity": "head"}
    ),
    "ar_w4_kv_head": integer(4, options={"static_kv_dtype": "fp8", "static_kv_granularity": "head"}),
    "ar_w4_kv_nvfp4": integer(4, options={"static_kv_dtype": "nvfp4"}),
    "ar_fp8_static_attention": Case("FP8_STATIC", {"static_attention_dtype": "fp8"}),
    # llm_compressor export
    "arct_w4_sym": integer(4, format="llm_compressor"),
    "arct_w4_asym": integer(4, False, format="llm_compressor"),
    "arct_w3_sym": integer(3, format="llm_compressor"),
    "arct_w5_asym": integer(5, False, format="llm_compressor"),
    "arct_w8_asym": integer(8, False, format="llm_compressor"),
    "arct_w8_asym_allowed": integer(8, False, format="llm_compressor", environment={"AR_ALLOW_W8_ASYM": "1"}),
    "arct_mixed": integer(4, format="llm_compressor", options={"layer_config": MIXED}),
    "arct_ragged": integer(4, group=64, format="llm_compressor", model=SMALL),
    "arct_fp8_static": Case("FP8_STATIC", format="llm_compressor", defect=LM_HEAD),
    "arct_fp8_block": Case("FP8_BLOCK", format="llm_compressor", model=WIDE),
    "arct_nvfp4": Case("NVFP4", format="llm_compressor"),
    "arct_mxfp4": Case("MXFP4", format="llm_compressor"),
    "arct_fp8_static_attention": Case(
        "FP8_STATIC", {"static_attention_dtype": "fp8"}, "llm_compressor", defect=LM_HEAD
    ),
    "arct_w4_kv": integer(
        4,
        format="llm_compressor",
        options={"static_kv_dtype": "fp8"},
        refused=True,
        defect="k_scale and v_scale are stored, but kv_cache_scheme is null: a reader would drop them silently",
        keep=True,
        model=SMALL,
    ),
}


def dequantize_layer(module: nn.Module) -> Tensor:
    """Ask the module that auto-round loaded for its weight [N, K], computed in float32."""
    if hasattr(module, "dequant_weight_online"):
        module.dtype = torch.float32
        return module.dequant_weight_online().float()
    module.scales = module.scales.float()
    if isinstance(module, WQLinear_GEMM):
        return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.w_bit, module.group_size).t()
    if hasattr(module, "g_idx"):
        # With a g_idx, auto-round's forward cuts the output to K columns where N > K: leave out a trivial one.
        assert torch.equal(module.g_idx, torch.arange(module.infeatures, dtype=torch.int32) // module.group_size)
        del module.g_idx
    elif module.infeatures % module.group_size:
        # Without a g_idx, its forward fails on a ragged last group.
        module.g_idx = torch.arange(module.infeatures, dtype=torch.int32) // module.group_size
    return module(torch.eye(module.infeatures)).t()


def load_packed(folder: Path, settings: dict[str, Any]) -> dict[str, nn.Module]:
    """Fill auto-round's packing classes, which can also compute, where its loader has no CPU module for the packing."""
    source = AutoConfig.from_pretrained(folder)
    del source.quantization_config
    model = AutoModelForCausalLM.from_config(source)
    dialect = {"gptq": "auto_round:auto_gptq", "awq": "auto_round:auto_awq"}
    packing = dialect.get(settings["quant_method"]) or settings["packing_format"]
    stored = load_file(folder / "model.safetensors")
    modules = {}
    for name, scheme in get_layer_config(model, SimpleNamespace(**settings)).items():
        if scheme["bits"] > 8:
            continue
        layer = model.get_submodule(name)
        linear = dynamic_import_quant_linear_for_packing(packing, scheme["bits"], scheme["group_size"], scheme["sym"])
        sizes = (scheme["bits"], scheme["group_size"], layer.in_features, layer.out_features, False)
        module = linear(*sizes, "cpu") if linear is WQLinear_GEMM else linear(*sizes)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            if (key := f"{name}.{part}") in stored:
                setattr(module, part, stored[key])
        modules[name] = module
    return modules


def load_inference(folder: Path) -> dict[str, nn.Module]:
    """Load the checkpoint the way auto-round's users do on a CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    modules = dict(model.named_modules())
    if fake := [name for name, module in modules.items() if isinstance(module, FakeActQuantLinear)]:
        raise NotImplementedError(f"it drops the packed tensors of {len(fake)} layers and serves random weights")
    parts = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
    return {name: module for name, module in modules.items() if any(hasattr(module, part) for part in parts)}


def dequantize_float8(folder: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Dequantize float8 layers that auto-round cannot run with the function through which it quantizes them again."""
    stored = load_file(folder / "model.safetensors")
    weights = {}
    for key in stored:
        name, _, part = key.rpartition(".")
        if part in {"weight_scale", "weight_scale_inv"}:
            block = settings.get("weight_block_size") or settings["group_size"]
            block = block if isinstance(block, list) else None
            weights[name] = _dequant_fp8_linear_weight(stored[f"{name}.weight"], stored[key], block).contiguous()
    return weights


def dequantize(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Dequantize every quantized layer with the peer's own code; say which."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] == "compressed-tensors":
        import peer_ct

        return peer_ct.dequantize(folder), peer_ct.HOW
    static = not settings.get("act_dynamic", True)
    if settings["quant_method"] == "fp8" or (settings.get("data_type") == "fp" and not static):
        how = "auto_round.utils.weight_handler._dequant_fp8_linear_weight, which rounds to bfloat16"
        return dequantize_float8(folder, settings), how
    try:
        if settings["quant_method"] != "auto-round":
            raise NotImplementedError(f"quant_method {settings['quant_method']} needs GPU packages")
        modules, how = load_inference(folder), "transformers' from_pretrained with auto-round's inference modules, "
    except Exception as error:  # noqa: BLE001 - whatever the loader says goes on record
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
        modules = load_packed(folder, settings)
        how = f"auto-round's packing modules filled from the file, not by its CPU loader ({reason}); "
    weights = {name: dequantize_layer(module).contiguous() for name, module in modules.items()}
    kinds = sorted({f"{type(module).__module__}.{type(module).__name__}" for module in modules.values()})
    return weights, how + f"{', '.join(kinds)}, computing in float32"


def make(name: str) -> None:
    """Quantize, export, dequantize and record one checkpoint."""
    case = CASES[name]
    os.environ.update(case.environment)
    folder = tiny.target(name, keep=case.keep)
    with tempfile.TemporaryDirectory() as scratch:
        source = tiny.save_source(Path(scratch, "source"), **case.model)
        dataset = Path(scratch, "calibration.json")
        dataset.write_text(json.dumps([{"text": text} for text in tiny.calibration_text()]))
        arguments = {"scheme": case.scheme} | TUNING | case.options
        tuner = AutoRound(str(source), dataset=str(dataset), **arguments)
        _, folders = tuner.quantize_and_save(str(folder), format=case.format)
        original = load_file(source / "model.safetensors")
    out = Path(folders[0] if isinstance(folders, list) else folders)
    if out != folder:
        for path in out.iterdir():
            path.rename(folder / path.name)
        out.rmdir()
    record = {
        "name": name,
        "peer": "auto-round",
        "version": __version__,
        "packages": {"torch": torch.__version__, "transformers": transformers_version},
        "command": f"AutoRound(SOURCE, {', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
        f".quantize_and_save(OUT, format={case.format!r})",
        "environment": case.environment,
        "scheme": case.scheme,
        "dialect": json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"],
        "expect": "refused" if case.refused else "equal",
        "defect": case.defect,
    }
    weights, record["how_expected_was_made"] = dequantize(folder)
    tiny.finish(folder, record, weights, original)


if __name__ == "__main__":
    tiny.main(CASES, make, __doc__)
