"""Write a checkpoint: one safetensors shard a block as soon as it is finished, then everything else, all or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from safetensors.torch import save_file
from torch import Tensor

from calibrate.blocks import Block
from calibrate.config import CalibrationError
from calibrate.source import FOREIGN_WEIGHTS, Source
from vllm_autoround.format.codec import QuantizedWeight
from vllm_autoround.format.manifest import FORMAT_VERSION, MARKER, Manifest, to_compressed_tensors, verify_tensors

PARTIAL_MARK = ".vllm-autoround-partial"  # in a partial folder of ours, locked while its run lives
_SUBFOLDERS = ("additional_chat_templates",)


def partial_folder(out: Path) -> Path:
    """Where a checkpoint is collected until it is whole: beside ``out``, so that a rename suffices."""
    return out.with_name(out.name + ".partial")


class CheckpointWriter:
    """Collects a checkpoint in `partial_folder` and renames that to ``out`` once it is whole.

    As a context manager it removes the partial folder when the run fails; one left by a killed run is replaced. A
    checkpoint that is complete but cannot be given its name stays where it is.
    """

    def __init__(self, out: Path, source: Source, blocks: Sequence[Block]) -> None:
        self.out = out
        self.partial = partial_folder(out)
        self._complete = False
        self._lock: IO[str] | None = None
        self._source = source
        self._blocks = blocks
        self._files: dict[str, str] = {}  # tensor -> shard file
        self._bytes = 0

    def __enter__(self) -> Self:
        if (self.partial / PARTIAL_MARK).exists():
            with (self.partial / PARTIAL_MARK).open() as mark:
                _lock(mark, self.partial)  # not if another run is at it
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        self._lock = (self.partial / PARTIAL_MARK).open("w")
        _lock(self._lock, self.partial)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
        if kind is not None and not self._complete:
            shutil.rmtree(self.partial, ignore_errors=True)

    def write_block(self, index: int, weights: Mapping[str, QuantizedWeight], kv_scales: Mapping[str, Tensor]) -> None:
        """Write block ``index``: quantized layers packed, its other tensors as they were."""
        block = self._blocks[index]
        tensors: dict[str, Tensor] = dict(kv_scales)
        for name, weight in weights.items():
            for suffix, tensor in weight.tensors().items():
                tensors[f"{block.name}.{name}.{suffix}"] = tensor.cpu()
        replaced = {f"{name}.weight" for name in weights}
        for name, tensor in block.module.state_dict().items():
            if name not in replaced:
                tensors[f"{block.name}.{name}"] = tensor
        self._write_shard(index, tensors)

    def complete(self, manifest: Manifest, provenance: Mapping[str, Any]) -> None:
        """Write what is outside the blocks, the index, the other files and config.json.

        Raises:
            ManifestError: the tensors written are not those that the manifest promises.
        """
        self._write_shard(len(self._blocks), self._tensors_outside_blocks())
        verify_tensors(manifest, self._files)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._files.items()))}
        self._write_json("model.safetensors.index.json", index)
        self._copy_other_files()
        config = {
            **self._source.config,
            "quantization_config": to_compressed_tensors(manifest),
            MARKER: {"format_version": FORMAT_VERSION, **provenance},
        }
        self._write_json("config.json", config)

    def publish(self, report: Mapping[str, Any]) -> None:
        """Write report.json and give the folder its final name.

        Raises:
            CalibrationError: the name was taken in the meantime; says where the checkpoint is.
        """
        self._write_json("report.json", report)
        self._complete = True
        _sync(self.partial)
        try:
            if self.out.exists():
                self.out.rmdir()  # it was empty when the run began
            self.partial.rename(self.out)
        except OSError as error:
            (self.partial / PARTIAL_MARK).unlink()  # so that the next run does not take it for an unfinished one
            raise CalibrationError(
                f"{self.out} cannot be written any more ({error.strerror}); the finished checkpoint is {self.partial}"
            ) from error
        (self.out / PARTIAL_MARK).unlink()
        _sync(self.out.parent)

    def _tensors_outside_blocks(self) -> dict[str, Tensor]:
        """Shared parameters once, under their first name: a tied lm_head is not written, as in the original."""
        model, inside = self._source.model, tuple(f"{block.name}." for block in self._blocks)
        state = model.state_dict()
        names = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
        return {name: state[name] for name in names if name in state and not name.startswith(inside)}

    def _write_shard(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        name = f"model-{index + 1:05d}-of-{len(self._blocks) + 1:05d}.safetensors"
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        temporary = self.partial / f"{name}.tmp"
        save_file(contiguous, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors creates files that only their owner can read
        _sync(temporary)
        temporary.rename(self.partial / name)
        self._files.update(dict.fromkeys(contiguous, name))
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in contiguous.values())

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        path = self.partial / name
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        _sync(path)

    def _copy_other_files(self) -> None:
        """Tokenizer, generation config, chat templates, licence: all small files beside the weights, unchanged."""
        skipped = ("config.json", ".*", "*.safetensors", "*.index.json", *FOREIGN_WEIGHTS)
        folder = self._source.folder
        for path in sorted([*folder.iterdir(), *(file for name in _SUBFOLDERS for file in (folder / name).glob("*"))]):
            if path.is_file() and not any(path.match(pattern) for pattern in skipped):
                target = self.partial / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
                _sync(target)


def _lock(mark: IO[str], partial: Path) -> None:
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CalibrationError(f"another run is writing {partial}; wait for it or choose another folder") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
