"""The matrix of what is served: every scheme in every dialect that can say it, as every class of vLLM's layers, on one
rank and on two.

What a dialect can say is asked from its own writer and reader, so that a new scheme, layout or dialect is in the matrix
without a line here. A case has all layouts of its dialect, and the group sizes of its scheme take turns: each of them
meets every layout, and every class of layer, but not every combination of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vllm_autoround.format.dialects import auto_round, awq, compressed_tensors, gptq, read_manifest
from vllm_autoround.format.layouts import LAYOUTS
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Float8
from vllm_autoround.format.weights.integer import GROUP_SIZES, MAX_BITS, MIN_BITS

from .layers import KINDS, VOCABULARY, WIDE_KINDS, Kind, Stored, embedding, head, stored

DIALECTS = {dialect.METHOD: dialect for dialect in (compressed_tensors, auto_round, gptq, awq)}
WHOLE_WORDS = 480  # a vocabulary that fills the words of GPTQ and AWQ; not a multiple of 64 either

_INTEGERS = [f"W{bits}A16{zeros}" for zeros in ("", "_ASYM") for bits in range(MIN_BITS, MAX_BITS + 1)]
_NAMES = {scheme: name for name, scheme in reversed(NAMED_SCHEMES.items())}  # the first of two names for one scheme
# Name -> what it stands for, by group size.
FAMILIES = {name: [QuantScheme.parse(name, size) for size in (*GROUP_SIZES, -1)] for name in _INTEGERS}
FAMILIES |= {name: [scheme] for name, scheme in NAMED_SCHEMES.items() if _NAMES[scheme] == name}


@dataclass(frozen=True)
class Case:
    """A cell of the matrix."""

    family: str
    dialect: str
    label: str  # of the class of layer
    ranks: int

    def __str__(self) -> str:
        return f"{self.family}-{self.dialect}-{self.label}-tp{self.ranks}"

    def contents(self) -> list[tuple[str, QuantScheme, Kind]]:
        """Layout, scheme and layer of everything in the cell."""
        contents = []
        for index, (layout, schemes) in enumerate(held(self.family, self.dialect).items()):
            labels = [kind.label for kind in kinds(self.dialect, schemes[0])]
            place = labels.index(self.label)
            scheme = schemes[(index + place + 3 * self.ranks) % len(schemes)]
            contents.append((layout, scheme, kinds(self.dialect, scheme)[place]))
        return contents


def kinds(dialect: str, scheme: QuantScheme) -> list[Kind]:
    """Every class of layer that can have a scheme, in a size that suits both."""
    rows = VOCABULARY if dialect == compressed_tensors.METHOD else WHOLE_WORDS
    linear = WIDE_KINDS if scheme.weights == Float8(strategy="block") else KINDS
    return [*linear, head(rows), *([] if scheme.activations else [embedding(rows)])]  # a lookup has no activations


@cache
def held(family: str, dialect: str) -> dict[str, list[QuantScheme]]:
    """Layout -> the schemes of a family that a dialect can have in it."""
    found = {layout: [scheme for scheme in FAMILIES[family] if _holds(dialect, layout, scheme)] for layout in LAYOUTS}
    return {layout: schemes for layout, schemes in found.items() if schemes}


def _holds(dialect: str, layout: str, scheme: QuantScheme) -> bool:
    name = "layers.0.fc1"
    try:
        manifest = manifest_of(dialect, {name: replace(_example(scheme), layout=layout)})
    except (ValueError, KeyError):  # of the writer, the layout or the reader
        return False
    return manifest.schemes == {name: scheme} and manifest.layout_name(name) == layout


@cache
def _example(scheme: QuantScheme) -> Stored:
    """A layer whose zero points every layout can store."""
    return stored(scheme, 32, layout="gptq")


def manifest_of(dialect: str, layers: Mapping[str, Stored]) -> Manifest:
    """What the reader finds in a checkpoint of these layers, all in one layout, whose config the writer wrote."""
    (layout,) = {layer.layout for layer in layers.values()}
    config = _config(dialect, layout, {name: layer.scheme for name, layer in layers.items() if layer.scheme})
    shapes = {f"{name}.{key}": tuple(t.shape) for name, layer in layers.items() for key, t in layer.tensors().items()}
    return read_manifest(config, shapes)


def _config(dialect: str, layout: str, schemes: Mapping[str, QuantScheme]) -> dict[str, Any]:
    if dialect != compressed_tensors.METHOD:
        return DIALECTS[dialect].write_config(Manifest(schemes=schemes, layout=layout))
    config = compressed_tensors.write_config(Manifest(schemes=schemes))
    if layout == "padded":  # as releases before 0.18 write it
        config["version"] = "0.17.0"
    if layout == "int-quantized":  # as llm-compressor may
        for group in config["config_groups"].values():
            group["format"] = layout
    return config


CASES = [
    Case(family, dialect, kind.label, ranks)
    for family, schemes in FAMILIES.items()
    for dialect in DIALECTS
    if held(family, dialect)
    for kind in kinds(dialect, schemes[0])
    for ranks in (1, 2)
]
