"""Everything that can be known before tuning is checked before tuning, and reported in one message."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from calibrate.blocks import Block, find_blocks
from calibrate.checkpoint import format_problems
from calibrate.config import CalibrationConfig, CalibrationError, Recipe
from calibrate.data import load_padded_samples, load_samples
from calibrate.fp8_matmul import fits_fp8, has_fp8
from calibrate.layer_schemes import assign_schemes, stock_problems
from calibrate.partial import occupied
from calibrate.source import Source
from vllm_autoround.format.errors import SchemeError
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

_DISK_RESERVE = 64 << 20  # bytes beyond the checkpoint itself
_TUNED_ON = 15  # samples for each one that is held out
_FEW_BITS = 3  # an integer of more gains nothing from training its scales end to end


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that has passed every check."""

    out: Path  # absolute, links resolved
    blocks: list[Block]
    samples: Tensor  # [S, T] token ids
    real: Tensor | None  # [S, T] bool on the device, False for padding; None without any
    manifest: Manifest
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def heldout(self) -> int:
        """`heldout_of` its samples, the last ones."""
        return heldout_of(len(self.samples))

    def schemes(self, block: Block) -> dict[str, QuantScheme]:
        """Scheme by layer name relative to the block."""
        prefix = f"{block.name}."
        return {
            name.removeprefix(prefix): scheme
            for name, scheme in self.manifest.schemes.items()
            if name.startswith(prefix)
        }

    def scales_to_train(self, block: Block) -> list[str]:
        """The layers, by name relative to the block, whose scales are worth training end to end."""
        return [name for name, scheme in self.schemes(block).items() if _few_bits(scheme)]

    def outside(self) -> dict[str, QuantScheme]:
        """Scheme by full name of the quantized layers that are in no block: the embedding and the head."""
        prefixes = tuple(f"{block.name}." for block in self.blocks)
        return {name: scheme for name, scheme in self.manifest.schemes.items() if not name.startswith(prefixes)}


def _few_bits(scheme: QuantScheme) -> bool:
    return isinstance(scheme.weights, Integer) and scheme.weights.bits <= _FEW_BITS


def heldout_of(nsamples: int) -> int:
    """How many samples no tuning step sees: they judge it. 0 if there is but one sample."""
    return -(-nsamples // (_TUNED_ON + 1)) if nsamples > 1 else 0


def make_plan(source: Source, out: Path, config: CalibrationConfig) -> Plan:
    """Check model, scheme, device, data, disk and settings against one another.

    Raises:
        CalibrationError: every problem found, each with its way out.
    """
    out = out.resolve()
    blocks = find_blocks(source.model)
    manifest, problems = _make_manifest(source, blocks, config)
    problems += _damage(source) + _setting_problems(source, config)
    problems += _output_problems(source, out, copies=len(config.formats))
    device, samples, real = torch.device("cpu"), torch.empty(0), None
    try:
        device = resolve_device(config.device)
        problems += _precision_problems(config.tuning, device, source.model.dtype)
        problems += _end_to_end_problems(source, config, manifest.schemes, device)
    except CalibrationError as error:
        problems.append(str(error))
    try:
        samples, real = _load_samples(source, config)
    except CalibrationError as error:
        problems.append(str(error))
    if problems:
        raise CalibrationError("\n".join(problems))

    real = None if real is None else real.to(device)
    return Plan(out, blocks, samples, real, manifest, device, compute_dtype(device, source.model.dtype))


def _make_manifest(source: Source, blocks: list[Block], config: CalibrationConfig) -> tuple[Manifest, list[str]]:
    """What will be quantized how, and every reason why not."""
    inside = {f"{block.name}.{name}": layer for block in blocks for name, layer in block.linears().items()}
    outside = _outside_layers(source, inside)
    schemes, problems = assign_schemes(config, list(inside), list(outside))
    problems += [
        f"{name} is a matrix that no linear layer owns (fused experts or a custom layer); such models are not supported"
        for block in blocks
        for name in block.unowned_matrices()
    ]
    problems += _layer_problems(schemes, {**inside, **outside})
    if config.stock_vllm:
        problems += stock_problems(schemes, inside)
    if not schemes:
        problems.append("no layer is left to quantize")
    linears = [*inside, *(name for name, layer in outside.items() if isinstance(layer, nn.Linear))]
    ignore = tuple(name for name in linears if name not in schemes)
    manifest = Manifest(schemes=schemes, ignore=ignore, kv_cache=config.kv_cache)
    return manifest, problems + format_problems(config.formats, manifest, source)


def resolve_device(name: str) -> torch.device:
    """``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"`` -> device.

    Raises:
        CalibrationError: a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise CalibrationError(f"device {name!r} cannot be used ({reason}); use cpu, cuda or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise CalibrationError(f"device {name!r} cannot be used; use cpu, cuda or auto")
    return device


def compute_dtype(device: torch.device, model_dtype: torch.dtype) -> torch.dtype:
    """What blocks run in: bfloat16 for 16-bit models, for its range in the gradients, where that is fast, and float32
    otherwise; a CPU needs AMX for it.

    Weights are quantized from, and scales stored in, the model's own dtype all the same.
    """
    if model_dtype == torch.float32 or (device.type == "cpu" and not has_amx()):
        return torch.float32
    return torch.bfloat16


def has_amx() -> bool:
    """Whether the CPU multiplies in bfloat16 as fast as it should."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of torch
    return bool(capabilities.get("amx_bf16"))


def _outside_layers(source: Source, inside: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers in no block that can be quantized: the input embedding, and linear layers such as lm_head."""
    embedding = source.model.get_input_embeddings()
    return {
        name: module
        for name, module in source.model.named_modules()
        if name not in inside and (module is embedding or isinstance(module, nn.Linear))
    }


def _layer_problems(schemes: Mapping[str, QuantScheme], layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """A problem for each scheme that does not fit its layer."""
    for name, scheme in schemes.items():
        try:
            rows, columns = cast(Tensor, layers[name].weight).shape
            scheme.check_layer(name, rows, columns)
        except SchemeError as error:
            yield str(error)
        if scheme.activations is not None and type(layers[name]) is not nn.Linear:
            what = type(layers[name]).__name__
            yield f"{name} is a {what}, whose input cannot be quantized; use a scheme with 16-bit activations for it"


def _load_samples(source: Source, config: CalibrationConfig) -> tuple[Tensor, Tensor | None]:
    """Token ids [S, T], and which of them are no padding, if any is."""
    tuning = config.tuning
    settings = {
        "seqlen": tuning.seqlen,
        "nsamples": tuning.nsamples,
        "seed": config.seed,
        "vocabulary": source.model.get_input_embeddings().num_embeddings,
    }
    if not config.pad:
        return load_samples(config.dataset, source.tokenizer, **settings), None
    samples = load_padded_samples(config.dataset, source.tokenizer, **settings)
    return samples.ids, None if samples.real.all() else samples.real


def _damage(source: Source) -> list[str]:
    """A problem for each tensor with NaN or infinity, also outside the blocks."""
    model = source.model
    floats = ((name, t) for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_floating_point())
    return [
        f"{name} has values that are not finite; the checkpoint is damaged"
        for name, tensor in floats
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all()
    ]


def _setting_problems(source: Source, config: CalibrationConfig) -> list[str]:
    tuning = config.tuning
    problems = []
    if config.kv_cache and not source.model._supports_attention_backend:
        problems.append(
            f"{type(source.model).__name__} does not attend through transformers' attention interface, where the "
            "KV cache is measured; leave --kv-cache out"
        )
    limit = getattr(source.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and tuning.seqlen > limit:
        problems.append(f"seqlen {tuning.seqlen} is more than the model's {limit} positions; use --seqlen {limit}")
    tuned_on = tuning.nsamples - heldout_of(tuning.nsamples)
    if tuning.iters and tuning.batch_size > tuned_on:
        problems.append(
            f"batch-size {tuning.batch_size} is more than the {tuned_on} of {tuning.nsamples} samples that are tuned "
            "on; lower it, or raise nsamples"
        )
    return problems


def _precision_problems(tuning: Recipe, device: torch.device, model_dtype: torch.dtype) -> list[str]:
    if tuning.tuning_precision != "fp8" or not tuning.iters:
        return []
    if not fits_fp8(tuning.batch_size * tuning.seqlen):
        return [
            f"FP8 matrix products need batch-size x seqlen to be a multiple of 16, got {tuning.batch_size} x "
            f"{tuning.seqlen}; change --seqlen, or use --tuning-precision bf16"
        ]
    if not has_fp8(device):
        return [f"{device} has no FP8 matrix products (Ada, Hopper and Blackwell have); use --tuning-precision bf16"]
    if model_dtype == torch.float32:
        return ["a float32 model is tuned in float32; use --tuning-precision bf16"]
    return []


def _end_to_end_problems(
    source: Source, config: CalibrationConfig, schemes: Mapping[str, QuantScheme], device: torch.device
) -> list[str]:
    few = {name for name, scheme in schemes.items() if _few_bits(scheme)}
    if config.end_to_end_iters and not few:
        return [f"end-to-end-iters has no effect: no layer has integer weights of {_FEW_BITS} bits or fewer; drop it"]
    if not (config.tuning.end_to_end_iters and few and device.type == "cuda"):
        return []
    needed = sum(
        p.numel() * (1 if name.removesuffix(".weight") in few else p.element_size())
        for name, p in source.model.named_parameters()
    )
    total = torch.cuda.get_device_properties(device).total_memory
    if needed > total:
        return [
            f"training scales end to end holds the whole model on the device, {needed >> 30} GiB of its "
            f"{total >> 30}; use --end-to-end-iters 0 or another recipe"
        ]
    return []


def _output_problems(source: Source, out: Path, *, copies: int) -> list[str]:
    if reason := occupied(out):
        return [reason]
    existing = next(parent for parent in out.parents if parent.exists())
    needed = copies * sum(p.numel() * p.element_size() for p in source.model.parameters()) + _DISK_RESERVE
    free = shutil.disk_usage(existing).free
    if free < needed:
        return [f"{existing} has {free >> 20} MiB free, up to {needed >> 20} MiB are needed"]
    return []
