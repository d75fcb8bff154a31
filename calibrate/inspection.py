"""What is in a checkpoint: schemes, bits, sizes and the KV cache's scales."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_autoround.format.manifest import KV_SCALES, MARKER, Manifest
from vllm_autoround.format.reader import TensorHeader, read_config, read_manifest, read_tensors, tensor_headers


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeSummary:
    """All layers of one scheme; 16-bit layers that the blocks keep are not among them."""

    scheme: str
    layers: int
    weights: int
    bits_per_weight: float  # scales and zero points included
    examples: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `inspect` shows."""

    model_type: str
    dialect: str  # the quant_method of its config
    layouts: dict[str, int]  # of the tensors -> layers
    schemes: list[SchemeSummary]
    average_bits: float  # of the quantized layers
    size_bytes: int
    original_size_bytes: int
    kv_cache: str | None
    kv_scale_ranges: dict[str, tuple[float, float]]  # q, k, v scale: least and greatest over the layers
    marker: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """For `inspect --json` and report.json."""
        return asdict(self)


def inspect_checkpoint(folder: Path) -> Inspection:
    """Summarize a checkpoint in any dialect that can be read.

    Raises:
        ManifestError: it cannot be read with certainty, or its tensors are not those that it promises.
    """
    config, manifest = read_config(folder), read_manifest(folder)
    headers = tensor_headers(folder)
    weights = {layer: math.prod(size) for layer, size in _sizes(folder, manifest, headers).items()}
    stored = {layer: 0 for layer in manifest.schemes}
    original = sum(weights.values()) * _bytes_of(config)
    for name, header in headers.items():
        layer, _, suffix = name.rpartition(".")
        if layer in stored and suffix != "bias":
            stored[layer] += header.bytes
        elif suffix not in KV_SCALES:
            original += header.bytes
    kv_scales: dict[str, list[float]] = {suffix: [] for suffix in KV_SCALES}
    for name, tensor in read_tensors(folder, KV_SCALES):
        kv_scales[name.rpartition(".")[2]] += tensor.flatten().tolist()

    layers_of: dict[str, list[str]] = {}
    for layer, scheme in manifest.schemes.items():
        layers_of.setdefault(str(scheme), []).append(layer)
    return Inspection(
        model_type=config.get("model_type", "unknown"),
        dialect=config["quantization_config"]["quant_method"],
        layouts=dict(Counter(map(manifest.layout_name, manifest.schemes))),
        schemes=[
            SchemeSummary(
                scheme=scheme,
                layers=len(layers),
                weights=sum(weights[layer] for layer in layers),
                bits_per_weight=_bits(layers, stored, weights),
                examples=layers[:3],
            )
            for scheme, layers in layers_of.items()
        ],
        average_bits=_bits(list(manifest.schemes), stored, weights),
        size_bytes=sum(header.bytes for header in headers.values()),
        original_size_bytes=original,
        kv_cache=manifest.kv_cache,
        kv_scale_ranges={name: (min(values), max(values)) for name, values in kv_scales.items() if values},
        marker=config.get(MARKER),
    )


def inspection_table(inspection: Inspection) -> str:
    """The table that `inspect` prints."""
    width = max([len(s.scheme) for s in inspection.schemes] + [30]) + 2
    lines = [f"{'scheme':<{width}}{'layers':>8}{'weights':>14}{'bits/weight':>13}  e.g."]
    lines += [
        f"{s.scheme:<{width}}{s.layers:>8}{s.weights:>14,}{s.bits_per_weight:>13.3f}  {s.examples[0]}"
        for s in inspection.schemes
    ]
    layouts = ", ".join(f"{name} ({count} layers)" for name, count in inspection.layouts.items())
    size, original = inspection.size_bytes, inspection.original_size_bytes
    lines += [
        "",
        f"dialect     {inspection.dialect}, tensors {layouts}",
        f"average     {inspection.average_bits:.3f} bits a quantized weight",
        f"size        {size / 1e6:.2f} MB, {original / 1e6:.2f} MB unquantized ({original / size:.2f}x smaller)",
    ]
    if inspection.kv_cache:
        ranges = ", ".join(
            f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in inspection.kv_scale_ranges.items()
        )
        per = "head" if inspection.kv_cache == "fp8_per_head" else "tensor"
        lines.append(f"KV cache    fp8 e4m3, static per {per}: {ranges}")
    else:
        lines.append("KV cache    as the model")
    return "\n".join(lines)


def _sizes(folder: Path, manifest: Manifest, headers: Mapping[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    """Rows and columns of each quantized layer, which packed words alone do not always tell."""
    sizes: dict[str, tuple[int, ...]] = {}
    for layer, scheme in manifest.schemes.items():
        shapes = {suffix: headers[f"{layer}.{suffix}"].shape for suffix in manifest.suffixes(layer)}
        sizes[layer] = manifest.layout_of(layer).size(shapes, scheme)
    stated = {name.rpartition(".")[0]: tuple(t.tolist()) for name, t in read_tensors(folder, (".weight_shape",))}
    return sizes | {layer: size for layer, size in stated.items() if layer in sizes}


def _bytes_of(config: Mapping[str, Any]) -> int:
    """Bytes of one weight of the unquantized model."""
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return 4 if str(dtype).endswith("float32") else 2


def _bits(layers: list[str], stored: dict[str, int], weights: dict[str, int]) -> float:
    """Stored bits a weight; 0 without layers."""
    return 8 * sum(stored[layer] for layer in layers) / max(1, sum(weights[layer] for layer in layers))
