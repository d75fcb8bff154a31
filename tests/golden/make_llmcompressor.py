"""Golden checkpoints made by llm-compressor: python make_llmcompressor.py [--list] [NAME ...] (no name: all of them).

Every checkpoint is exported the way a user would, and dequantized by compressed-tensors.
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import auto_round
import llmcompressor
import peer_ct
import tiny
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

SAMPLES, LENGTH = 8, 64
MODIFIERS: dict[str, type[Modifier]] = {
    "rtn": QuantizationModifier,
    "gptq": GPTQModifier,
    "autoround": AutoRoundModifier,
}
Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One checkpoint: the recipe, and what a reader must do with the result."""

    scheme: str
    recipe: list[Step]
    keep: bool = False
    refused: bool = False
    defect: str = ""
    model: dict[str, int] = field(default_factory=dict)


def weights(bits: int, sym: bool = True, group: int = 32, targets: tuple[str, ...] = ("Linear",)) -> dict[str, Any]:
    """Build a config group of integer weights, 16-bit activations; group 0 is one scale a channel."""
    shape = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"targets": list(targets), "weights": {"num_bits": bits, "type": "int", "symmetric": sym, **shape}}


def floats(scheme: str, targets: tuple[str, ...]) -> dict[str, Any]:
    """Build a config group of a floating-point preset."""
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(scheme, list(targets)).model_dump()


def groups(kind: str, *members: dict[str, Any], ignore: tuple[str, ...] = ("lm_head",), **rest: Any) -> Step:
    """Build a modifier over config groups."""
    return kind, {"config_groups": {f"group_{i}": m for i, m in enumerate(members)}, "ignore": list(ignore), **rest}


def preset(scheme: str, kind: str = "rtn", **rest: Any) -> Step:
    """Build a modifier with a preset scheme on every Linear."""
    return kind, {"targets": "Linear", "scheme": scheme, "ignore": ["lm_head"], **rest}


def integer(bits: int, sym: bool = True, kind: str = "rtn", group: int = 32, **rest: Any) -> Case:
    """Integer weights of one kind."""
    options = {"iters": 3, "lr": 0.01, "enable_torch_compile": False} if kind == "autoround" else {}
    return Case(f"W{bits}A16{'' if sym else '_ASYM'}", [groups(kind, weights(bits, sym, group), **options)], **rest)


AUTOROUND = {"iters": 3, "lr": 0.01, "enable_torch_compile": False}
SMALL = {"ffn": 96}  # of the checkpoints that the repository keeps
WIDE = {"hidden": 128, "ffn": 256}
FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
PLACEHOLDER = (
    "the scales are asymmetric, but every zero point is the placeholder midpoint (0x88888888): "
    "the weights are not what was tuned"
)

CASES: dict[str, Case] = {
    "lc_w4_sym": integer(4),
    "lc_w4_asym": integer(4, False),
    "lc_w4_asym_gptq": integer(4, False, "gptq"),
    "lc_w4_sym_gptq_actorder": Case("W4A16", [groups("gptq", weights(4), actorder="static")]),
    "lc_w4_sym_autoround": integer(4, kind="autoround"),
    "lc_w4_asym_autoround": integer(4, False, "autoround", refused=True, defect=PLACEHOLDER, keep=True, model=SMALL),
    "lc_w4_asym_autoround_preset": Case(
        "W4A16_ASYM", [preset("W4A16_ASYM", "autoround", **AUTOROUND)], refused=True, defect=PLACEHOLDER, model=WIDE
    ),
    "lc_w3_sym": integer(3),
    "lc_fp8_static": Case("FP8", [preset("FP8")]),
    "lc_fp8_dynamic": Case("FP8_DYNAMIC", [preset("FP8_DYNAMIC")]),
    "lc_fp8_block": Case("FP8_BLOCK", [preset("FP8_BLOCK")], model=WIDE),
    "lc_fp8_block_ragged": Case("FP8_BLOCK", [preset("FP8_BLOCK")]),
    "lc_nvfp4": Case("NVFP4", [preset("NVFP4")], keep=True, model=SMALL),
    "lc_nvfp4a16": Case("NVFP4A16", [preset("NVFP4A16")]),
    "lc_nvfp4_autoround": Case("NVFP4", [preset("NVFP4", "autoround", **AUTOROUND)]),
    "lc_mxfp4": Case("MXFP4", [preset("MXFP4")], keep=True, model=SMALL),
    "lc_mxfp4a16": Case("MXFP4A16", [preset("MXFP4A16")]),
    "lc_mxfp8": Case("MXFP8", [preset("MXFP8")]),
    "lc_w4_kv": Case("W4A16", [groups("rtn", weights(4), kv_cache_scheme=FP8_KV)]),
    "lc_w4_kv_head": Case("W4A16", [groups("rtn", weights(4), kv_cache_scheme=FP8_KV | {"strategy": "attn_head"})]),
    "lc_w4_autoround_kv": Case(
        "W4A16",
        [
            groups("autoround", weights(4), **AUTOROUND),
            ("rtn", {"kv_cache_scheme": FP8_KV, "targets": [], "ignore": ["lm_head"]}),
        ],
    ),
    "lc_attention": Case(
        "W4A16",
        [
            groups(
                "rtn",
                weights(4),
                {"targets": ["LlamaAttention"], "input_activations": FP8_KV},
            )
        ],
        refused=True,
        defect="q_scale is uninitialised memory, another value on every run; k_scale and v_scale are calibrated",
    ),
    "lc_w2_sym": integer(2),
    "lc_w5_sym": integer(5),
    "lc_w5_asym": integer(5, False),
    "lc_w6_sym": integer(6),
    "lc_w7_sym": integer(7),
    "lc_w8_sym": integer(8),
    "lc_w3_asym": integer(3, False),
    "lc_w8_asym": integer(8, False),
    "lc_w4_channel": integer(4, group=0),
    "lc_w3_asym_channel": integer(3, False, group=0),
    "lc_w4_preset": Case("W4A16", [preset("W4A16")], model=WIDE),
    "lc_w8_preset": Case("W8A16", [preset("W8A16")], model=WIDE),
    "lc_w4afp8": Case("W4AFP8", [preset("W4AFP8")], model=WIDE),
    "lc_int8": Case("W8A8", [preset("INT8")]),
    "lc_ragged": integer(4, group=64, model=SMALL),
    "lc_ragged_bypass": Case(
        "W4A16", [groups("rtn", weights(4, group=64), bypass_divisibility_checks=True)], model=SMALL
    ),
    "lc_lm_head": Case("W4A16", [groups("rtn", weights(4), ignore=())]),
    "lc_mixed_kv": Case(
        "W4A16 + W8A16 + W4A16_ASYM + W3A16_ASYM",
        [
            groups(
                "rtn",
                weights(4, targets=("re:.*q_proj$", "re:.*k_proj$")),
                weights(8, targets=("re:.*v_proj$",)),
                weights(4, False, targets=("re:.*mlp.*",)),
                weights(3, False, targets=("model.layers.0.self_attn.o_proj",)),
                ignore=("lm_head", "re:.*layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"),
                kv_cache_scheme=FP8_KV,
            )
        ],
        keep=True,
        model=SMALL,
    ),
    "lc_mixed_formats": Case(
        "NVFP4 + FP8_DYNAMIC + W4A16",
        [
            groups(
                "rtn",
                floats("NVFP4", ("re:.*mlp.*",)),
                floats("FP8_DYNAMIC", ("re:.*self_attn.[qkv]_proj",)),
                weights(4, targets=("re:.*o_proj",)),
            )
        ],
    ),
}


def build(step: Step) -> Modifier:
    """Build the modifier of one recipe step."""
    kind, options = step
    return MODIFIERS[kind](**options)


def make(name: str) -> None:
    """Quantize, export, dequantize and record one checkpoint."""
    case = CASES[name]
    folder = tiny.target(name, keep=case.keep)
    torch.manual_seed(tiny.SEED)
    with tempfile.TemporaryDirectory() as scratch:
        source = tiny.save_source(Path(scratch, "source"), **case.model)
        original = load_file(source / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source)
        texts = tokenizer(
            tiny.calibration_text(SAMPLES), truncation=True, max_length=LENGTH, return_token_type_ids=False
        )
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_dict(dict(texts)),
            recipe=[build(step) for step in case.recipe],
            num_calibration_samples=SAMPLES,
            max_seq_length=LENGTH,
        )
        model.save_pretrained(folder, save_compressed=True)
        tokenizer.save_pretrained(folder)
    modifiers = ", ".join(f"{MODIFIERS[kind].__name__}(**{options!r})" for kind, options in case.recipe)
    record = {
        "name": name,
        "peer": "llm-compressor",
        "version": llmcompressor.__version__,
        "packages": {
            "compressed-tensors": peer_ct.VERSION,
            "auto-round": auto_round.__version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
        "command": f"oneshot(SOURCE, recipe=[{modifiers}], num_calibration_samples={SAMPLES}, max_seq_length={LENGTH})",
        "scheme": case.scheme,
        "dialect": "compressed-tensors",
        "expect": "refused" if case.refused else "equal",
        "defect": case.defect,
        "how_expected_was_made": peer_ct.HOW,
    }
    tiny.finish(folder, record, peer_ct.dequantize(folder), original)


if __name__ == "__main__":
    tiny.main(CASES, make, __doc__)
