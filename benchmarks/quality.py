"""Perplexity and word-problem accuracy of rounded and tuned checkpoints, ours beside auto-round's on the same tokens.

    python -m benchmarks.quality --model DIR --calib calib.jsonl.gz --heldout english.heldout.txt.gz \\
        --problems-train word_problems.train.jsonl.gz --problems-test word_problems.test.jsonl.gz

Exit status 1 when a tuned checkpoint of ours misses --max-ppl or --min-accuracy.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.evaluation import (
    Problem,
    accuracy,
    check_levels,
    load_model,
    perplexity,
    read_problems,
    read_windows,
)
from benchmarks.peer import run_auto_round
from benchmarks.provenance import RESULTS, write_result
from calibrate import calibrate
from calibrate.config import RECIPES, Recipe
from calibrate.data import load_samples
from calibrate.plan import resolve_device
from vllm_autoround.format.reader import dequantized_state_dict

_WINDOW = 1024  # tokens
_WINDOWS = 200
_SHOTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    weights: str
    bits: int
    seed: int | None = None
    ppl: float
    accuracy: float
    seconds: float | None = None  # to quantize


@dataclass(frozen=True, slots=True)
class Contest:
    """What every contestant gets."""

    model: Path
    group_size: int
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    windows: Tensor  # [W, T] token ids
    examples: list[Problem]
    problems: list[Problem]
    batch_size: int  # problems generated at once

    def judge(
        self, weights: str, bits: int, seed: int | None, state: Mapping[str, Tensor] | None, seconds: float | None
    ) -> Row:
        """Evaluate the model with its weights replaced by ``state``, after checking that they are quantized."""
        model = load_model(self.model, state, self.device)
        if state is not None:
            check_levels(model, bits, self.group_size)
        row = Row(
            weights=weights,
            bits=bits,
            seed=seed,
            ppl=perplexity(model, self.windows),
            accuracy=accuracy(model, self.tokenizer, self.examples, self.problems, batch_size=self.batch_size),
            seconds=seconds,
        )
        print(_line(row), file=sys.stderr, flush=True)
        return row

    def ours(self, bits: int, seed: int, samples: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], float]:
        """State dict of our checkpoint, and seconds."""
        _forget()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "checkpoint"
            report = calibrate(
                self.model,
                out,
                scheme=f"W{bits}A16",
                group_size=self.group_size,
                dataset=samples.tolist(),
                device=str(self.device),
                seed=seed,
                **asdict(recipe),
            )
            return dequantized_state_dict(out, torch.bfloat16), report["seconds"]

    def peer(self, bits: int, seed: int, samples: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], float]:
        """State dict of auto-round's result, and seconds."""
        _forget()
        run = run_auto_round(
            self.model,
            samples,
            bits=bits,
            group_size=self.group_size,
            recipe=recipe,
            seed=seed,
            device=self.device,
        )
        return run.state, run.seconds


def main() -> int:
    args = _parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    recipe = _recipe(args)
    contest = Contest(
        args.model,
        args.group_size,
        resolve_device(args.device),
        tokenizer,
        read_windows(args.heldout, tokenizer, length=_WINDOW, count=min(args.limit or _WINDOWS, _WINDOWS)),
        read_problems(args.problems_train)[:_SHOTS],
        read_problems(args.problems_test)[: args.limit],
        args.batch_size,
    )
    rows = list(_rows(args, contest, recipe))
    print(_table(rows))
    misses = list(_misses(rows, dict(args.max_ppl), dict(args.min_accuracy)))
    payload = {
        "protocol": {
            "model": args.model.name,
            "group_size": args.group_size,
            "tuning": asdict(recipe),
            "windows": list(contest.windows.shape),
            "problems": len(contest.problems),
            "shots": _SHOTS,
        },
        "rows": [asdict(row) for row in rows],
        "misses": misses,
    }
    print(f"\nwritten to {write_result('quality', payload, args.results)}")
    for miss in misses:
        print(f"quality: {miss}", file=sys.stderr)
    return 1 if misses else 0


def _rows(args: argparse.Namespace, contest: Contest, recipe: Recipe) -> Iterator[Row]:
    yield contest.judge("bf16", 16, None, None, None)
    contestants = {"ours": contest.ours, **({"peer": contest.peer} if args.peer else {})}
    for bits in args.bits:
        for seed in args.seeds:
            samples = load_samples(
                str(args.calib), contest.tokenizer, seqlen=recipe.seqlen, nsamples=recipe.nsamples, seed=seed
            )
            for name, quantize in contestants.items():
                if seed == args.seeds[0]:
                    rtn = replace(recipe, iters=0, lr=None)
                    yield contest.judge(f"{name}, rtn", bits, seed, *quantize(bits, seed, samples, rtn))
                yield contest.judge(f"{name}, tuned", bits, seed, *quantize(bits, seed, samples, recipe))


def _misses(rows: list[Row], max_ppl: Mapping[int, float], min_accuracy: Mapping[int, float]) -> Iterator[str]:
    """A line for every limit that a tuned checkpoint of ours misses, or that no row was measured for."""
    tuned = [row for row in rows if row.weights == "ours, tuned"]
    for row in tuned:
        if not row.ppl <= max_ppl.get(row.bits, float("inf")):
            yield f"W{row.bits}, seed {row.seed}: perplexity {row.ppl:.3f} is above the limit {max_ppl[row.bits]}"
        if row.accuracy < min_accuracy.get(row.bits, 0.0):
            yield f"W{row.bits}, seed {row.seed}: accuracy {row.accuracy:.3f} is below {min_accuracy[row.bits]}"
    for bits in sorted({*max_ppl, *min_accuracy} - {row.bits for row in tuned}):
        yield f"W{bits} has a limit but was not measured; add it to --bits"


def _table(rows: list[Row]) -> str:
    head = f"{'weights':<14}{'bits':>5}{'seed':>6}{'ppl':>9}{'accuracy':>10}{'seconds':>9}"
    return "\n".join([head, *map(_line, rows)])


def _line(row: Row) -> str:
    seed = "-" if row.seed is None else row.seed
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    return f"{row.weights:<14}{row.bits:>5}{seed:>6}{row.ppl:>9.3f}{row.accuracy:>10.3f}{seconds:>9}"


def _recipe(args: argparse.Namespace) -> Recipe:
    recipe = replace(RECIPES[args.recipe], nsamples=args.nsamples, seqlen=args.seqlen)
    return recipe if args.iters is None else replace(recipe, iters=args.iters)


def _forget() -> None:
    """Every contestant starts with free memory and compiles for itself."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _limit(text: str) -> tuple[int, float]:
    """``"4:32.2"`` -> (4, 32.2)."""
    bits, _, limit = text.partition(":")
    return int(bits), float(limit)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what to measure")
    what.add_argument("--model", type=Path, required=True, metavar="DIR", help="the original model")
    what.add_argument("--calib", type=Path, required=True, metavar="FILE", help=".jsonl.gz with 'text'")
    what.add_argument("--heldout", type=Path, required=True, metavar="FILE", help=".txt.gz for the perplexity")
    what.add_argument("--problems-train", type=Path, required=True, metavar="FILE", help="examples, GSM8K's format")
    what.add_argument("--problems-test", type=Path, required=True, metavar="FILE", help="problems, GSM8K's format")
    what.add_argument("--bits", type=int, nargs="+", default=[4, 3], help="default: 4 3")
    what.add_argument("--group-size", type=int, default=128, metavar="G", help="default: %(default)s")
    what.add_argument("--limit", type=int, metavar="N", help="at most N windows and N problems: a smoke run")
    what.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure auto-round too")
    how = parser.add_argument_group("how to quantize")
    how.add_argument("--recipe", default="autoround", choices=RECIPES, help="default: %(default)s")
    how.add_argument("--iters", type=int, metavar="N", help="steps a block (default: recipe)")
    how.add_argument("--nsamples", type=int, default=128, metavar="N", help="default: %(default)s")
    how.add_argument("--seqlen", type=int, default=1024, metavar="N", help="tokens a sample (default: %(default)s)")
    how.add_argument("--seeds", type=int, nargs="+", default=[42], help="one tuned checkpoint each (default: 42)")
    how.add_argument("--device", default="auto", help="default: %(default)s")
    how.add_argument("--batch-size", type=int, default=250, metavar="N", help="problems at once (default: %(default)s)")
    demand = parser.add_argument_group("what to demand of our tuned checkpoints")
    demand.add_argument("--max-ppl", type=_limit, nargs="+", default=[], metavar="BITS:PPL", help="e.g. 4:32.2 3:34.2")
    demand.add_argument("--min-accuracy", type=_limit, nargs="+", default=[], metavar="BITS:SHARE", help="e.g. 3:.98")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args()
    if args.iters == 0 or (args.iters is None and not RECIPES[args.recipe].iters):
        parser.error("the tuned rows need steps; rounding to nearest is measured anyway")
    return args


if __name__ == "__main__":
    sys.exit(main())
