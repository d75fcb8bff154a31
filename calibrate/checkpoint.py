"""Write a checkpoint: one part a block as soon as it is finished, then everything else, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from calibrate.blocks import Block
from calibrate.exporters import EXPORTERS, Sink
from calibrate.formats import subfolder
from calibrate.origin import Origin, Shapes
from calibrate.partial import PARTIAL_MARK, PartialFolder, partial_folder, write_json
from calibrate.source import Source
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.weights import Integer, QuantizedWeight

__all__ = ["PARTIAL_MARK", "CheckpointWriter", "format_problems", "partial_folder"]


def format_problems(formats: Sequence[str], manifest: Manifest, source: Source) -> list[str]:
    """What the formats cannot say of this model, quantized like that, each with its way out; asked before tuning."""
    dtype = source.model.dtype
    shapes: Shapes = {layer: _shape(source.model.get_submodule(layer)) for layer in manifest.schemes}
    origin = Origin(source.folder, source.config)
    problems = [problem for name in formats for problem in EXPORTERS[name].problems(manifest, shapes, origin)]
    if any(isinstance(scheme.weights, Integer) for scheme in manifest.schemes.values()):
        problems += [
            f"{name} cannot hold {_name(dtype)} scales without rounding them; save the model in "
            f"{' or '.join(map(_name, EXPORTERS[name].scale_dtypes))} first"
            for name in formats
            if dtype not in EXPORTERS[name].scale_dtypes
        ]
    return problems


class CheckpointWriter:
    """Collects a checkpoint, in one or more formats, in `partial_folder` and renames that to ``out`` once it is whole.

    One format is written into ``out`` itself, several into a folder of ``out`` each (`folders`).
    """

    def __init__(
        self,
        out: Path,
        source: Source,
        blocks: Sequence[Block],
        manifest: Manifest,
        formats: Sequence[str] = ("compressed-tensors",),
    ) -> None:
        self.out = out
        self.partial = partial_folder(out)
        self.folders = {name: self.partial if len(formats) == 1 else self.partial / subfolder(name) for name in formats}
        self._folder = PartialFolder(out)
        self._source, self._blocks, self._manifest = source, blocks, manifest
        self._sinks: list[Sink] = []
        self._outside: tuple[Mapping[str, QuantizedWeight], Mapping[str, Tensor]] = ({}, {})

    def __enter__(self) -> Self:
        self._folder.__enter__()
        config = dict(self._source.config)
        if self._untied():
            config["tie_word_embeddings"] = False
        origin = Origin(self._source.folder, config)
        for name, folder in self.folders.items():
            folder.mkdir(exist_ok=True)
            self._sinks.append(EXPORTERS[name].open(folder, self._manifest, origin))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.__exit__(kind, error, trace)

    def write_block(self, index: int, weights: Mapping[str, QuantizedWeight], scales: Mapping[str, Tensor]) -> None:
        """Write block ``index``: its quantized layers, and its other tensors as they were.

        Args:
            weights: by layer name relative to the block.
            scales: of activations and KV cache, by the tensor's full name.

        Raises:
            CalibrationError: a value that a format cannot hold, by name.
        """
        block = self._blocks[index]
        replaced = {f"{name}.weight" for name in weights}
        others = {
            f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items() if name not in replaced
        }
        self._write_part(
            index, {f"{block.name}.{name}": weight for name, weight in weights.items()}, others | {**scales}
        )

    def write_outside(self, weights: Mapping[str, QuantizedWeight], scales: Mapping[str, Tensor]) -> None:
        """Take the quantized layers that are in no block, by full name, and their scales, by the tensor's full name."""
        self._outside = weights, scales

    def complete(self, provenance: Mapping[str, Any]) -> None:
        """Write what is outside the blocks, and what each format has beside the tensors.

        Raises:
            ManifestError: the tensors written are not those that the manifest promises.
        """
        weights, scales = self._outside
        replaced = {f"{layer}.weight" for layer in weights}
        others = {name: t for name, t in self._tensors_outside_blocks().items() if name not in replaced}
        self._write_part(len(self._blocks), weights, others | {**scales})
        for sink in self._sinks:
            sink.finish(provenance)

    def publish(self, report: Mapping[str, Any]) -> None:
        """Write report.json and give the folder its final name.

        Raises:
            CalibrationError: the name was taken in the meantime; says where the checkpoint is.
        """
        write_json(self.partial / "report.json", report)
        self._folder.publish()

    def _write_part(self, index: int, weights: Mapping[str, QuantizedWeight], others: Mapping[str, Tensor]) -> None:
        for sink in self._sinks:
            sink.write_part(f"model-{index + 1:05d}-of-{len(self._blocks) + 1:05d}", weights, others)

    def _tensors_outside_blocks(self) -> dict[str, Tensor]:
        """Shared parameters once, under their first name: a tied lm_head is not written, as in the original, unless
        one of the two is quantized."""
        model, inside = self._source.model, tuple(f"{block.name}." for block in self._blocks)
        state = model.state_dict()
        names = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
        names += [f"{head}.weight" for head in self._untied()]
        return {
            name: state[name].clone() if name.removesuffix(".weight") in self._untied() else state[name]
            for name in names
            if name in state and not name.startswith(inside)
        }

    def _untied(self) -> list[str]:
        """The output embedding's name, if it shares the input embedding's weight and one of them is quantized."""
        model = self._source.model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or head.weight is not embedding.weight:
            return []
        names = {module: name for name, module in model.named_modules()}
        pair = {names[head], names[embedding]}
        return [names[head]] if pair & self._manifest.schemes.keys() else []


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = cast(Tensor, module.weight).shape
    return rows, columns


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
