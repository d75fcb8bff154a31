"""The whole run on one screen: load -> for each block: targets, statistics, tune, KV cache, write -> publish.

With training end to end, the last two of each block wait until that is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrate.activations import InputStatistics, QuantizedInput, observe_inputs, quantized_inputs_of, with_scales
from calibrate.background import Background
from calibrate.blocks import Block, capture_inputs, masked_parts, token_parts
from calibrate.chain import NonFiniteError, advance
from calibrate.checkpoint import CheckpointWriter
from calibrate.clock import Clock
from calibrate.config import CalibrationConfig, Recipe
from calibrate.end_to_end import TunedEarlier, train_scales
from calibrate.input_noise import make_up
from calibrate.inspection import inspect_checkpoint
from calibrate.kv_cache import observed
from calibrate.linear import quantized_now
from calibrate.outside import quantize_embedding, quantize_heads, replaced_weight
from calibrate.plan import Plan, make_plan
from calibrate.report import BlockReport, Stopwatch, decibels, environment, peak_memory, progress_bars, summary_table
from calibrate.resident import install
from calibrate.scale_descent import descends
from calibrate.source import load_source
from calibrate.tail import ModelTail
from calibrate.tuning import TunedBlock, forward_in_fp8, tune_block
from calibrate.verdict import mean_squared_error
from calibrate.workbench import Loss, Workbench, WorkingBlock
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight

_IMPORTANCE_TOKENS = 16_384


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
    if plan.device.type == "cuda" and plan.device.index is not None:
        torch.cuda.set_device(plan.device)  # streams, graphs and Triton kernels go to the current one
    outside = quantize_embedding(source.model, plan, config)
    original, quantized, arguments = _block_inputs(source.model, plan, outside)
    bench = Workbench(plan.device, plan.compute_dtype, compile=config.torch_compile)
    train_last = config.tuning.end_to_end_iters > 0 and any(map(plan.scales_to_train, plan.blocks))
    waiting, end_to_end = list[TunedEarlier](), None

    with (
        CheckpointWriter(plan.out, source, plan.blocks, plan.manifest, config.formats) as writer,
        progress_bars(len(plan.blocks), config.tuning) as progress,
        Background(plan.device) as background,
    ):
        for index, block in enumerate(plan.blocks):
            block_watch, clock = Stopwatch(), Clock(plan.device)
            progress.start_block(block.name)
            last = index == len(plan.blocks) - 1
            try:
                with clock.phase("load"):
                    loss = (
                        ModelTail(source.model, plan.blocks, plan.device, plan.compute_dtype).divergence
                        if last and config.tuning.kl_last_block and config.tuning.iters
                        else mean_squared_error
                    )
                    working = bench.load(block, arguments[index])
                    if not last:
                        background.submit(partial(bench.fetch, plan.blocks[index + 1]))
                tuned, inputs, scales, made_up, moved = _calibrate_block(
                    index, block, working, original, quantized, plan, config, progress.step, loss, clock
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"{block.name}: {error}") from error
            with clock.phase("write"):
                if train_last:
                    waiting.append(TunedEarlier(tuned.weights, inputs, scales))
                else:
                    background.submit(partial(writer.write_block, index, tuned.weights, scales))
            reports.append(
                BlockReport(
                    name=block.name,
                    start_db=decibels(tuned.start.error),
                    tuned_db=decibels(tuned.tuned.error),
                    objective="mse" if loss is mean_squared_error else "kl",
                    start_loss=tuned.start.loss,
                    tuned_loss=tuned.tuned.loss,
                    kept_start=tuned.kept_start,
                    in_fp8=tuned.in_fp8,
                    made_up=made_up,
                    input_scales=moved,
                    final_loss=tuned.final_loss,
                    seconds=block_watch.seconds(),
                    phases=clock.seconds,
                    layers=tuned.layers,
                )
            )
            progress.finish_block(reports[-1])
            del tuned, loss, working  # off the device before the next block comes

        background.wait()
        bench.close()
        if train_last:
            original, quantized = original.cpu(), _quantized_inputs(source.model, plan, outside)  # off the device
            end_to_end = train_scales(source.model, plan, config, waiting, arguments, quantized, original, progress)
            [quantized] = _place(plan.device, quantized)
            _write_blocks(waiting, plan, arguments, quantized, writer, background)
            background.wait()
        heads, scales = quantize_heads(source.model, plan, config, quantized)
        writer.write_outside({**outside, **heads}, scales)
        versions = environment(plan.device)
        writer.complete({"version": versions["vllm-autoround"], "tuning": asdict(config.tuning)})
        report = {
            "model": source.name,
            "model_revision": source.revision,
            "settings": _settings(config),
            "tuning": asdict(config.tuning),
            "heldout_samples": plan.heldout,
            "samples_sha256": hashlib.sha256(plan.samples.numpy().tobytes()).hexdigest(),
            "environment": versions,
            "checkpoints": {
                name: inspect_checkpoint(folder).as_json()
                for name, folder in writer.folders.items()
                if (folder / "config.json").exists()  # GGUF is a single file
            },
            "blocks": [asdict(block) for block in reports],
            "end_to_end": None if end_to_end is None else asdict(end_to_end),
            "seconds": watch.seconds(),
            "peak_memory": peak_memory(plan.device),
        }
        writer.publish(report)
    print(f"\n{summary_table(reports, end_to_end, config.tuning)}\n")  # noqa: T201
    return report


def _block_inputs(
    model: PreTrainedModel, plan: Plan, outside: Mapping[str, QuantizedWeight]
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """What enters the first block in the original and in the quantized chain, and every block's other arguments."""
    hidden, arguments = capture_inputs(model, plan.blocks, plan.samples, plan.compute_dtype)
    quantized = _quantized_inputs(model, plan, outside) if outside else hidden.clone()
    original, quantized = _place(plan.device, hidden, quantized)
    return original, quantized, arguments


def _quantized_inputs(model: PreTrainedModel, plan: Plan, outside: Mapping[str, QuantizedWeight]) -> Tensor:
    """What enters the first block in the quantized chain, [S, T, H], in host memory."""
    with ExitStack() as stack:
        for embedding in outside.values():
            stack.enter_context(replaced_weight(model.get_input_embeddings(), embedding))
        return capture_inputs(model, plan.blocks, plan.samples, plan.compute_dtype).hidden


class _Calibrated(NamedTuple):
    """What came of a block."""

    tuned: TunedBlock
    inputs: dict[str, QuantizedInput]  # by layer name relative to the block; static scales as they were tuned
    scales: dict[str, Tensor]  # of activations and KV cache, by the tensor's full name
    made_up: dict[str, float]  # what `make_up` says
    input_scales: dict[str, float]  # by layer, static ones relative to those that the largest magnitude asks for


def _calibrate_block(
    index: int,
    block: Block,
    working: WorkingBlock,
    original: Tensor,
    quantized: Tensor,
    plan: Plan,
    config: CalibrationConfig,
    on_step: Callable[[], None],
    loss: Loss,
    clock: Clock,
) -> _Calibrated:
    """Tune one block and advance both chains, [S, T, H], through it, in place."""
    schemes = plan.schemes(block)
    with clock.phase("original chain"):
        working.advance(original)
    with clock.phase("statistics"):  # on the quantized chain: what the layers will be fed when they are served
        statistics = _statistics(working, schemes, quantized, plan, config.tuning)
    ranges = quantized_inputs_of(schemes, statistics)
    made_up = dict[str, float]()
    if config.tuning.weighs_pairs:
        seen = slice(len(quantized) - plan.heldout)
        real = None if plan.real is None else plan.real[seen]
        # Where there are many scales to choose from, it was found to gain no divergence (benchmarks/NOTES.md).
        noisy = {name: made for name, made in ranges.items() if not descends(schemes[name].weights)}
        with clock.phase("input noise"):
            made_up = make_up(working, noisy, quantized[seen], real) if noisy else {}
    with working.quantized_inputs(ranges):
        tuned = tune_block(
            working,
            schemes,
            quantized,
            original,
            real=plan.real,
            recipe=config.tuning,
            statistics=statistics,
            heldout=plan.heldout,
            accumulate=config.gradient_accumulate_steps,
            generator=torch.Generator().manual_seed(config.seed + index),
            on_step=on_step,
            loss=loss,
            clock=clock,
        )
        exact = forward_in_fp8(schemes) if tuned.in_fp8 else {}
        with clock.phase("quantized chain"), working.fp8_matmuls(exact):
            scales = _advance_quantized(working, quantized, block.name, plan, tuned.heldout)
        inputs = with_scales(quantized_now(working.module), lambda _, scale: scale.clone())  # as they were tuned
    moved = dict[str, float]()
    for name, made in inputs.items():
        if made.scale is not None:
            scales[f"{block.name}.{name}.{made.type.static}"] = made.scale.to("cpu", copy=True)
            moved[name] = (made.scale / cast(Tensor, ranges[name].scale)).item()
    return _Calibrated(tuned, inputs, scales, made_up, moved)


def _write_blocks(
    waiting: Sequence[TunedEarlier],
    plan: Plan,
    arguments: Sequence[dict[str, Any]],
    quantized: Tensor,
    writer: CheckpointWriter,
    background: Background,
) -> None:
    """Write blocks whose weights changed after their tuning; the quantized chain [S, T, H] is advanced through them, in
    place, and the KV cache is observed, once more."""
    bench = Workbench(plan.device, plan.compute_dtype, compile=False)
    for index, (block, done) in enumerate(zip(plan.blocks, waiting, strict=True)):
        working = bench.load(block, arguments[index])
        for name, weight in done.weights.items():
            install(cast(nn.Linear, working.module.get_submodule(name)), weight, working.wanted[name].dtype)
        try:
            with working.quantized_inputs(done.inputs):
                kv_scales = _advance_quantized(working, quantized, block.name, plan)
        except NonFiniteError as error:
            raise NonFiniteError(f"{block.name}: {error}") from error
        background.submit(partial(writer.write_block, index, done.weights, done.scales | kv_scales))


def _statistics(
    working: WorkingBlock, schemes: Mapping[str, QuantScheme], quantized: Tensor, plan: Plan, recipe: Recipe
) -> dict[str, InputStatistics]:
    """Of the layers' inputs, of every layer that needs them: for static scales of activations ranges over all samples
    [S, T, H]; everything else over a few of those that are not held out, for GPTQ over all of these."""
    needed = [name for name, s in schemes.items() if recipe.scale_search or recipe.gptq or s.activations is not None]
    first = len(quantized) - plan.heldout
    # Which input features weigh how much, and which err together, shows in a part of the tokens.
    seen = first if recipe.gptq else min(first, -(-_IMPORTANCE_TOKENS // quantized.shape[1]))

    def observe(samples: slice, second_moments: bool) -> dict[str, InputStatistics]:
        real = None if plan.real is None else plan.real[samples]
        return observe_inputs(
            working.module, needed, quantized[samples], working.arguments, real=real, second_moments=second_moments
        )

    pairs = recipe.gptq or (recipe.weighs_pairs and any(descends(scheme.weights) for scheme in schemes.values()))
    statistics = observe(slice(seen), pairs)
    static = any(s.activations is not None and s.activations.static is not None for s in schemes.values())
    if static and seen < len(quantized):
        for name, others in observe(slice(seen, None), False).items():
            statistics[name].widen(others)
    return statistics


def _place(device: torch.device, *hidden: Tensor) -> list[Tensor]:
    """Hidden states [S, T, H]: on the device while all fit in half of what is free, else in pinned host memory."""
    if device.type != "cuda":
        return list(hidden)
    torch.cuda.empty_cache()  # what torch keeps for itself counts as taken
    free, _ = torch.cuda.mem_get_info(device)
    if sum(states.nbytes for states in hidden) <= free // 2:
        return [states.to(device) for states in hidden]
    return [states.pin_memory() for states in hidden]


def _advance_quantized(
    working: WorkingBlock, hidden: Tensor, name: str, plan: Plan, done: Tensor | None = None
) -> dict[str, Tensor]:
    """Run the quantized block over its inputs [S, T, H], in place; the KV-cache scales seen on the way.

    Args:
        done: what it made of the last of them already.
    """
    if plan.manifest.kv_cache is None:
        first = len(hidden) - (0 if done is None else len(done))
        whole = len(token_parts(hidden)[0])
        to_do = -(-first // whole) * whole  # another shape would have to be compiled for
        if to_do:
            working.advance(hidden[:to_do])
        if done is not None:
            hidden[to_do:] = done[to_do - first :]
        return {}
    with observed(working.module) as ranges:
        for part, ranges.real in masked_parts(hidden, plan.real):
            advance(working.module, part, working.arguments)
    return ranges.scales(working.module, name, per_head=plan.manifest.kv_cache == "fp8_per_head")


def _settings(config: CalibrationConfig) -> dict[str, Any]:
    """The configuration as JSON; data given as Python objects is not repeated."""
    settings = asdict(config)
    if not isinstance(config.dataset, str):
        settings["dataset"] = f"{len(config.dataset)} items given in Python"
    return settings
