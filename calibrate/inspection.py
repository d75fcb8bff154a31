"""What is in a checkpoint: schemes, bits, sizes and the KV cache's scales."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_autoround.format.manifest import KV_SCALES, MARKER, verify_tensors
from vllm_autoround.format.reader import read_config, read_manifest, read_tensors, tensor_bytes


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
    """Summarize a checkpoint.

    Raises:
        ManifestError: it cannot be read with certainty, or its tensors are not those that it promises.
    """
    config, manifest = read_config(folder), read_manifest(folder)
    sizes = tensor_bytes(folder)
    verify_tensors(manifest, sizes)
    shapes = {name.rpartition(".")[0]: t.tolist() for name, t in read_tensors(folder, (".weight_shape",))}
    weights = {layer: math.prod(shapes[layer]) for layer in manifest.schemes}
    stored = {layer: 0 for layer in manifest.schemes}
    original = 0
    for name, size in sizes.items():
        layer, _, suffix = name.rpartition(".")
        if layer not in stored or suffix == "bias":
            original += 0 if suffix in KV_SCALES else size
            continue
        stored[layer] += size
        if suffix == "weight_scale":  # in the dtype of the weights
            rows, columns = shapes[layer]
            original += weights[layer] * size // (rows * manifest.schemes[layer].groups(columns))
    kv_scales: dict[str, list[float]] = {suffix: [] for suffix in KV_SCALES}
    for name, tensor in read_tensors(folder, KV_SCALES):
        kv_scales[name.rpartition(".")[2]] += tensor.flatten().tolist()

    layers_of: dict[str, list[str]] = {}
    for layer, scheme in manifest.schemes.items():
        layers_of.setdefault(str(scheme), []).append(layer)
    return Inspection(
        model_type=config.get("model_type", "unknown"),
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
        size_bytes=sum(sizes.values()),
        original_size_bytes=original,
        kv_cache=manifest.kv_cache,
        kv_scale_ranges={name: (min(values), max(values)) for name, values in kv_scales.items() if values},
        marker=config.get(MARKER),
    )


def inspection_table(inspection: Inspection) -> str:
    """The table that `inspect` prints."""
    lines = [f"{'scheme':<32}{'layers':>8}{'weights':>14}{'bits/weight':>13}  e.g."]
    lines += [
        f"{s.scheme:<32}{s.layers:>8}{s.weights:>14,}{s.bits_per_weight:>13.3f}  {s.examples[0]}"
        for s in inspection.schemes
    ]
    size, original = inspection.size_bytes, inspection.original_size_bytes
    lines += [
        "",
        f"average     {inspection.average_bits:.3f} bits a quantized weight",
        f"size        {size / 1e6:.2f} MB, {original / 1e6:.2f} MB unquantized ({original / size:.2f}x smaller)",
    ]
    if inspection.kv_cache:
        ranges = ", ".join(
            f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in inspection.kv_scale_ranges.items()
        )
        lines.append(f"KV cache    {inspection.kv_cache} e4m3, static per tensor: {ranges}")
    else:
        lines.append("KV cache    as the model")
    return "\n".join(lines)


def _bits(layers: list[str], stored: dict[str, int], weights: dict[str, int]) -> float:
    """Stored bits a weight; 0 without layers."""
    return 8 * sum(stored[layer] for layer in layers) / max(1, sum(weights[layer] for layer in layers))
