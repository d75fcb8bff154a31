"""Read a checkpoint folder: its manifest, its tensors' headers, and the weights that it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_autoround.format import dialects
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import KV_SCALES, MARKER, Manifest
from vllm_autoround.format.weights import QuantizedWeight


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
    """The manifest of a checkpoint in any dialect, compared with the names and shapes of its tensors.

    Raises:
        ManifestError: what is not understood, or does not fit.
    """
    config = read_config(folder)
    shapes = {name: entry.shape for name, entry in tensor_headers(folder).items()}
    manifest = dialects.read_manifest(config["quantization_config"], shapes)
    if MARKER in config and manifest.kv_cache and manifest.kv_scales != KV_SCALES:
        raise ManifestError(f"{folder} has KV-cache scales without q_scale, which our checkpoints always have")
    return manifest


class TensorHeader(NamedTuple):
    """What a safetensors file says of a tensor before its data."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: BF16, I32, F8_E4M3 ...
    bytes: int


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


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Tensor name -> header, without reading any data."""
    headers: dict[str, TensorHeader] = {}
    for path in sorted(set(tensor_files(folder).values())):
        with path.open("rb") as file:  # safetensors: length of the header, 8 bytes little-endian, then JSON
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                headers[name] = TensorHeader(tuple(entry["shape"]), entry["dtype"], end - begin)
    return headers


def quantized_layers(folder: Path, manifest: Manifest) -> Iterator[tuple[str, QuantizedWeight]]:
    """Every quantized layer's full name and weight, file by file.

    Raises:
        ManifestError: a layer whose tensors are not those of its scheme, or cannot be what was meant.
    """
    waiting: dict[str, dict[str, Tensor]] = {layer: {} for layer in manifest.schemes}
    needed = {layer: manifest.suffixes(layer) for layer in manifest.schemes}
    for name, tensor in read_tensors(folder):
        layer, _, suffix = name.rpartition(".")
        if suffix in needed.get(layer, ()):
            waiting[layer][suffix] = tensor
            if waiting[layer].keys() == needed[layer]:
                try:
                    weight = manifest.layout_of(layer).from_tensors(waiting.pop(layer), manifest.schemes[layer])
                except ValueError as error:
                    raise ManifestError(f"{layer}: {error}") from error
                yield layer, weight
    if waiting:
        raise ManifestError(f"{next(iter(waiting))} lacks some of its tensors")


def dequantized_state_dict(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The unquantized model's state dict that the checkpoint stands for, in ``dtype``; KV-cache scales left out."""
    manifest = read_manifest(folder)
    promised = manifest.layer_tensors()
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in read_tensors(folder)
        if name not in promised and name.rpartition(".")[2] not in KV_SCALES
    }
    for layer, weight in quantized_layers(folder, manifest):
        state[f"{layer}.weight"] = weight.dequantize().to(dtype)
    return state
