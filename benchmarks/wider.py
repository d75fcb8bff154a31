"""Does what small models say hold at width 1,024? A Llama is trained on the spot and then quantized by every recipe.

    python -m benchmarks.wider

The text is what the machine's Python brought along, or --text; the model never sees the held-out part, and neither does
the calibration. Every checkpoint is written, read back and judged as it is served. With --work the trained model stays
in a folder, and the next run with the same options begins with it; results are written after every row.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.corpus import installed_text, read_corpus, train_tokenizer
from benchmarks.evaluation import check_levels, forget, perplexity, read_windows, served_model
from benchmarks.peer import run_auto_round
from benchmarks.pretraining import token_stream, train
from benchmarks.provenance import RESULTS, write_result
from benchmarks.variants import HELP, base_of, recipe_of, variant
from calibrate import calibrate
from calibrate.config import Recipe
from calibrate.data import load_samples
from calibrate.plan import resolve_device
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

_SEED = 42  # of text and training
_HEAD_DIM = 64
_HEADS_PER_KV = 4
_CALIBRATION_TEXTS = 2000  # of which a seed draws its samples
_PEER = "autoround"  # auto-round's default
_VARIANTS = ["fast", "default", "autoround", "default:batch_size=4", "default:batch_size=8"]
# Options that the trained model depends on.
_MODEL_OPTIONS = ("text", "megabytes", "vocabulary", "width", "mlp", "layers", "minutes", "batch", "rate", "seqlen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    scheme: str
    weights: str  # who made them
    seed: int | None = None
    ppl: float
    seconds: float | None = None  # to quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What every contestant gets."""

    model: Path
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    texts: Path  # training text for the calibration
    windows: Tensor  # [W, T] token ids, held out

    def original(self) -> Row:
        """The model itself."""
        with served_model(self.model, None, self.device) as model:
            return Row(scheme="bf16", weights="original", ppl=perplexity(model, self.windows))

    def ours(self, scheme: str, seed: int, name: str, recipe: Recipe) -> Row:
        """A checkpoint of ours."""
        forget()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "checkpoint"
            samples = self._samples(seed, recipe).tolist()
            settings = asdict(recipe)
            report = calibrate(
                self.model, out, scheme=scheme, dataset=samples, device=str(self.device), seed=seed, **settings
            )
            return self._judge(scheme, f"ours, {name}", seed, out, report["seconds"])

    def peer(self, scheme: str, seed: int, recipe: Recipe) -> Row:
        """A checkpoint of auto-round's."""
        forget()
        kind = QuantScheme.parse(scheme).weights
        named, group_size = scheme, None
        if isinstance(kind, Integer):
            named, group_size = f"W{kind.bits}A16", kind.group_size or -1
        with tempfile.TemporaryDirectory() as folder:
            run = run_auto_round(
                self.model,
                Path(folder),
                self._samples(seed, recipe),
                scheme=named,
                group_size=group_size,
                symmetric=kind.symmetric,
                recipe=recipe,
                seed=seed,
                device=self.device,
            )
            [checkpoint] = {path.parent for path in Path(folder).rglob("config.json")}
            return self._judge(scheme, "auto-round", seed, checkpoint, run.seconds)

    def _samples(self, seed: int, recipe: Recipe) -> Tensor:
        return load_samples(
            str(self.texts),
            self.tokenizer,
            seqlen=recipe.seqlen,
            nsamples=recipe.nsamples,
            seed=seed,
            vocabulary=len(self.tokenizer),
        )

    def _judge(self, scheme: str, weights: str, seed: int, checkpoint: Path, seconds: float) -> Row:
        """Evaluate a checkpoint, after checking that its weights are what the scheme says."""
        with served_model(self.model, checkpoint, self.device) as model:
            kind = QuantScheme.parse(scheme).weights
            if isinstance(kind, Integer):
                check_levels(model, kind.bits, kind.group_size)
            ppl = perplexity(model, self.windows)
        return Row(scheme=scheme, weights=weights, seed=seed, ppl=ppl, seconds=seconds)


def main() -> int:
    args = _parse()
    device = resolve_device(args.device)
    variants = {text: _sized(text, args) for text in args.variants}
    peer = _sized(_PEER, args)
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        training = _trained_model(work, args, device)
        tokenizer = AutoTokenizer.from_pretrained(work / "model")
        contest = Contest(
            model=work / "model",
            device=device,
            tokenizer=tokenizer,
            texts=work / "calibration.jsonl.gz",
            windows=read_windows(work / "heldout.txt.gz", tokenizer, length=args.seqlen, count=args.windows),
        )
        protocol = {
            "training": training,
            "variants": {name: asdict(recipe) for name, recipe in variants.items()},
            "peer": asdict(peer) if args.peer else None,
            "windows": list(contest.windows.shape),
        }
        rows = []
        for row in _rows(args, contest, variants, peer):
            print(_line(row), file=sys.stderr, flush=True)
            rows.append(row)
            payload = {"protocol": protocol, "rows": [asdict(row) for row in rows]}
            path = write_result(args.name, payload, args.results)
    print(_table(rows, training))
    print(f"\nwritten to {path}")
    return 0


def _rows(args: argparse.Namespace, contest: Contest, variants: dict[str, Recipe], peer: Recipe) -> Iterator[Row]:
    yield contest.original()
    for scheme in args.schemes:
        for seed in args.seeds:
            for name, recipe in variants.items():
                yield contest.ours(scheme, seed, name, recipe)
            if args.peer:
                yield contest.peer(scheme, seed, peer)


def _trained_model(work: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Model, held-out and calibration text in ``work``; how the model was trained, as JSON. One that is there is used.

    Raises:
        ValueError: the one that is there was trained with other options.
    """
    options = {name: getattr(args, name) for name in _MODEL_OPTIONS}
    options["text"] = [path.name for path in args.text] if args.text else "of the installed Python"
    figures_file = work / "training.json"
    if figures_file.exists():
        figures: dict[str, Any] = json.loads(figures_file.read_text(encoding="utf-8"))
        if figures["options"] != options:
            raise ValueError(f"{work} has a model trained with other options: {figures['options']}")
        return figures
    begin = time.perf_counter()
    corpus = read_corpus(args.text or installed_text(), megabytes=args.megabytes, seed=_SEED)
    tokenizer = train_tokenizer(corpus.training, args.vocabulary)
    with gzip.open(_new(work / "heldout.txt.gz"), "wt", encoding="utf-8") as file:
        file.write(tokenizer.eos_token.join(corpus.heldout))
    with gzip.open(work / "calibration.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in corpus.training[:_CALIBRATION_TEXTS])
    stream = token_stream(tokenizer, corpus.training)
    print(
        f"{len(stream) / 1e6:.1f} M tokens of text in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True
    )
    torch.manual_seed(_SEED)
    model = LlamaForCausalLM(_model_config(args, len(tokenizer))).to(device)
    training = train(
        model,
        stream,
        seqlen=args.seqlen,
        batch=args.batch,
        rate=args.rate,
        seconds=60 * args.minutes,
        seed=_SEED,
    )
    model.to("cpu", torch.bfloat16).eval().save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    figures = {"options": options, "text_sha256": corpus.sha256, **asdict(training)}
    figures_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")  # last: all else is there
    return figures


def _model_config(args: argparse.Namespace, vocabulary: int) -> LlamaConfig:
    heads = args.width // _HEAD_DIM
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // _HEADS_PER_KV),
        head_dim=_HEAD_DIM,
        max_position_embeddings=args.seqlen,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def _new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _sized(text: str, args: argparse.Namespace) -> Recipe:
    """The recipe with this run's tokens a sample, and its samples and steps if it names them."""
    iters = args.iters if base_of(text).iters else None
    return recipe_of(text, iters=iters, nsamples=args.nsamples, seqlen=args.seqlen)


def _table(rows: list[Row], training: dict[str, Any]) -> str:
    trained = (
        f"{training['parameters'] / 1e6:.1f} M parameters, {training['tokens'] / 1e6:.1f} M tokens "
        f"({training['distinct_tokens'] / 1e6:.1f} M distinct), final loss {training['loss']:.3f}"
    )
    head = f"{'scheme':<12}{'weights':<40}{'seed':>6}{'ppl':>10}{'seconds':>9}"
    return "\n".join([trained, head, *map(_line, rows)])


def _line(row: Row) -> str:
    seed = "-" if row.seed is None else row.seed
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    return f"{row.scheme:<12}{row.weights:<40}{seed:>6}{row.ppl:>10.4f}{seconds:>9}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wider", description=__doc__.partition("\n")[0])
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files, or folders of .txt, .py, .md, .rst (plain or .gz) and .jsonl.gz with 'text' (default: Python's "
        "library and the installed packages)",
    )
    model.add_argument("--megabytes", type=float, default=200, metavar="N", help="of text at most (default: 200)")
    model.add_argument("--vocabulary", type=int, default=8192, metavar="N", help="tokens (default: %(default)s)")
    model.add_argument("--width", type=int, default=1024, metavar="N", help="a multiple of 64 (default: %(default)s)")
    model.add_argument("--mlp", type=int, default=2816, metavar="N", help="its width (default: %(default)s)")
    model.add_argument("--layers", type=int, default=8, metavar="N", help="blocks (default: %(default)s)")
    model.add_argument("--minutes", type=float, default=5, metavar="M", help="of training (default: %(default)s)")
    model.add_argument("--batch", type=int, default=32, metavar="N", help="windows a step (default: %(default)s)")
    model.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    model.add_argument(
        "--seqlen", type=int, default=1024, metavar="N", help="tokens a window and a sample (default: %(default)s)"
    )
    model.add_argument("--work", type=Path, metavar="DIR", help="keep the model here, or begin with the one that is")
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--schemes", nargs="+", default=["W4A16", "W3A16", "W2A16G64"], help="default: W4A16 W3A16 W2A16G64"
    )
    what.add_argument(
        "--variants",
        nargs="+",
        type=variant,
        default=_VARIANTS,
        metavar="RECIPE[:FIELD=VALUE,...]",
        help=f"{HELP} (default: {' '.join(_VARIANTS)})",
    )
    what.add_argument(
        "--peer",
        action=argparse.BooleanOptionalAction,
        default=importlib.util.find_spec("auto_round") is not None,
        help="measure auto-round too (default: if it is installed)",
    )
    what.add_argument("--seeds", type=int, nargs="+", default=[_SEED], help="one checkpoint each (default: 42)")
    what.add_argument("--windows", type=int, default=200, metavar="N", help="held out (default: %(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=int, metavar="N", help="steps (default: the recipe's)")
    how.add_argument("--nsamples", type=int, metavar="N", help="default: the recipe's")
    how.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--name", default="wider", help="of the result file (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args()
    if args.width % _HEAD_DIM:
        parser.error(f"--width {args.width} is not a multiple of {_HEAD_DIM}")
    return args


if __name__ == "__main__":
    sys.exit(main())
