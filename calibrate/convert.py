"""Rewrite a quantized checkpoint in another format without calibrating it again: the same weights, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from calibrate.config import CalibrationError
from calibrate.exporters import EXPORTERS, Sink
from calibrate.formats import FORMATS
from calibrate.origin import Origin
from calibrate.partial import PartialFolder, occupied, write_json
from vllm_autoround.format.dialects.modules import left_alone, modules_of
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import KV_SCALES, MARKER, Manifest, verify_tensors
from vllm_autoround.format.reader import TensorHeader, read_config, read_manifest, tensor_files, tensor_headers
from vllm_autoround.format.weights import QuantizedWeight


def convert(source: str | Path, out: str | Path, format: str) -> dict[str, Any]:
    """Write the checkpoint ``source`` once more, as ``out``, in another format.

    Every weight is read back from what was written and compared bit for bit before ``out`` appears.

    Args:
        source: a folder in any dialect that can be read; GGUF cannot.
        format: one of `calibrate.formats.FORMATS`.

    Returns:
        The content of ``out/report.json``: from, to, layers by scheme, kv_cache and bytes.

    Raises:
        CalibrationError: ``out`` is taken; the format cannot hold this checkpoint exactly: names layer, value, reason.
        ManifestError: ``source`` cannot be read with certainty.
    """
    out = Path(out).resolve()
    if format not in FORMATS:
        raise CalibrationError(f"format {format!r} is unknown; known are {', '.join(FORMATS)}")
    if problem := occupied(out):
        raise CalibrationError(problem)
    with _Checkpoint(Path(source)) as original, PartialFolder(out) as partial:
        exporter, origin = EXPORTERS[format], original.origin
        manifest = replace(original.manifest, ignore=original.unquantized(), kv_scales=KV_SCALES)
        shapes = {layer: original.shape(layer) for layer in manifest.schemes}
        if problems := exporter.problems(manifest, shapes, origin):
            raise CalibrationError("\n".join(f"{source} cannot be converted: {problem}" for problem in problems))
        sink = exporter.open(partial.path, manifest, origin)
        original.write(sink)
        sink.finish({**original.provenance, "converted_from": original.method})
        missing = original.names()
        for name, tensor in exporter.read_back(partial.path, manifest, origin, sorted(missing)):
            missing.discard(name)
            if not torch.equal(tensor.float(), original.tensor(name).float()):
                raise CalibrationError(f"{source} does not survive as {format}: {name} reads back with other values")
        if missing:
            raise CalibrationError(f"{source} does not survive as {format}: {min(missing)} is lost")
        report = {
            "from": original.method,
            "to": format,
            "layers": dict(Counter(map(str, manifest.schemes.values()))),
            "kv_cache": manifest.kv_cache,
            "bytes": sum(path.stat().st_size for path in partial.path.rglob("*") if path.is_file()),
        }
        write_json(partial.path / "report.json", report)
        partial.publish()
    return report


class _Checkpoint:
    """A quantized checkpoint on disk, by tensor; open inside its context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        config = read_config(self.folder)
        self.manifest = read_manifest(self.folder)
        self._headers = tensor_headers(self.folder)
        verify_tensors(self.manifest, self._headers)
        self._files = tensor_files(self.folder)
        self._added = _missing_query_scales(self.manifest, self._headers, config)
        self._open = {
            path: self._stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(set(self._files.values()))
        }
        self.method: str = config["quantization_config"]["quant_method"]
        self.provenance: dict[str, Any] = {
            key: value for key, value in config.get(MARKER, {}).items() if key != "format_version"
        }
        plain = {key: value for key, value in config.items() if key not in ("quantization_config", MARKER)}
        self.origin = Origin(self.folder, plain)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """What the checkpoint stands for: a weight for each quantized layer, and every other tensor."""
        return {f"{layer}.weight" for layer in self.manifest.schemes} | self._others() | self._added.keys()

    def tensor(self, name: str) -> Tensor:
        """A tensor of `names`; quantized weights dequantized, in float32."""
        layer = name.removesuffix(".weight")
        return self.weight(layer).dequantize() if layer in self.manifest.schemes else self._stored(name)

    def weight(self, layer: str) -> QuantizedWeight:
        """A quantized layer.

        Raises:
            ManifestError: its tensors cannot be what was meant.
        """
        tensors = {suffix: self._stored(f"{layer}.{suffix}") for suffix in self.manifest.suffixes(layer)}
        try:
            return self.manifest.layout_of(layer).from_tensors(tensors, self.manifest.schemes[layer])
        except ValueError as error:
            raise ManifestError(f"{layer}: {error}") from error

    def shape(self, layer: str) -> tuple[int, int]:
        """[rows, columns] of a quantized layer."""
        shapes = {suffix: self._headers[f"{layer}.{suffix}"].shape for suffix in self.manifest.suffixes(layer)}
        return self.manifest.layout_of(layer).size(shapes, self.manifest.schemes[layer])

    def unquantized(self) -> tuple[str, ...]:
        """The linear layers that stay as they are, lm_head among them also where it shares the embedding's weight."""
        modules = modules_of({name: self._headers[name].shape for name in self._others()})
        return tuple(sorted({*left_alone(modules), *self.manifest.ignore, "lm_head"} - self.manifest.schemes.keys()))

    def write(self, sink: Sink) -> None:
        """Hand everything to an exporter, one part for each file of the original."""
        unseen = dict.fromkeys(self.manifest.schemes)
        for path in self._open:
            names = [name for name, file in self._files.items() if file == path]
            layers = [layer for layer in dict.fromkeys(name.rpartition(".")[0] for name in names) if layer in unseen]
            for layer in layers:
                del unseen[layer]
            others = {name: self._stored(name) for name in names if name in self._others()}
            others |= {name: self._added[name] for name in map(_query_scale, names) if name in self._added}
            sink.write_part(path.stem, {layer: self.weight(layer) for layer in layers}, others)

    def _others(self) -> set[str]:
        """Tensors as they are: not the quantized layers' own, but the scales of their activations."""
        own = {
            f"{layer}.{suffix}"
            for layer, scheme in self.manifest.schemes.items()
            for suffix in self.manifest.suffixes(layer)
            if scheme.activations is None or suffix != scheme.activations.static
        }
        return self._headers.keys() - own

    def _stored(self, name: str) -> Tensor:
        if name in self._added:
            return self._added[name]
        tensor: Tensor = self._open[self._files[name]].get_tensor(name)
        return tensor


def _missing_query_scales(
    manifest: Manifest, headers: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The scales of the queries that other tools leave out, by name: vLLM takes them for 1 then, and ours say so."""
    shape = (1,) if manifest.kv_cache == "fp8" else (config.get("num_attention_heads", 0), 1, 1)
    keys = [name for name in headers if name.endswith(".k_scale")]
    return {_query_scale(name): torch.ones(shape) for name in keys if _query_scale(name) not in headers}


def _query_scale(key_scale: str) -> str:
    """The name that belongs to a k_scale's; any other name as it is."""
    return f"{key_scale.removesuffix('.k_scale')}.q_scale" if key_scale.endswith(".k_scale") else key_scale
