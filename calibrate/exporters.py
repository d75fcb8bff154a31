"""Exporters: how each format keeps a quantized model, behind one interface; a new format is one row of `EXPORTERS`.

What cannot be said in a format is refused before tuning (`Exporter.problems`), or, where it depends on the values, when
the layer is written: an exporter never rounds a scale, a zero point or a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from calibrate.config import CalibrationError
from calibrate.formats import FORMATS
from calibrate.gguf import Gguf
from calibrate.origin import Origin, Shapes, exactly
from calibrate.partial import copy, save_tensors, write_json
from calibrate.source import FOREIGN_WEIGHTS
from vllm_autoround.format.dialects import auto_round, awq, compressed_tensors, gptq
from vllm_autoround.format.dialects.modules import manifest_of
from vllm_autoround.format.errors import ManifestError, SchemeError
from vllm_autoround.format.layouts import COMPRESSED_TENSORS
from vllm_autoround.format.manifest import FORMAT_VERSION, MARKER, Manifest, verify_tensors
from vllm_autoround.format.reader import quantized_layers, read_manifest, read_tensors
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Float8, Integer, QuantizedWeight

_SUBFOLDERS = ("additional_chat_templates",)
_AUTO_ROUND_FLOATS = {NAMED_SCHEMES[name]: name for name in ("FP8_STATIC", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8")}
_NOT_COPIED = ("config.json", ".*", "*.safetensors", "*.index.json", "report.json", "gate.json")


class Sink(Protocol):
    """A checkpoint that is being written, part by part."""

    def write_part(self, name: str, weights: Mapping[str, QuantizedWeight], tensors: Mapping[str, Tensor]) -> None:
        """Write one part of the model.

        Args:
            name: of the part; the parts' order does not matter.
            weights: quantized layers by full name.
            tensors: every other tensor by full name: unquantized ones, and the scales of activations and KV cache.

        Raises:
            CalibrationError: a value that the format cannot hold, by name.
        """
        ...

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Write everything that goes with the tensors.

        Raises:
            ManifestError: the tensors written are not those that the manifest promises.
        """
        ...


class Exporter(Protocol):
    """One format."""

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of which the format holds every scale of integer weights that we make."""
        ...

    def problems(self, manifest: Manifest, shapes: Shapes, origin: Origin) -> list[str]:
        """What the format cannot say of this model, each with its way out.

        Args:
            shapes: [rows, columns] of every quantized layer by full name.
        """
        ...

    def open(self, folder: Path, manifest: Manifest, origin: Origin) -> Sink:
        """Start writing a checkpoint into an empty folder."""
        ...

    def read_back(
        self, folder: Path, manifest: Manifest, origin: Origin, names: Iterable[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """What a written checkpoint stands for, as far as it has these names: quantized weights in float32.

        Raises:
            CalibrationError: it reads as another manifest.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A format of safetensors files and a config.json."""

    name: str
    layout: Callable[[Manifest, QuantScheme], str]  # the layout of a layer of that scheme
    write_config: Callable[[Manifest], dict[str, Any]]
    check_layer: Callable[[QuantScheme, int, int], str | None] = lambda scheme, rows, columns: None
    kv_cache: bool = True  # whether its readers know KV-cache scales
    float16_scales: bool = False  # of integer weights

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        return (
            (torch.bfloat16, torch.float16) if self.float16_scales else (torch.bfloat16, torch.float16, torch.float32)
        )

    def problems(self, manifest: Manifest, shapes: Shapes, origin: Origin) -> list[str]:
        problems: list[str] = []
        reasons: dict[str, list[str]] = {}
        for layer, scheme in manifest.schemes.items():
            if reason := self.check_layer(scheme, *shapes[layer]):
                reasons.setdefault(reason, []).append(layer)
        for reason, layers in reasons.items():
            problems.append(f"{self.name}: {reason} ({len(layers)} layers, the first is {layers[0]})")
        if manifest.kv_cache and not self.kv_cache:
            problems.append(f"{self.name} has no place for KV-cache scales; leave --kv-cache out or use another format")
        if not problems:
            try:
                self.write_config(self.manifest(manifest))
            except (ManifestError, SchemeError) as error:
                problems.append(f"{self.name}: {error}")
        return problems

    def manifest(self, manifest: Manifest) -> Manifest:
        """The manifest of the checkpoint in this format."""
        layers = {layer: (scheme, self.layout(manifest, scheme)) for layer, scheme in manifest.schemes.items()}
        rest = {"ignore": manifest.ignore, "kv_cache": manifest.kv_cache, "kv_scales": manifest.kv_scales}
        return manifest_of(layers, **rest)

    def open(self, folder: Path, manifest: Manifest, origin: Origin) -> Sink:
        return _FolderSink(self, folder, self.manifest(manifest), origin)

    def read_back(
        self, folder: Path, manifest: Manifest, origin: Origin, names: Iterable[str]
    ) -> Iterator[tuple[str, Tensor]]:
        found = read_manifest(folder)
        if found.schemes != manifest.schemes or found.kv_cache != manifest.kv_cache:
            raise CalibrationError(f"{self.name} reads back as {_summary(found)}, not as {_summary(manifest)}")
        wanted = set(names) - {f"{layer}.weight" for layer in found.schemes}
        yield from ((name, tensor) for name, tensor in read_tensors(folder) if name in wanted)
        for layer, weight in quantized_layers(folder, found):
            yield f"{layer}.weight", weight.dequantize()

    def layer_tensors(self, layer: str, weight: QuantizedWeight, manifest: Manifest) -> dict[str, Tensor]:
        """One layer's tensors by suffix.

        Raises:
            CalibrationError: a value that the format cannot hold, by name.
        """
        if self.float16_scales and isinstance(weight.type, Integer):
            weight = replace(weight, scale=exactly(weight.scale, torch.float16, f"{self.name}: {layer}: scale"))
        try:
            return manifest.layout_of(layer).to_tensors(weight)
        except ValueError as error:
            raise CalibrationError(f"{self.name}: {layer}: {error}") from error


class _FolderSink:
    """Writes a `Folder`."""

    def __init__(self, exporter: Folder, folder: Path, manifest: Manifest, origin: Origin) -> None:
        self._exporter, self._folder, self._manifest, self._origin = exporter, folder, manifest, origin
        self._files: dict[str, str] = {}  # tensor -> file
        self._bytes = 0

    def write_part(self, name: str, weights: Mapping[str, QuantizedWeight], tensors: Mapping[str, Tensor]) -> None:
        written = dict(tensors)
        for layer, weight in weights.items():
            for suffix, tensor in self._exporter.layer_tensors(layer, weight, self._manifest).items():
                written[f"{layer}.{suffix}"] = tensor
        file = f"{name}.safetensors"
        save_tensors(self._folder / file, written)
        self._files.update(dict.fromkeys(written, file))
        self._bytes += sum(tensor.nbytes for tensor in written.values())

    def finish(self, provenance: Mapping[str, Any]) -> None:
        verify_tensors(self._manifest, self._files)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._files.items()))}
        write_json(self._folder / "model.safetensors.index.json", index)
        copy_other_files(self._origin.folder, self._folder)
        config = {
            **self._origin.config,
            "quantization_config": self._exporter.write_config(self._manifest),
            MARKER: {"format_version": FORMAT_VERSION, **provenance},
        }
        write_json(self._folder / "config.json", config)


def copy_other_files(source: Path, target: Path) -> None:
    """Tokenizer, generation config, chat templates, licence: all small files beside the weights, unchanged."""
    skipped = (*_NOT_COPIED, *FOREIGN_WEIGHTS)
    for path in sorted([*source.iterdir(), *(file for name in _SUBFOLDERS for file in (source / name).glob("*"))]):
        if path.is_file() and not any(path.match(pattern) for pattern in skipped):
            copy(path, target / path.relative_to(source))


def _summary(manifest: Manifest) -> str:
    counts = Counter(map(str, manifest.schemes.values()))
    return f"{', '.join(f'{n} layers of {scheme}' for scheme, n in counts.items())} with KV cache {manifest.kv_cache}"


def _integers_in_words(scheme: QuantScheme, rows: int, columns: int) -> str | None:
    """Why the layouts of GPTQ and AWQ cannot hold a layer."""
    if scheme.activations is not None:
        return f"{scheme} cannot be said, activations stay in 16 bits; use compressed-tensors"
    if rows % 32 or columns % 32:
        return f"a layer of {rows} x {columns} is not made of whole words, 32 x 32 weights; ignore it"
    return None


def _auto_round_layer(scheme: QuantScheme, rows: int, columns: int) -> str | None:
    if isinstance(scheme.weights, Integer):
        return _integers_in_words(scheme, rows, columns)
    if scheme not in _AUTO_ROUND_FLOATS:
        return f"no reader takes {scheme}, only integer weights and {', '.join(_AUTO_ROUND_FLOATS.values())}"
    return None


def _auto_round_layout(manifest: Manifest, scheme: QuantScheme) -> str:
    """auto-round has one packing for all layers; it reads asymmetric ones of any width in GPTQ's second version only,
    and stock vLLM in AWQ's only."""
    if isinstance(scheme.weights, Float8):
        return "fp8_block" if scheme.weights.strategy == "block" else "fp8_static"
    if not isinstance(scheme.weights, Integer):
        return COMPRESSED_TENSORS
    integers = [found.weights for found in manifest.schemes.values() if isinstance(found.weights, Integer)]
    if all(type_.symmetric for type_ in integers):
        return "gptq"
    if all(type_.bits == 4 and not type_.symmetric and type_.group_size for type_ in integers):
        return "awq"
    return "gptq_v2"


def _gptq_layer(scheme: QuantScheme, rows: int, columns: int) -> str | None:
    if not isinstance(scheme.weights, Integer) or scheme.weights.bits not in (2, 3, 4, 8):
        return f"takes integer weights of 2, 3, 4 or 8 bits, not {scheme}; use compressed-tensors or auto_round"
    return _integers_in_words(scheme, rows, columns)


def _gptq_layout(manifest: Manifest, scheme: QuantScheme) -> str:
    """Symmetric models as every reader knows them; others so that a zero point of 0 can be said."""
    return "gptq+g_idx" if all(found.weights.symmetric for found in manifest.schemes.values()) else "gptq_v2+g_idx"


def _awq_layer(scheme: QuantScheme, rows: int, columns: int) -> str | None:
    type_ = scheme.weights
    if not isinstance(type_, Integer) or type_.bits != 4 or type_.symmetric or type_.group_size is None:
        return f"takes 4 bits, asymmetric, in groups, not {scheme}; use W4A16_ASYM or another format"
    return _integers_in_words(scheme, rows, columns)


EXPORTERS: dict[str, Exporter] = {
    "compressed-tensors": Folder(
        name="compressed-tensors",
        layout=lambda manifest, scheme: COMPRESSED_TENSORS,
        write_config=compressed_tensors.write_config,
    ),
    "auto_round": Folder(
        name="auto_round",
        layout=_auto_round_layout,
        write_config=auto_round.write_config,
        check_layer=_auto_round_layer,
        float16_scales=True,
    ),
    "auto_gptq": Folder(
        name="auto_gptq",
        layout=_gptq_layout,
        write_config=gptq.write_config,
        check_layer=_gptq_layer,
        kv_cache=False,
        float16_scales=True,
    ),
    "auto_awq": Folder(
        name="auto_awq",
        layout=lambda manifest, scheme: "awq",
        write_config=awq.write_config,
        check_layer=_awq_layer,
        kv_cache=False,
        float16_scales=True,
    ),
    "gguf:q4_0": Gguf(name="gguf:q4_0", symmetric=True),
    "gguf:q4_1": Gguf(name="gguf:q4_1", symmetric=False),
}
assert tuple(EXPORTERS) == FORMATS
