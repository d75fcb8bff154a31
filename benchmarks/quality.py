"""Perplexity, divergence and word-problem accuracy of checkpoints, ours beside auto-round's on the same tokens.

    python -m benchmarks.quality --model DIR --calib calib.jsonl.gz --heldout english.heldout.txt.gz \\
        --problems-train word_problems.train.jsonl.gz --problems-test word_problems.test.jsonl.gz \\
        --schemes W4A16 W3A16 W2A16G64 FP8_STATIC NVFP4 MXFP4 --recipes rtn default

Every checkpoint is written, read back and judged as it is served: weights dequantized, activations quantized where the
scheme says so. Exit status 1 when a checkpoint of ours misses --max-ppl, --min-accuracy or --margin.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evaluation import (
    Problem,
    answer_all,
    check_levels,
    divergence,
    forget,
    perplexity,
    read_problems,
    read_windows,
    served_model,
)
from benchmarks.paired import RIGHT, Difference, difference
from benchmarks.peer import run_auto_round
from benchmarks.provenance import RESULTS, write_result
from benchmarks.variants import HELP, recipe_of, variant
from calibrate import calibrate
from calibrate.config import Precision, Recipe
from calibrate.data import load_samples
from calibrate.plan import resolve_device
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

_WINDOW = 1024  # tokens
_WINDOWS = 200
_SHOTS = 5
_PEER = "autoround"  # auto-round's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    scheme: str
    weights: str  # who made them
    seed: int | None = None
    ppl: float
    kl: float  # nats a token, from the original
    accuracy: float
    answers: str  # of each problem, right or wrong; see benchmarks.paired
    seconds: float | None = None  # to quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of our accuracy with auto-round's, on the same problems."""

    scheme: str
    weights: str
    peer: str
    seeds: list[int | None]
    difference: Difference  # by how much ours is higher

    def __str__(self) -> str:
        """A line of the table."""
        line = f"{self.scheme}, {self.weights} beside {self.peer}: accuracy {self.difference.mean:+.4f}"
        return f"{line}, above {self.difference.lower:+.4f} with 95 % confidence"


@dataclass(frozen=True, slots=True)
class Contest:
    """What every contestant gets."""

    model: Path
    original: PreTrainedModel  # the same, loaded
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    windows: Tensor  # [W, T] token ids
    examples: list[Problem]
    problems: list[Problem]
    batch_size: int  # problems generated at once

    def judge(self, scheme: str, weights: str, seed: int | None, checkpoint: Path | None, seconds: float | None) -> Row:
        """Evaluate a checkpoint, after checking that its weights are what the scheme says; None: the model itself."""
        with served_model(self.model, checkpoint, self.device) as model:
            if checkpoint is not None:
                kind = QuantScheme.parse(scheme).weights
                if isinstance(kind, Integer):
                    check_levels(model, kind.bits, kind.group_size)
            answers = answer_all(model, self.tokenizer, self.examples, self.problems, batch_size=self.batch_size)
            row = Row(
                scheme=scheme,
                weights=weights,
                seed=seed,
                ppl=perplexity(model, self.windows),
                kl=divergence(model, self.original, self.windows),
                accuracy=answers.count(RIGHT) / len(answers),
                answers=answers,
                seconds=seconds,
            )
        print(_line(row), file=sys.stderr, flush=True)
        return row

    def ours(self, scheme: str, seed: int, samples: Tensor, name: str, recipe: Recipe) -> Row:
        """A checkpoint of ours."""
        forget()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "checkpoint"
            report = calibrate(
                self.model,
                out,
                scheme=scheme,
                dataset=samples.tolist(),
                device=str(self.device),
                seed=seed,
                **asdict(recipe),
            )
            return self.judge(scheme, f"ours, {name}", seed, out, report["seconds"])

    def peer(self, scheme: str, seed: int, samples: Tensor, iters: int) -> Row:
        """A checkpoint of auto-round's."""
        forget()
        kind = QuantScheme.parse(scheme).weights
        integer = isinstance(kind, Integer)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            run = run_auto_round(
                self.model,
                out,
                samples,
                scheme=f"W{kind.bits}A16" if integer else scheme,
                group_size=(kind.group_size or -1) if integer else None,
                symmetric=kind.symmetric,
                recipe=recipe_of(_PEER, iters=iters),
                seed=seed,
                device=self.device,
            )
            [checkpoint] = {path.parent for path in out.rglob("config.json")}
            return self.judge(scheme, f"auto-round, {iters}", seed, checkpoint, run.seconds)


def main() -> int:
    args = _parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = resolve_device(args.device)
    windows = read_windows(args.heldout, tokenizer, length=_WINDOW, count=min(args.limit or _WINDOWS, _WINDOWS))
    examples, problems = read_problems(args.problems_train)[:_SHOTS], read_problems(args.problems_test)[: args.limit]
    with served_model(args.model, None, device) as original:
        contest = Contest(args.model, original, device, tokenizer, windows, examples, problems, args.batch_size)
        rows = list(_rows(args, contest))
    comparisons = list(_comparisons(rows))
    print(_table(rows, comparisons))
    misses = list(_misses(rows, dict(args.max_ppl), dict(args.min_accuracy)))
    if args.margin is not None:
        misses += _inferior(rows, comparisons, args.margin)
    payload = {
        "protocol": {
            "model": args.model.name,
            "recipes": {name: asdict(recipe) for name, recipe in _recipes(args).items()},
            "peer": asdict(recipe_of(_PEER)),
            "windows": list(contest.windows.shape),
            "problems": len(contest.problems),
            "shots": _SHOTS,
        },
        "rows": [asdict(row) for row in rows],
        "accuracy_beside_auto_round": [asdict(comparison) for comparison in comparisons],
        "misses": misses,
    }
    print(f"\nwritten to {write_result(args.name, payload, args.results)}")
    for miss in misses:
        print(f"quality: {miss}", file=sys.stderr)
    return 1 if misses else 0


def _rows(args: argparse.Namespace, contest: Contest) -> Iterator[Row]:
    yield contest.judge("bf16", "original", None, None, None)
    for scheme in args.schemes:
        for seed in args.seeds:
            for name, recipe in _recipes(args).items():
                if recipe.iters or seed == args.seeds[0]:  # without tuning the seed draws the samples only
                    yield contest.ours(scheme, seed, _samples(args, contest, seed, recipe), name, recipe)
            for iters in args.peer_iters:
                if iters or seed == args.seeds[0]:
                    samples = _samples(args, contest, seed, recipe_of(_PEER, nsamples=args.nsamples))
                    yield contest.peer(scheme, seed, samples, iters)


def _samples(args: argparse.Namespace, contest: Contest, seed: int, recipe: Recipe) -> Tensor:
    """[S, T] token ids."""
    return load_samples(
        str(args.calib),
        contest.tokenizer,
        seqlen=args.seqlen,
        nsamples=recipe.nsamples,
        seed=seed,
        vocabulary=len(contest.tokenizer),
    )


def _recipes(args: argparse.Namespace) -> dict[str, Recipe]:
    """Every recipe in every precision of its steps, with this run's tokens a sample, and its samples if it has some."""
    recipes = {}
    for text in args.recipes:
        recipe = recipe_of(text, nsamples=args.nsamples, seqlen=args.seqlen)
        for precision in args.precisions if recipe.iters and args.precisions else [recipe.tuning_precision]:
            label = f"{text} {precision}" if recipe.iters and args.precisions else text
            recipes[label] = replace(recipe, tuning_precision=precision)
    return recipes


def _misses(rows: list[Row], max_ppl: Mapping[str, float], min_accuracy: Mapping[str, float]) -> Iterator[str]:
    """A line for every limit on the last recipe's mean over seeds that is missed, or that no row was measured for."""
    last = _last_recipe(rows)
    for limits, value_of, missed in (
        (max_ppl, lambda row: row.ppl, lambda value, limit: value > limit),
        (min_accuracy, lambda row: row.accuracy, lambda value, limit: value < limit),
    ):
        for scheme, limit in limits.items():
            values = [value_of(row) for row in rows if row.scheme == scheme and row.weights == last]
            if not values:
                yield f"{scheme} has a limit but was not measured; add it to --schemes"
            elif missed(mean := sum(values) / len(values), limit):
                yield f"{scheme}, {last}: {mean:.3f} misses the limit {limit}"


def _inferior(rows: list[Row], comparisons: list[Comparison], margin: float) -> Iterator[str]:
    """A line for every scheme in which the last recipe's accuracy may be lower than auto-round's by ``margin``, or was
    not compared with it."""
    last = _last_recipe(rows)
    compared = {made.scheme: made for made in comparisons if made.weights == last}
    for scheme in dict.fromkeys(row.scheme for row in rows if row.weights == last):
        if scheme not in compared:
            yield f"{scheme}, {last}: no row of auto-round's has its seeds; add some by --peer-iters"
        elif compared[scheme].difference.lower <= -margin:
            yield f"{compared[scheme]}, not above -{margin}"


def _last_recipe(rows: list[Row]) -> str:
    return next(row.weights for row in reversed(rows) if row.weights.startswith("ours"))


def _comparisons(rows: list[Row]) -> Iterator[Comparison]:
    """Each of our recipes beside the last of auto-round's, by scheme, on the seeds that both have."""
    answers: dict[tuple[str, str], dict[int | None, str]] = {}
    for row in rows:
        answers.setdefault((row.scheme, row.weights), {})[row.seed] = row.answers
    peers = {scheme: weights for scheme, weights in answers if weights.startswith("auto-round")}
    for (scheme, weights), ours in answers.items():
        if scheme in peers and weights.startswith("ours"):
            theirs = answers[scheme, peers[scheme]]
            if seeds := [seed for seed in ours if seed in theirs]:
                found = difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
                yield Comparison(scheme=scheme, weights=weights, peer=peers[scheme], seeds=seeds, difference=found)


def _table(rows: list[Row], comparisons: list[Comparison]) -> str:
    head = f"{'scheme':<14}{'weights':<26}{'seed':>6}{'ppl':>9}{'KL':>9}{'accuracy':>10}{'seconds':>9}"
    return "\n".join([head, *map(_line, rows), *map(str, comparisons)])


def _line(row: Row) -> str:
    seed = "-" if row.seed is None else row.seed
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    return f"{row.scheme:<14}{row.weights:<26}{seed:>6}{row.ppl:>9.3f}{row.kl:>9.4f}{row.accuracy:>10.3f}{seconds:>9}"


def _limit(text: str) -> tuple[str, float]:
    """``"W4A16:32.2"`` -> ("W4A16", 32.2)."""
    scheme, _, limit = text.partition(":")
    return scheme, float(limit)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what to measure")
    what.add_argument("--model", type=Path, required=True, metavar="DIR", help="the original model")
    what.add_argument("--calib", type=Path, required=True, metavar="FILE", help=".jsonl.gz with 'text'")
    what.add_argument("--heldout", type=Path, required=True, metavar="FILE", help=".txt.gz for the perplexity")
    what.add_argument("--problems-train", type=Path, required=True, metavar="FILE", help="examples, GSM8K's format")
    what.add_argument("--problems-test", type=Path, required=True, metavar="FILE", help="problems, GSM8K's format")
    what.add_argument("--schemes", nargs="+", default=["W4A16", "W3A16"], help="default: W4A16 W3A16")
    what.add_argument(
        "--recipes",
        nargs="+",
        type=variant,
        default=["rtn", "default"],
        metavar="RECIPE[:FIELD=VALUE,...]",
        help=f"{HELP} (default: rtn default)",
    )
    what.add_argument(
        "--precisions", nargs="+", choices=get_args(Precision), help="of our steps (default: the recipe's)"
    )
    what.add_argument(
        "--peer-iters", type=int, nargs="*", default=[0, 200], metavar="N", help="of auto-round; none: skip it"
    )
    what.add_argument("--seeds", type=int, nargs="+", default=[42], help="one tuned checkpoint each (default: 42)")
    what.add_argument("--limit", type=int, metavar="N", help="at most N windows and N problems: a smoke run")
    how = parser.add_argument_group("how")
    how.add_argument("--nsamples", type=int, metavar="N", help="default: the recipe's")
    how.add_argument("--seqlen", type=int, default=1024, metavar="N", help="tokens a sample (default: %(default)s)")
    how.add_argument("--device", default="auto", help="default: %(default)s")
    how.add_argument("--batch-size", type=int, default=250, metavar="N", help="problems at once (default: %(default)s)")
    demand = parser.add_argument_group("what to demand of the last of our recipes, in the mean over the seeds")
    demand.add_argument("--max-ppl", type=_limit, nargs="+", default=[], metavar="SCHEME:PPL", help="e.g. W4A16:32.2")
    demand.add_argument(
        "--min-accuracy", type=_limit, nargs="+", default=[], metavar="SCHEME:SHARE", help="e.g. W3A16:.98"
    )
    demand.add_argument(
        "--margin", type=float, metavar="SHARE", help="accuracy non-inferior to auto-round's, paired, e.g. .02"
    )
    parser.add_argument("--name", default="quality", help="of the result file (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 2:
        parser.error(f"--limit is {args.limit}; two problems are the least that can be compared")
    return args


if __name__ == "__main__":
    sys.exit(main())
