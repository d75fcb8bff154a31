"""What is in a checkpoint: schemes, bits, sizes and the KV cache's scales."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_autoround.format.manifest import KV_SCALES, verify_tensors
from vllm_autoround.format.reader import read_config, read_manifest, read_tensors


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
    stored: Counter[str] = Counter()  # bytes by quantized layer
    weights: dict[str, int] = {}
    plain = extra = 0  # bytes outside the quantized layers; of them, those that the original does not have
    scale_bytes = 2
    kv_scales: dict[str, list[float]] = {name: [] for name in KV_SCALES}
    names = []
    for name, tensor in read_tensors(folder):
        names.append(name)
        layer, _, suffix = name.rpartition(".")
        if suffix in kv_scales:
            kv_scales[suffix] += tensor.flatten().tolist()
            extra += _size(tensor)
        if layer not in manifest.schemes or suffix == "bias":
            plain += _size(tensor)
            continue
        stored[layer] += _size(tensor)
        if suffix == "weight_shape":
            weights[layer] = int(tensor.prod())
        if suffix == "weight_scale":
            scale_bytes = tensor.element_size()  # the dtype of the original weights
    verify_tensors(manifest, names)

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
        size_bytes=plain + stored.total(),
        original_size_bytes=plain - extra + sum(weights.values()) * scale_bytes,
        kv_cache=manifest.kv_cache,
        kv_scale_ranges={name: (min(values), max(values)) for name, values in kv_scales.items() if values},
        marker=config.get("vllm_autoround"),
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


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bits(layers: list[str], stored: Counter[str], weights: dict[str, int]) -> float:
    return 8 * sum(stored[layer] for layer in layers) / sum(weights[layer] for layer in layers)
