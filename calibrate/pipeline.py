"""The whole run on one screen: load -> for each block: targets, tune, measure the KV cache, write -> publish."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.blocks import Block, capture_inputs, move_arguments, to_device
from calibrate.checkpoint import CheckpointWriter
from calibrate.config import CalibrationConfig
from calibrate.inspection import inspect_checkpoint
from calibrate.kv_cache import observed
from calibrate.plan import Plan, make_plan
from calibrate.report import BlockReport, Stopwatch, decibels, environment, peak_memory, progress_bars, summary_table
from calibrate.source import load_source
from calibrate.tuning import NonFiniteError, TunedBlock, advance, relative_distance, tune_block


def calibrate(model: str | Path, out: str | Path, **settings: Any) -> dict[str, Any]:
    """Quantize a causal LM and write a checkpoint that vLLM serves.

    Args:
        model: Hub id or local folder.
        out: folder to write; it appears only when everything in it is complete.
        settings: fields of `CalibrationConfig`, e.g. ``scheme="W4A16", kv_cache="fp8", dataset="calib.jsonl"``.

    Returns:
        The content of ``out/report.json``.

    Raises:
        CalibrationError: bad input, before any work is lost.
        NonFiniteError: a value that is not finite, with block and layer.
    """
    config, watch, reports = CalibrationConfig(**settings), Stopwatch(), list[BlockReport]()
    source = load_source(str(model), trust_remote_code=config.trust_remote_code)
    plan = make_plan(source, Path(out), config)
    hidden, arguments = capture_inputs(source.model, plan.blocks, plan.samples, plan.compute_dtype)
    original, quantized = _place(hidden, plan.device)
    del hidden

    with (
        CheckpointWriter(plan.out, source, plan.blocks) as writer,
        progress_bars(len(plan.blocks), config.tuning.iters) as progress,
    ):
        for index, block in enumerate(plan.blocks):
            block_watch = Stopwatch()
            progress.start_block(block.name)
            try:
                tuned, kv_scales = _calibrate_block(
                    index, block, arguments[index], original, quantized, plan, config, progress.step
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"{block.name}: {error}") from error
            writer.write_block(index, tuned.weights, kv_scales)
            reports.append(
                BlockReport(
                    name=block.name,
                    rtn_db=decibels(tuned.rtn_error),
                    tuned_db=decibels(relative_distance(quantized, original)),
                    final_loss=tuned.final_loss,
                    seconds=block_watch.seconds(),
                    layers=tuned.layers,
                )
            )
            progress.finish_block(reports[-1])
            del tuned, kv_scales  # off the device before the next block comes

        versions = environment(plan.device)
        writer.complete(
            plan.manifest,
            {"version": versions["vllm-autoround"], "scheme": config.scheme, "tuning": asdict(config.tuning)},
        )
        report = {
            "model": source.name,
            "model_revision": source.revision,
            "settings": _settings(config),
            "tuning": asdict(config.tuning),
            "samples_sha256": hashlib.sha256(plan.samples.numpy().tobytes()).hexdigest(),
            "environment": versions,
            "checkpoint": inspect_checkpoint(writer.partial).as_json(),
            "blocks": [asdict(block) for block in reports],
            "seconds": watch.seconds(),
            "peak_memory": peak_memory(plan.device),
        }
        writer.publish(report)
    print(f"\n{summary_table(reports)}\n")  # noqa: T201
    return report


def _calibrate_block(
    index: int,
    block: Block,
    arguments: dict[str, Any],
    original: Tensor,
    quantized: Tensor,
    plan: Plan,
    config: CalibrationConfig,
    on_step: Callable[[], None],
) -> tuple[TunedBlock, dict[str, Tensor]]:
    """Tune one block and advance both chains, [S, T, H], through it in place; its KV-cache scales beside it."""
    arguments = move_arguments(arguments, plan.device)
    module = to_device(block, plan.device, plan.compute_dtype)
    advance(module, original, arguments)
    tuned = tune_block(
        module,
        block.module,
        plan.schemes(block),
        quantized,
        original,
        arguments,
        recipe=config.tuning,
        accumulate=config.gradient_accumulate_steps,
        generator=torch.Generator().manual_seed(config.seed + index),
        on_step=on_step,
    )
    return tuned, _advance_quantized(module, quantized, arguments, block.name, plan)


def _place(hidden: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs [S, T, H] of the original and the quantized chain: on the device while both fit in half of what is free,
    else in pinned host memory."""
    if device.type != "cuda":
        return hidden, hidden.clone()
    free, _ = torch.cuda.mem_get_info(device)
    if 2 * hidden.nbytes <= free // 2:
        return hidden.to(device), hidden.to(device)
    return hidden.pin_memory(), hidden.pin_memory()


def _advance_quantized(
    module: nn.Module, hidden: Tensor, arguments: dict[str, Any], name: str, plan: Plan
) -> dict[str, Tensor]:
    """Run the quantized block over its inputs [S, T, H], in place; the KV-cache scales seen on the way."""
    if plan.manifest.kv_cache is None:
        advance(module, hidden, arguments)
        return {}
    with observed(module) as ranges:
        advance(module, hidden, arguments)
    return ranges.scales(module, name)


def _settings(config: CalibrationConfig) -> dict[str, Any]:
    """The configuration as JSON; data given as Python objects is not repeated."""
    settings = asdict(config)
    if not isinstance(config.dataset, str):
        settings["dataset"] = f"{len(config.dataset)} items given in Python"
    return settings
