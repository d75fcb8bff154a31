"""Command line: ``vllm-autoround calibrate | gate | inspect``; ``python -m calibrate`` is the first of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from calibrate.config import DEFAULT_DATASET, FORMATS, RECIPES, CalibrationConfig, CalibrationError
from vllm_autoround.format.errors import ManifestError, SchemeError

_RECIPES_HELP = "\n".join(
    f"  {name:<16} {r.iters:>5} steps of {r.batch_size} x {r.seqlen} tokens, {r.nsamples} samples, "
    f"lr {r.lr or ('1/iters' if r.iters else '-')}"
    for name, r in RECIPES.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``vllm-autoround``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-autoround", description="Low-bit LLMs: calibrate a checkpoint, gate its accuracy, inspect it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add_arguments, summary in (
        ("calibrate", _add_calibrate, "quantize a Hugging Face causal LM into a checkpoint for vLLM"),
        ("gate", _add_gate, "compare the checkpoint's task score with the original model's"),
        ("inspect", _add_inspect, "show what a checkpoint holds"),
    ):
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add_arguments(command)
    return _run(parser.parse_args(argv))


def calibrate_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m calibrate``."""
    return main(["calibrate", *(sys.argv[1:] if argv is None else argv)])


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    defaults = CalibrationConfig()
    parser.usage = "%(prog)s MODEL OUT [options]"
    parser.epilog = f"recipes:\n{_RECIPES_HELP}\n\nserve the result with: vllm serve OUT --quantization autoround"
    parser.add_argument("model", metavar="MODEL", help="Hub id or local folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist or be empty")
    what = parser.add_argument_group("what to make")
    what.add_argument("--scheme", default=defaults.scheme, help="W2A16 to W8A16, or with _ASYM (default: %(default)s)")
    what.add_argument(
        "--group-size",
        type=int,
        default=defaults.group_size,
        metavar="G",
        help="weights sharing a scale: 16, 32, 64, 128, 256, or -1 for one a row (default: %(default)s)",
    )
    what.add_argument("--kv-cache", choices=["fp8"], help="also calibrate KV-cache scales (default: leave it as it is)")
    what.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="NAME",
        help="linear layers to leave as they are: full names or re:PATTERN (default: none; lm_head always is)",
    )
    what.add_argument(
        "--format",
        default=defaults.format,
        choices=FORMATS,
        metavar="NAME",
        help="layout on disk (default: %(default)s)",
    )
    how = parser.add_argument_group("how to tune")
    how.add_argument(
        "--recipe", default=defaults.recipe, choices=RECIPES, metavar="NAME", help="see below (default: %(default)s)"
    )
    how.add_argument("--iters", type=int, metavar="N", help="steps a block; 0 rounds to nearest (default: recipe)")
    how.add_argument("--batch-size", type=int, metavar="N", help="samples a step (default: recipe)")
    how.add_argument("--lr", type=float, help="first learning rate, falling to 0 linearly (default: recipe)")
    how.add_argument(
        "--gradient-accumulate-steps",
        type=int,
        default=defaults.gradient_accumulate_steps,
        metavar="N",
        help="batches a step (default: %(default)s)",
    )
    how.add_argument(
        "--seed", type=int, default=defaults.seed, help="of data order and minibatches (default: %(default)s)"
    )
    data = parser.add_argument_group("on what data")
    data.add_argument(
        "--dataset",
        default=DEFAULT_DATASET,
        help=".json, .jsonl or .txt file (plain or .gz; objects with a 'text'), or Hub id (default: %(default)s)",
    )
    data.add_argument("--nsamples", type=int, metavar="N", help="samples (default: recipe)")
    data.add_argument(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens a sample; shorter texts are joined, longer ones cut (default: recipe)",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--device", default=defaults.device, help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")
    where.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s OUT --baseline MODEL [options]"
    parser.epilog = "exit status: 0 passed, 1 failed, 2 bad input"
    parser.add_argument("model", metavar="OUT", help="the quantized checkpoint")
    parser.add_argument("--baseline", required=True, metavar="MODEL", help="the original model: folder or Hub id")
    parser.add_argument("--task", default="gsm8k", help="lm-eval task (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tasks-dir", type=Path, metavar="DIR", help="folder with lm-eval task definitions")
    source.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="score on a local .jsonl file (plain or .gz) in GSM8K's format; its first problems become the examples",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="problems to score (default: all)")
    parser.add_argument("--num-fewshot", type=int, default=5, metavar="N", help="examples (default: %(default)s)")
    parser.add_argument(
        "--min-recovery",
        type=float,
        default=0.98,
        metavar="R",
        help="least score relative to the baseline (default: %(default)s)",
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="vLLM's context limit (default: the model's)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON result (default: OUT/gate.json)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="OUT", type=Path)
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _run(args: argparse.Namespace) -> int:
    # The commands import torch, transformers or datasets; --help must not wait for them.
    try:
        match args.command:
            case "calibrate":
                return _calibrate(args)
            case "gate":
                return _gate(args)
            case _:
                return _inspect(args)
    except (CalibrationError, SchemeError, ManifestError) as error:
        for line in str(error).splitlines():
            print(f"vllm-autoround {args.command}: error: {line}", file=sys.stderr)
        return 2


def _calibrate(args: argparse.Namespace) -> int:
    from calibrate.inspection import inspect_checkpoint, inspection_table
    from calibrate.pipeline import calibrate
    from calibrate.tuning import NonFiniteError

    settings = {key: value for key, value in vars(args).items() if key not in ("command", "model", "out")}
    settings["ignore"] = tuple(args.ignore)
    try:
        report = calibrate(args.model, args.out, **settings)
    except NonFiniteError as error:
        print(f"vllm-autoround calibrate: stopped, nothing was written: {error}", file=sys.stderr)
        return 1
    print(inspection_table(inspect_checkpoint(args.out)))
    print(f"\n{report['seconds']:.0f} s; report in {args.out / 'report.json'}")
    print(f"serve it with: vllm serve {args.out} --quantization autoround")
    return 0


def _gate(args: argparse.Namespace) -> int:
    from calibrate.gate import GateConfig, run_gate

    fields = {key: value for key, value in vars(args).items() if key != "command"}
    return 0 if run_gate(GateConfig(**fields)).passed else 1


def _inspect(args: argparse.Namespace) -> int:
    from calibrate.inspection import inspect_checkpoint, inspection_table

    inspection = inspect_checkpoint(args.checkpoint)
    print(json.dumps(inspection.as_json(), indent=2) if args.json else inspection_table(inspection))
    return 0
