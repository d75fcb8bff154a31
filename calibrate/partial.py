"""A folder that appears under its name only when everything in it is complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from calibrate.config import CalibrationError

PARTIAL_MARK = ".vllm-autoround-partial"  # in a partial folder of ours, locked while its run lives


def partial_folder(out: Path) -> Path:
    """Where a checkpoint is collected until it is whole: beside ``out``, so that a rename suffices."""
    return out.with_name(out.name + ".partial")


class PartialFolder:
    """Collects files in `partial_folder` and renames that to ``out`` at the end.

    As a context manager it removes the partial folder when the work fails; one left by a killed run is replaced. A
    folder that is complete but cannot be given its name stays where it is.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = partial_folder(out)
        self._complete = False
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        if (self.path / PARTIAL_MARK).exists():
            with (self.path / PARTIAL_MARK).open() as mark:
                _lock(mark, self.path)  # not if another run is at it
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        self._lock = (self.path / PARTIAL_MARK).open("w")
        _lock(self._lock, self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
        if kind is not None and not self._complete:
            shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Give the folder its final name.

        Raises:
            CalibrationError: the name was taken in the meantime; says where the checkpoint is.
        """
        self._complete = True
        for folder in [*(path for path in self.path.iterdir() if path.is_dir()), self.path]:
            sync(folder)
        try:
            if self.out.exists():
                self.out.rmdir()  # it was empty when the run began
            self.path.rename(self.out)
        except OSError as error:
            (self.path / PARTIAL_MARK).unlink()  # so that the next run does not take it for an unfinished one
            raise CalibrationError(
                f"{self.out} cannot be written any more ({error.strerror}); the finished checkpoint is {self.path}"
            ) from error
        (self.out / PARTIAL_MARK).unlink()
        sync(self.out.parent)


def occupied(out: Path) -> str | None:
    """Why ``out`` cannot become a checkpoint's folder, None if it can."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"{out} exists and is not an empty folder; choose another or remove it"
    if out.is_mount():
        return f"{out} is a mount point, which cannot be replaced at the end; choose a folder in it"
    partial = partial_folder(out)
    if partial.exists() and not (partial / PARTIAL_MARK).is_file() and (not partial.is_dir() or any(partial.iterdir())):
        return f"{partial} is in the way: the checkpoint is collected under that name; rename it"
    existing = next(parent for parent in out.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return f"{existing} is not a folder that can be written to"
    return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object that survives a power cut; NaN and infinity are errors."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; it appears when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp")
    save_file({name: _on_host(tensor) for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors creates files that only their owner can read
    sync(temporary)
    temporary.rename(path)


def copy(path: Path, target: Path) -> None:
    """Copy a file's content, and wait until it is on disk."""
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
    sync(target)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _on_host(tensor: Tensor) -> Tensor:
    """A contiguous tensor in host memory; a GPU's is copied into memory that is pinned, where there is such.

    While one thread copies to other memory, no other can tell the device anything.
    """
    pinned = None
    if tensor.device.type == "cuda":
        with suppress(RuntimeError):  # some systems have little memory that can be pinned
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.detach().cpu().contiguous() if pinned is None else pinned.copy_(tensor.detach())


def _lock(mark: IO[str], partial: Path) -> None:
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CalibrationError(f"another run is writing {partial}; wait for it or choose another folder") from error
