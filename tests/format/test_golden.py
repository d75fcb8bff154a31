"""Checkpoints made by other tools (tests/golden/): each equals its maker's own dequantization, or is refused by name.

Those that are kept in the repository are always read; tests/golden/make.sh makes the others, which are read if there.
"""

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_autoround.format.dialects import auto_round, awq, compressed_tensors, gptq
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.layouts import COMPRESSED_TENSORS
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.reader import dequantized_state_dict, quantized_layers, read_config, read_manifest

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted({path.parent for pattern in ("*", ".made/*") for path in GOLDEN.glob(f"{pattern}/golden.json")})

# Defects of the checkpoints themselves, and then what is sound but not supported.
REFUSED = {
    "arct_w4_kv": "k_scale is there but kv_cache_scheme is not",
    "lc_attention": "group_. quantizes attention layers: .* whatever was in memory",
    "lc_w4_asym_autoround*": "every zero point is the placeholder midpoint",
    "ar_ragged*": "the last group is ragged: 96 input features in 2 groups of 64",
    "lc_ragged*": "the last group is ragged: 96 input features in 2 groups of 64",
    "ar_fp8_block_fp8": "quant_method 'fp8' is not understood",
    "ar_mxint4": "data_type 'mx_int' of 4 bits with group_size 32 is not supported",
    "ar_w4_kv_nvfp4": "static_kv_dtype 'nvfp4' is not supported",
    "lc_int8": "8-bit int input activations, dynamic per token, are not supported",
}
WRITERS = {
    "auto-round": auto_round.write_config,
    "gptq": gptq.write_config,
    "awq": awq.write_config,
    "compressed-tensors": compressed_tensors.write_config,
}

if not FOLDERS:
    pytest.skip(f"no checkpoints in {GOLDEN}; tests/golden/make.sh makes them", allow_module_level=True)


def refusal(name: str) -> str | None:
    return next((message for pattern, message in REFUSED.items() if fnmatch.fnmatch(name, pattern)), None)


def readable() -> list[Path]:
    return [folder for folder in FOLDERS if refusal(folder.name) is None]


def folders(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("folder", paths, ids=[path.name for path in paths])


def read(folder: Path) -> Manifest:
    """Everything that a reader checks: names, shapes, and what is in the tensors."""
    manifest = read_manifest(folder)
    for _ in quantized_layers(folder, manifest):
        pass
    return manifest


@folders([folder for folder in FOLDERS if refusal(folder.name) is not None])
def test_defects_are_named(folder: Path) -> None:
    message = refusal(folder.name)
    with pytest.raises(ManifestError, match=message):
        read(folder)


@folders(readable())
def test_equal_to_the_makers_own_dequantization(folder: Path) -> None:
    record = json.loads((folder / "golden.json").read_text())
    assert record["expect"] == "equal", f"{folder.name} is not refused: {record['defect']}"
    expected = {name.removesuffix(".weight"): t for name, t in load_file(folder / "expected.safetensors").items()}
    found = dict(quantized_layers(folder, read_manifest(folder)))
    assert found.keys() == expected.keys()
    for layer, weight in found.items():
        # What its maker computed in bfloat16 is the exact product (4 bits of the code times 8 of the scale) rounded.
        actual = weight.dequantize().to(expected[layer].dtype)
        if record["peer"] == "auto-round" and record["scheme"] == "NVFP4" and record["dialect"] == "auto-round":
            # code * (1 / global) * scale there, code * (scale / global) here: five float32 roundings between them.
            assert ((actual - expected[layer]).abs() <= 5 * 2.0**-24 * expected[layer].abs()).all(), layer
        else:
            assert torch.equal(actual, expected[layer]), layer


@folders(readable())
def test_written_again_every_word_is_the_same(folder: Path) -> None:
    stored = {}
    for path in folder.glob("*.safetensors"):
        if path.name != "expected.safetensors":
            stored |= load_file(path)
    manifest = read_manifest(folder)
    for layer, weight in quantized_layers(folder, manifest):
        for suffix, tensor in manifest.layout_of(layer).to_tensors(weight).items():
            there = stored[f"{layer}.{suffix}"]
            assert there.dtype == tensor.dtype, suffix
            assert torch.equal(there.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), (layer, suffix)


@folders(readable())
def test_its_config_can_be_written(folder: Path) -> None:
    """Every writer reads back what it writes, and says so where it cannot."""
    manifest = read_manifest(folder)
    method = read_config(folder)["quantization_config"]["quant_method"]
    kv_beside_integers = method in ("gptq", "awq") and manifest.kv_cache
    symmetric_awq = method == "awq" and any(scheme.weights.symmetric for scheme in manifest.schemes.values())
    other_tensors = method == "compressed-tensors" and {*manifest.other_layouts.values()} - {COMPRESSED_TENSORS}
    if kv_beside_integers or symmetric_awq or other_tensors:
        with pytest.raises(ManifestError):
            WRITERS[method](manifest)
    else:
        assert WRITERS[method](manifest)["quant_method"] == method


def test_the_state_dict_is_that_of_the_unquantized_model(tmp_path: Path) -> None:
    folder = next((path for path in FOLDERS if path.name == "ar_mixed_lm_head"), None)
    if folder is None:
        pytest.skip("ar_mixed_lm_head is not there; tests/golden/make.sh makes it")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / name, tmp_path / name)
    state = dequantized_state_dict(tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert {name.rpartition(".")[2] for name in state} == {"weight"}
    assert state["lm_head.weight"].ndim == 2
