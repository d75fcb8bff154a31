"""Command line: ``vllm-autoround calibrate | gate | inspect | convert``; ``python -m calibrate`` is the first."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

from calibrate.config import (
    DEFAULT_DATASET,
    RECIPES,
    CalibrationConfig,
    CalibrationError,
    KVCache,
    Optimizer,
    Precision,
)
from calibrate.formats import FORMATS, subfolder
from vllm_autoround.format.errors import ManifestError, SchemeError

_RECIPES_HELP = "\n".join(
    f"  {name:<16} {r.iters:>5} {r.batch_size:>6} {r.seqlen:>7} {r.nsamples:>8} "
    f"{r.lr or ('1/iters' if r.iters else '-'):>8} {r.fine_lr:>8} {r.scale_lr:>9} {r.input_scale_lr or '-':>14} "
    f"{r.momentum:>9} "
    f"{'yes' if r.scale_search else 'no':>7} {'yes' if r.kl_last_block else 'no':>5} {'yes' if r.gptq else 'no':>5} "
    f"{r.end_to_end_iters or '-':>5} {r.end_to_end_lr if r.end_to_end_iters else '-':>6} {r.tuning_precision:>5}"
    for name, r in RECIPES.items()
)
_RECIPES_HEAD = (
    f"  {'recipe':<16} {'iters':>5} {'batch':>6} {'seqlen':>7} {'nsamples':>8} {'lr':>8} {'fine-lr':>8} "
    f"{'scale-lr':>9} {'input-scale-lr':>14} {'momentum':>9} "
    f"{'search':>7} {'kl':>5} {'gptq':>5} {'e2e':>5} {'e2e-lr':>6} {'prec.':>5}"
)
_SCHEMES_HELP = """schemes:
  W2A16 ... W8A16  integer weights; _ASYM for zero points, G64 or the like for the group size: W3A16_ASYM, W2A16G64
  W4A8_FP8         4-bit integer weights, FP8 activations per token
  FP8 FP8_STATIC FP8_DYNAMIC FP8_BLOCK   weights per tensor, channel, channel, 128 x 128; activations static, static,
                   per token, per 128
  NVFP4 MXFP4 MXFP8, and with A16 behind them for weights only"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Breaks no line inside a name such as compressed-tensors: names are there to be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``vllm-autoround``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-autoround",
        description="Low-bit LLMs: calibrate a checkpoint, gate its accuracy, inspect and convert it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add_arguments, summary in (
        ("calibrate", _add_calibrate, "quantize a Hugging Face causal LM into a checkpoint for vLLM"),
        ("gate", _add_gate, "compare the checkpoint's task score with the original model's"),
        ("inspect", _add_inspect, "show what a checkpoint holds"),
        ("convert", _add_convert, "write a checkpoint in another format, without loss or not at all"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, formatter_class=_HelpFormatter)
        add_arguments(command)
    return _run(parser.parse_args(argv))


def calibrate_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m calibrate``."""
    return main(["calibrate", *(sys.argv[1:] if argv is None else argv)])


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    defaults = SimpleNamespace(**{field.name: field.default for field in fields(CalibrationConfig)})
    parser.usage = "%(prog)s MODEL OUT [options]"
    parser.epilog = (
        f"{_SCHEMES_HELP}\n\n{_RECIPES_HEAD}\n{_RECIPES_HELP}\n\n"
        "serve the result with: vllm serve OUT --quantization autoround"
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or local folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist or be empty")
    what = parser.add_argument_group("what to make")
    what.add_argument(
        "--scheme", default=defaults.scheme, help="of the decoder blocks, see below (default: %(default)s)"
    )
    what.add_argument(
        "--group-size",
        type=int,
        metavar="G",
        help="integer weights sharing a scale: 16, 32, 64, 128, 256, or -1 for one a row (default: 128)",
    )
    what.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PATTERN=SCHEME",
        help="another scheme, or 'ignore', for the layers that a full name, regular expression or re:PATTERN (from the "
        "beginning) stands for; lm_head and the embedding too; can be repeated, the first that matches wins",
    )
    what.add_argument(
        "--layer-config", type=Path, metavar="FILE", help="YAML or JSON of PATTERN: SCHEME, read after --layer"
    )
    what.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN", help="layers to leave as they are (default: none)"
    )
    what.add_argument("--stock-vllm", action="store_true", help="refuse what vLLM cannot serve without the plugin")
    what.add_argument(
        "--kv-cache", choices=get_args(KVCache), help="also calibrate KV-cache scales (default: leave it as it is)"
    )
    what.add_argument(
        "--format",
        nargs="+",
        default=[defaults.format],
        choices=FORMATS,
        metavar="NAME",
        help=f"layout on disk, or several, each in a folder of its own in OUT: {', '.join(FORMATS)} (default: "
        f"{defaults.format})",
    )
    how = parser.add_argument_group("how to tune (default: what the recipe says)")
    how.add_argument(
        "--recipe", default=defaults.recipe, choices=RECIPES, metavar="NAME", help="see below (default: %(default)s)"
    )
    how.add_argument("--iters", type=int, metavar="N", help="steps a block; 0: none")
    how.add_argument("--batch-size", type=int, metavar="N", help="samples a step")
    how.add_argument("--lr", type=float, help="first learning rate, falling to 0 linearly")
    how.add_argument("--fine-lr", type=float, metavar="F", help="share of lr for integers of 4 bits and more")
    how.add_argument("--scale-lr", type=float, metavar="F", help="rate of the scales, relative to their weights'")
    how.add_argument(
        "--input-scale-lr", type=float, metavar="F", help="rate of static scales of inputs, relative to lr"
    )
    how.add_argument("--momentum", type=float, metavar="F", help="share of the mean gradient that a signsgd step keeps")
    how.add_argument(
        "--optimizer",
        choices=get_args(Optimizer),
        help="sign of the gradient's running mean, or AdamW",
    )
    how.add_argument(
        "--tuning-precision",
        choices=get_args(Precision),
        help="of a step's matrix products; fp8 needs Ada, Hopper or Blackwell (forward, more than 4 bits stay bf16); "
        "auto takes it where it is faster and as good",
    )
    how.add_argument(
        "--scale-search",
        action=argparse.BooleanOptionalAction,
        help="start from the best scales of a grid, of inputs too",
    )
    how.add_argument(
        "--kl-last-block",
        action=argparse.BooleanOptionalAction,
        help="tune the last block on the model's output distribution",
    )
    how.add_argument(
        "--gptq",
        action=argparse.BooleanOptionalAction,
        help="without steps: round by GPTQ and coordinate descent instead of to nearest",
    )
    how.add_argument(
        "--end-to-end-iters",
        type=int,
        metavar="N",
        help="one-sample steps after all blocks, on the model's output distribution, on the scales of integers of at "
        "most 3 bits; the whole model is on the device for them; 0: none",
    )
    how.add_argument("--end-to-end-lr", type=float, metavar="F", help="first learning rate of these steps")
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
    data.add_argument(
        "--nsamples",
        type=int,
        metavar="N",
        help="samples, of which one in 16 judges the tuning and is not tuned on (default: recipe)",
    )
    data.add_argument(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens a sample; shorter texts are joined, longer ones cut (default: recipe)",
    )
    data.add_argument(
        "--pad", action="store_true", help="one text a sample: pad shorter ones instead; padding counts nowhere"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--device", default=defaults.device, help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")
    where.add_argument(
        "--torch-compile",
        action=argparse.BooleanOptionalAction,
        help="compile the blocks (default: on a GPU, where they are large enough to pay for it)",
    )
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


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="IN", type=Path, help="a quantized checkpoint in any dialect that inspect reads"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--format", required=True, choices=FORMATS, metavar="NAME", help=", ".join(FORMATS))


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
            case "convert":
                return _convert(args)
            case _:
                return _inspect(args)
    except (CalibrationError, SchemeError, ManifestError) as error:
        for line in str(error).splitlines():
            print(f"vllm-autoround {args.command}: error: {line}", file=sys.stderr)
        return 2


def _calibrate(args: argparse.Namespace) -> int:
    from calibrate.chain import NonFiniteError
    from calibrate.inspection import inspect_checkpoint, inspection_table
    from calibrate.layer_config import parse_layer_rule, read_layer_config
    from calibrate.pipeline import calibrate

    apart = ("command", "model", "out", "layer", "layer_config")
    settings = {key: value for key, value in vars(args).items() if key not in apart}
    settings["layers"] = [parse_layer_rule(rule) for rule in args.layer]
    if args.layer_config is not None:
        settings["layers"] += read_layer_config(args.layer_config)
    try:
        report = calibrate(args.model, args.out, **settings)
    except NonFiniteError as error:
        print(f"vllm-autoround calibrate: stopped, nothing was written: {error}", file=sys.stderr)
        return 1
    folders = [args.out] if len(args.format) == 1 else [args.out / subfolder(name) for name in args.format]
    for folder in folders:
        if not (folder / "config.json").exists():
            print(f"{folder} is for llama.cpp")
            continue
        print(inspection_table(inspect_checkpoint(folder)))
        print(f"serve it with: vllm serve {folder} --quantization autoround\n")
    print(f"{report['seconds']:.0f} s; report in {args.out / 'report.json'}")
    return 0


def _gate(args: argparse.Namespace) -> int:
    from calibrate.gate import GateConfig, run_gate

    fields = {key: value for key, value in vars(args).items() if key != "command"}
    return 0 if run_gate(GateConfig(**fields)).passed else 1


def _convert(args: argparse.Namespace) -> int:
    from calibrate.convert import convert

    report = convert(args.source, args.out, args.format)
    print(
        f"{args.out}: the same weights as {args.source}, bit for bit, as {args.format} ({report['bytes'] / 1e6:.1f} MB)"
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from calibrate.inspection import inspect_checkpoint, inspection_table

    inspection = inspect_checkpoint(args.checkpoint)
    print(json.dumps(inspection.as_json(), indent=2) if args.json else inspection_table(inspection))
    return 0
