"""Seconds to tune a decoder block, ours beside auto-round's on the same model and tokens, and the floor under both.

    python -m benchmarks.tuning

The model has the block shape of a real one and random weights. Everything that a block costs is counted, from its
reference forward to its shard on disk. The first block, which pays for compilation, stands apart from the mean of the
later ones. A recipe's floor is as many steps, of as many samples, of a plain bfloat16 forward and backward with weight
gradients: no quantizer, no update, no forwards besides.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import calibrate.pipeline
from benchmarks.evaluation import forget, most_levels
from benchmarks.peer import run_auto_round, synchronize
from benchmarks.provenance import RESULTS, write_result
from benchmarks.shapes import SHAPES, BlockShape
from benchmarks.variants import HELP, recipe_of, variant
from calibrate.blocks import capture_inputs, copy_arguments, find_blocks, run_block, to_device
from calibrate.config import Precision, Recipe
from calibrate.plan import compute_dtype, resolve_device
from calibrate.workbench import WorkingBlock
from vllm_autoround.format.reader import dequantized_state_dict
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

_VOCABULARY = 1024
_SEED = 42
_PEER = "autoround"  # auto-round's default
_FLOOR_STEPS = 20  # timed
_WARM_UP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    scheme: str
    contestant: str
    first: float | None = None  # seconds of the first block, compilation included
    later: float  # seconds, mean of the later blocks
    floor: float  # seconds of the same steps without anything else, compiled
    peak_gib: float | None  # device memory; None on the CPU
    phases: dict[str, float] | None = None  # of a later block, in the mean; ours only


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """What every contestant gets."""

    model: Path
    samples: Tensor  # [S, T] token ids
    device: torch.device
    floors: dict[int, float]  # seconds a step by samples in it

    def floor(self, recipe: Recipe) -> float:
        """Seconds a block."""
        return recipe.iters * self.floors[recipe.batch_size]

    def ours(self, scheme: str, name: str, recipe: Recipe) -> Row:
        """Calibrate, and check that the checkpoint holds exactly the weights that the tuned blocks ran with.

        Raises:
            ValueError: it does not, or a weight is not finite.
        """
        forget()
        with tempfile.TemporaryDirectory() as folder, _tuned_weights(self.device) as tuned:
            report = calibrate.pipeline.calibrate(
                self.model,
                Path(folder) / "ours",
                scheme=scheme,
                dataset=self.samples[: recipe.nsamples].tolist(),
                device=str(self.device),
                seed=_SEED,
                **asdict(recipe),
            )
            peak = _peak_gib(self.device)
            state = dequantized_state_dict(Path(folder) / "ours", torch.bfloat16)
        _check_finite("ours", state)
        for (index, layer), weight in tuned.weights.items():
            differing = int((state[f"model.layers.{index}.{layer}.weight"] != weight).sum())
            if differing:
                raise ValueError(f"block {index}, {layer}: {differing} weights of the checkpoint are not those tuned")
        blocks = report["blocks"]
        seconds = [block["seconds"] - copying for block, copying in zip(blocks, tuned.copying_seconds, strict=True)]
        # The last block has another loss in some recipes; a model has 32 times more of the others.
        if recipe.kl_last_block:
            seconds, blocks = seconds[:-1], blocks[:-1]
        phases = {
            phase: sum(block["phases"].get(phase, 0.0) for block in blocks[1:]) / len(blocks[1:])
            for phase in blocks[-1]["phases"]
        }
        return _row(scheme, f"ours, {name}", seconds, self.floor(recipe), peak, phases)

    def peer(self, scheme: str, recipe: Recipe) -> Row:
        """auto-round with its defaults, and a check that the weights of its checkpoint are finite and quantized.

        Raises:
            ValueError: they are not.
        """
        forget()
        kind = QuantScheme.parse(scheme).weights
        integer = isinstance(kind, Integer)
        with tempfile.TemporaryDirectory() as folder:
            run = run_auto_round(
                self.model,
                Path(folder),
                self.samples[: recipe.nsamples],
                scheme=f"W{kind.bits}A16" if integer else scheme,
                group_size=(kind.group_size or -1) if integer else None,
                symmetric=kind.symmetric,
                recipe=recipe,
                seed=_SEED,
                device=self.device,
            )
            peak = _peak_gib(self.device)
            [checkpoint] = {path.parent for path in Path(folder).rglob("config.json")}
            state = dequantized_state_dict(checkpoint, torch.bfloat16)
        _check_finite("auto-round", state)
        for name, weight in state.items():
            most = most_levels(weight.to(self.device), kind.group_size) if integer else 0
            if name.endswith("_proj.weight") and most > 1 << kind.bits:
                raise ValueError(f"auto-round: {name} is not quantized to {kind.bits} bits")
        return _row(scheme, "auto-round", run.block_seconds, self.floor(recipe), peak, None)


def main() -> int:
    args = _parse()
    device = resolve_device(args.device)
    recipes = {text: _raced(text, args) for text in args.recipes}
    if args.precisions:
        recipes = {
            f"{text} {precision}": replace(recipe, tuning_precision=precision)
            for text, recipe in recipes.items()
            for precision in args.precisions
        }
    peer = _raced(_PEER, args)
    samples = _random_tokens(max(recipe.nsamples for recipe in (*recipes.values(), peer)), args.seqlen)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        _make_model(model, SHAPES[args.shape], args.blocks, args.seqlen, device)
        sizes = {recipe.batch_size for recipe in (*recipes.values(), peer)}
        floors = {size: _step_floor(model, samples[:size], device) for size in sorted(sizes)}
        race = Race(model=model, samples=samples, device=device, floors=floors)
        for scheme in args.schemes:
            for name, recipe in recipes.items():
                rows.append(race.ours(scheme, name, recipe))
                print(_line(rows[-1], None), file=sys.stderr, flush=True)
            if args.peer:
                rows.append(race.peer(scheme, peer))
                print(_line(rows[-1], None), file=sys.stderr, flush=True)
    print(_table(rows))
    payload = {
        "protocol": {
            "shape": args.shape,
            "block": asdict(SHAPES[args.shape]),
            "blocks": args.blocks,
            "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
            "peer": asdict(peer),
        },
        "floor_seconds_a_step": floors,
        "rows": [asdict(row) for row in rows],
    }
    print(f"\nwritten to {write_result(args.name, payload, args.results)}")
    return 0


def _raced(text: str, args: argparse.Namespace) -> Recipe:
    """The recipe with this run's steps and samples, if it names them; blocks are raced, nothing after them."""
    recipe = recipe_of(text, iters=args.iters, nsamples=args.nsamples, seqlen=args.seqlen)
    return replace(recipe, end_to_end_iters=0)


def _step_floor(model: Path, samples: Tensor, device: torch.device) -> float:
    """Seconds of a step of the first block on ``samples`` [B, T] in bfloat16, compiled."""
    forget()
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    block, dtype = find_blocks(network)[0], compute_dtype(device, torch.bfloat16)
    captured = capture_inputs(network, [block], samples, dtype)
    module = to_device(block, device, dtype)
    module.requires_grad_(False)
    weights = [layer.weight.requires_grad_(True) for layer in module.modules() if isinstance(layer, nn.Linear)]
    hidden, arguments = captured.hidden.to(device), copy_arguments(captured.arguments[0], device)
    forward = torch.compile(run_block)
    target = torch.zeros_like(hidden)

    def step() -> None:
        F.mse_loss(forward(module, hidden, arguments).float(), target.float()).backward()
        for weight in weights:
            weight.grad = None

    for _ in range(_WARM_UP):
        step()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(_FLOOR_STEPS):
        step()
    synchronize(device)
    return (time.perf_counter() - begin) / _FLOOR_STEPS


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


def _random_tokens(nsamples: int, seqlen: int) -> Tensor:
    """[nsamples, seqlen] token ids without the end-of-text token 0."""
    return torch.randint(1, _VOCABULARY, (nsamples, seqlen), generator=torch.Generator().manual_seed(_SEED))


def _check_finite(contestant: str, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{contestant}: {name} is not finite")


def _row(
    scheme: str,
    contestant: str,
    seconds: list[float],
    floor: float,
    peak_gib: float | None,
    phases: dict[str, float] | None,
) -> Row:
    first, *later = seconds
    mean = sum(later) / len(later)
    return Row(
        scheme=scheme, contestant=contestant, first=first, later=mean, floor=floor, peak_gib=peak_gib, phases=phases
    )


def _peak_gib(device: torch.device) -> float | None:
    """Most device memory allocated since `forget`."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def _table(rows: list[Row]) -> str:
    """Ratios: how many times the floor of the same steps, and how many times faster than auto-round; then the phases of
    each of ours, in hundredths."""
    peers = {row.scheme: row.later for row in rows if row.contestant == "auto-round"}
    lines = [f"{'seconds a block':<29}{'first':>9}{'later':>9}{'x floor':>9}{'x faster':>10}{'peak GiB':>10}"]
    lines += [_line(row, peers.get(row.scheme)) for row in rows]
    for row in rows:
        if row.phases is not None:
            shares = {phase: 100 * seconds / row.later for phase, seconds in row.phases.items()}
            parts = [f"{phase} {share:.0f}" for phase, share in shares.items() if share >= 0.5]
            lines.append(f"{row.scheme}, {row.contestant}: " + ", ".join(parts))
    return "\n".join(lines)


def _line(row: Row, peer: float | None) -> str:
    first = "-" if row.first is None else f"{row.first:.2f}"
    faster = "-" if peer is None else f"{peer / row.later:.2f}"
    peak = "-" if row.peak_gib is None else f"{row.peak_gib:.2f}"
    name = f"{row.scheme} {row.contestant}"
    return f"{name:<29}{first:>9}{row.later:>9.2f}{row.later / row.floor:>9.2f}{faster:>10}{peak:>10}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what to measure")
    what.add_argument("--schemes", nargs="+", default=["W4A16", "NVFP4", "MXFP4"], help="default: W4A16 NVFP4 MXFP4")
    what.add_argument(
        "--recipes",
        nargs="+",
        type=variant,
        default=["fast", "default", "autoround"],
        metavar="RECIPE",
        help=f"{HELP} (default: fast default autoround)",
    )
    what.add_argument(
        "--precisions", nargs="+", choices=get_args(Precision), help="of our steps (default: the recipe's)"
    )
    what.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure auto-round too")
    what.add_argument("--shape", default="llama-3-8b", choices=SHAPES, help="default: %(default)s")
    what.add_argument("--blocks", type=int, default=4, metavar="N", help="at least 3 (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=int, metavar="N", help="steps (default: the recipe's)")
    how.add_argument("--nsamples", type=int, metavar="N", help="at least 9 (default: the recipe's)")
    how.add_argument("--seqlen", type=int, default=2048, metavar="N", help="tokens a sample (default: %(default)s)")
    how.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--name", default="tuning", help="of the result file (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args()
    if args.blocks < 3 or (args.nsamples is not None and args.nsamples < 9):
        parser.error("needs at least 3 blocks and 9 samples")
    if not all(recipe_of(text).iters for text in args.recipes):
        parser.error("--recipes: times the steps, and a recipe without any has none")
    return args


if __name__ == "__main__":
    sys.exit(main())
