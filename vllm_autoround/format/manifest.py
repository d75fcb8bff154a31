"""Manifest: which layer of a checkpoint is quantized how, whatever dialect says so; and the check of its promises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.layouts import COMPRESSED_TENSORS, LAYOUTS, Layout
from vllm_autoround.format.scheme import QuantScheme

MARKER = "vllm_autoround"  # our key at the top level of config.json
FORMAT_VERSION = 2  # 1: integer weights only
KV_SCALES = ("k_scale", "v_scale", "q_scale")

KVCache = Literal["fp8", "fp8_per_head"]  # e4m3 with one static scale per tensor, or one per attention head

# Tensors that only quantized layers have; "weight" is one of theirs too, but not theirs alone.
_QUANTIZED_SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Layer -> scheme, the layout of their tensors, and the scheme of the KV cache."""

    schemes: Mapping[str, QuantScheme]  # full module name -> scheme
    ignore: tuple[str, ...] = ()  # linear layers left as they were
    kv_cache: KVCache | None = None
    kv_scales: tuple[str, ...] = KV_SCALES  # of each attention layer with one, if kv_cache; other tools leave q out
    layout: str = COMPRESSED_TENSORS  # of the layers in `LAYOUTS`
    other_layouts: Mapping[str, str] = field(default_factory=dict)  # layer -> layout, where it is another

    def layout_of(self, layer: str) -> Layout:
        """The layout of a layer's tensors."""
        return LAYOUTS[self.layout_name(layer)]

    def layout_name(self, layer: str) -> str:
        """Its key in `LAYOUTS`."""
        return self.other_layouts.get(layer, self.layout)

    def layer_tensors(self) -> set[str]:
        """Names of every tensor that the quantized layers need."""
        return {f"{layer}.{suffix}" for layer in self.schemes for suffix in self.suffixes(layer)}

    def suffixes(self, layer: str) -> set[str]:
        """Suffixes of the tensors that a quantized layer needs."""
        return set(self.layout_of(layer).specs(self.schemes[layer], 1, 1, torch.bfloat16))


def verify_tensors(manifest: Manifest, names: Collection[str]) -> None:
    """Compare the tensors of a checkpoint with what its manifest promises, by name.

    Raises:
        ManifestError: a promised tensor that is missing, a quantized one that no layer claims, an attention layer
            with only some of its scales, or KV-cache scales without a KV-cache scheme.
    """
    needed, found = manifest.layer_tensors(), set(names)
    if missing := sorted(needed - found):
        raise ManifestError(f"{len(missing)} promised tensors are missing, the first is {missing[0]}")
    quantized = {name for name in found if name.rpartition(".")[2] in _QUANTIZED_SUFFIXES}
    if unclaimed := sorted(quantized - needed):
        raise ManifestError(f"{len(unclaimed)} tensors belong to no quantized layer, the first is {unclaimed[0]}")

    scales = {name for name in found if name.rpartition(".")[2] in KV_SCALES}
    if scales and not manifest.kv_cache:
        raise ManifestError(f"{min(scales)} is there but kv_cache_scheme is not: the scales would find no home")
    if manifest.kv_cache and not scales:
        raise ManifestError("kv_cache_scheme promises KV-cache scales, but there are none")
    for attention in sorted({name.rpartition(".")[0] for name in scales}):
        if missing := [scale for scale in manifest.kv_scales if f"{attention}.{scale}" not in scales]:
            raise ManifestError(f"{attention} has KV-cache scales but lacks {' and '.join(missing)}")
