"""Seconds to tune a decoder block, ours beside auto-round's on the same model and tokens, and the floor under both.

    python -m benchmarks.tuning

The model has the block shape of a real one and random weights; W4A16, symmetric, groups of 128. The first block, which
pays for compilation, stands apart from the mean of the later ones. The floor is the same number of steps of a plain
bfloat16 forward and backward with weight gradients: no quantizer, no update.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import calibrate.pipeline
from benchmarks.evaluation import most_levels
from benchmarks.peer import run_auto_round, synchronize
from benchmarks.provenance import RESULTS, write_result
from benchmarks.shapes import SHAPES, BlockShape
from calibrate.blocks import capture_inputs, find_blocks, move_arguments, run_block, to_device
from calibrate.config import RECIPES, Recipe
from calibrate.plan import compute_dtype, resolve_device
from calibrate.workbench import WorkingBlock
from vllm_autoround.format.reader import dequantized_state_dict

_VOCABULARY = 1024
_BITS = 4
_GROUP_SIZE = 128
_SEED = 42
_FLOOR_STEPS = 20  # timed; the figure is scaled to the recipe's steps
_WARM_UP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    contestant: str
    first: float | None = None  # seconds of the first block, compilation included
    later: float  # seconds, mean of the later blocks
    peak_gib: float | None  # device memory; None on the CPU


def main() -> int:
    args = _parse()
    device = resolve_device(args.device)
    recipe = replace(RECIPES["autoround"], iters=args.iters, nsamples=args.nsamples, seqlen=args.seqlen)
    samples = _random_tokens(recipe)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        _make_model(model, SHAPES[args.shape], args.blocks, args.seqlen, device)
        rows = [_time_floor(model, samples, recipe, device, compiled) for compiled in (False, True)]
        rows.append(_time_ours(model, Path(folder) / "ours", samples, recipe, device))
        if args.peer:
            rows.append(_time_peer(model, Path(folder) / "peer", samples, recipe, device))
    print(_table(rows))
    payload = {
        "protocol": {
            "shape": args.shape,
            "block": asdict(SHAPES[args.shape]),
            "blocks": args.blocks,
            "bits": _BITS,
            "group_size": _GROUP_SIZE,
            "tuning": asdict(recipe),
        },
        "rows": [asdict(row) for row in rows],
    }
    print(f"\nwritten to {write_result('tuning', payload, args.results)}")
    return 0


def _time_ours(model: Path, out: Path, samples: Tensor, recipe: Recipe, device: torch.device) -> Row:
    """Calibrate, and check that the checkpoint holds exactly the weights that the tuned blocks ran with.

    Raises:
        ValueError: it does not, or a weight is not finite.
    """
    _forget()
    with _tuned_weights(device) as tuned:
        report = calibrate.pipeline.calibrate(
            model,
            out,
            scheme=f"W{_BITS}A16",
            group_size=_GROUP_SIZE,
            dataset=samples.tolist(),
            device=str(device),
            seed=_SEED,
            **asdict(recipe),
        )
    peak = _peak_gib(device)
    state = dequantized_state_dict(out, torch.bfloat16)
    _check_finite("ours", state)
    for (index, layer), weight in tuned.weights.items():
        differing = int((state[f"model.layers.{index}.{layer}.weight"] != weight).sum())
        if differing:
            raise ValueError(f"block {index}, {layer}: {differing} weights of the checkpoint are not those tuned")
    seconds = [
        block["seconds"] - copying for block, copying in zip(report["blocks"], tuned.copying_seconds, strict=True)
    ]
    return _row("ours", seconds, peak)


def _time_peer(model: Path, out: Path, samples: Tensor, recipe: Recipe, device: torch.device) -> Row:
    """auto-round with its defaults, and a check that the weights of its checkpoint are finite and quantized.

    Raises:
        ValueError: they are not.
    """
    _forget()
    run = run_auto_round(
        model,
        out,
        samples,
        scheme=f"W{_BITS}A16",
        group_size=_GROUP_SIZE,
        symmetric=True,
        recipe=recipe,
        seed=_SEED,
        device=device,
    )
    peak = _peak_gib(device)
    [checkpoint] = {path.parent for path in out.rglob("config.json")}
    state = dequantized_state_dict(checkpoint, torch.bfloat16)
    _check_finite("auto-round", state)
    for name, weight in state.items():
        if name.endswith("_proj.weight") and most_levels(weight.to(device), _GROUP_SIZE) > 1 << _BITS:
            raise ValueError(f"auto-round: {name} is not quantized to {_BITS} bits")
    return _row("auto-round", run.block_seconds, peak)


def _time_floor(model: Path, samples: Tensor, recipe: Recipe, device: torch.device, compiled: bool) -> Row:
    """``recipe.iters`` steps of the first block in bfloat16, scaled from fewer."""
    _forget()
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    block, dtype = find_blocks(network)[0], compute_dtype(device, torch.bfloat16)
    captured = capture_inputs(network, [block], samples[: recipe.batch_size], dtype)
    module = to_device(block, device, dtype)
    module.requires_grad_(False)
    weights = [layer.weight.requires_grad_(True) for layer in module.modules() if isinstance(layer, nn.Linear)]
    hidden, arguments = captured.hidden.to(device), move_arguments(captured.arguments[0], device)
    forward: Callable[..., Tensor] = torch.compile(run_block) if compiled else run_block
    target = torch.zeros_like(hidden)

    def step() -> None:
        F.mse_loss(forward(module, hidden, arguments).float(), target.float()).backward()
        for weight in weights:
            weight.grad = None

    for _ in range(_WARM_UP):
        step()
    synchronize(device)
    begin, steps = time.perf_counter(), min(_FLOOR_STEPS, recipe.iters)
    for _ in range(steps):
        step()
    synchronize(device)
    seconds = (time.perf_counter() - begin) / steps * recipe.iters
    return Row(contestant=f"floor, {'compiled' if compiled else 'eager'}", later=seconds, peak_gib=_peak_gib(device))


class _Tuned:
    """Weights of the tuned blocks as they ran, on the CPU, and the seconds that copying each block's took."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, str], Tensor] = {}  # (block, layer) -> [N, K] bfloat16
        self.copying_seconds: list[float] = []


@contextmanager
def _tuned_weights(device: torch.device) -> Iterator[_Tuned]:
    """Record what `tune_block` leaves in every block that the pipeline tunes."""
    tuned, tune_block = _Tuned(), calibrate.pipeline.tune_block

    def recording(working: WorkingBlock, schemes: Any, *args: Any, **kwargs: Any) -> Any:
        result = tune_block(working, schemes, *args, **kwargs)
        synchronize(device)
        begin = time.perf_counter()
        for name in schemes:
            weight = working.module.get_submodule(name).weight.detach()
            tuned.weights[len(tuned.copying_seconds), name] = weight.to("cpu", torch.bfloat16, copy=True)
        tuned.copying_seconds.append(time.perf_counter() - begin)
        return result

    with mock.patch.object(calibrate.pipeline, "tune_block", recording):
        yield tuned


def _make_model(folder: Path, shape: BlockShape, blocks: int, seqlen: int, device: torch.device) -> None:
    """Save a Llama of ``blocks`` blocks with random bfloat16 weights and a vocabulary of its token numbers."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=seqlen,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(_SEED)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.cpu().save_pretrained(folder)
    words = Tokenizer(WordLevel({str(token): token for token in range(_VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0").save_pretrained(folder)


def _random_tokens(recipe: Recipe) -> Tensor:
    """[nsamples, seqlen] token ids without the end-of-text token 0."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(1, _VOCABULARY, (recipe.nsamples, recipe.seqlen), generator=generator)


def _check_finite(contestant: str, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{contestant}: {name} is not finite")


def _row(contestant: str, seconds: list[float], peak_gib: float | None) -> Row:
    first, *later = seconds
    return Row(contestant=contestant, first=first, later=sum(later) / len(later), peak_gib=peak_gib)


def _peak_gib(device: torch.device) -> float | None:
    """Most device memory allocated since `_forget`."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def _forget() -> None:
    """Every contestant starts with free memory and compiles for itself."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _table(rows: list[Row]) -> str:
    """Ratios: how many times the compiled floor, and how many times faster than auto-round."""
    later = {row.contestant: row.later for row in rows}
    lines = [f"{'seconds a block':<18}{'first':>9}{'later':>9}{'x floor':>9}{'x faster':>10}{'peak GiB':>10}"]
    for row in rows:
        first = "-" if row.first is None else f"{row.first:.2f}"
        faster = f"{later['auto-round'] / row.later:.2f}" if "auto-round" in later else "-"
        peak = "-" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        floor = row.later / later["floor, compiled"]
        lines.append(f"{row.contestant:<18}{first:>9}{row.later:>9.2f}{floor:>9.2f}{faster:>10}{peak:>10}")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    recipe = RECIPES["autoround"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=3, metavar="N", help="at least 2 (default: %(default)s)")
    parser.add_argument("--iters", type=int, default=recipe.iters, metavar="N", help="steps (default: %(default)s)")
    parser.add_argument(
        "--nsamples", type=int, default=recipe.nsamples, metavar="N", help="at least 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--seqlen", type=int, default=recipe.seqlen, metavar="N", help="tokens a sample (default: %(default)s)"
    )
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure auto-round too")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args()
    if args.blocks < 2 or args.iters < 1 or args.nsamples < recipe.batch_size:
        parser.error(f"needs at least 2 blocks, 1 step and {recipe.batch_size} samples")
    return args


if __name__ == "__main__":
    sys.exit(main())
