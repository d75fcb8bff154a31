"""Read a checkpoint folder: its manifest, its tensors' headers, and the weights that it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_autoround.format.codec import QuantizedWeight
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import Manifest, from_compressed_tensors


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a quantized checkpoint.

    Raises:
        ManifestError: it is missing, or has no quantization_config.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ManifestError(f"{folder} has no config.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" not in config:
        raise ManifestError(f"{path} has no quantization_config: not a quantized checkpoint")
    return config


def read_manifest(folder: Path) -> Manifest:
    """The manifest in config.json; raises ManifestError for what is not understood."""
    return from_compressed_tensors(read_config(folder)["quantization_config"])


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it.

    Raises:
        ManifestError: there are no safetensors files, or two of them hold the same tensor.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not iterable
                if name in files:
                    raise ManifestError(f"{name} is in {files[name].name} and in {path.name}")
                files[name] = path
    if not files:
        raise ManifestError(f"{folder} has no safetensors files")
    return files


def read_tensors(folder: Path, suffixes: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose names end in one of ``suffixes`` (default: all) with their names, file by file."""
    for path in sorted(set(tensor_files(folder).values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(suffixes):
                    yield name, file.get_tensor(name)


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Tensor name -> bytes, from the files' headers alone."""
    sizes: dict[str, int] = {}
    for path in sorted(set(tensor_files(folder).values())):
        with path.open("rb") as file:  # safetensors: length of the header, 8 bytes little-endian, then JSON
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[name] = end - begin
    return sizes


def dequantized_state_dict(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The unquantized model's state dict that the checkpoint stands for, in ``dtype``; KV-cache scales left out."""
    manifest = read_manifest(folder)
    state: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {layer: {} for layer in manifest.schemes}
    for name, tensor in read_tensors(folder):
        module, _, suffix = name.rpartition(".")
        if module in packed and suffix != "bias":
            packed[module][suffix] = tensor
        elif not suffix.endswith("_scale"):
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for layer, tensors in packed.items():
        weight = QuantizedWeight.from_tensors(tensors, manifest.schemes[layer])
        state[f"{layer}.weight"] = weight.dequantize().to(dtype)
    return state
