"""A whole model from the command line to a served checkpoint: seconds and device memory of `calibrate`.

    python -m benchmarks.end_to_end

The model has a real one's shape, all of its blocks and its vocabulary, and random weights; it was written just before,
so it is read from the page cache. `calibrate` is a child process, started as users start it; the clock runs from the
start of that process to its end, so imports, compilation, loading and the files on disk are in it. The checkpoint must
pass every check, vLLM's loading of it included, before a figure is reported. Exit status 1 when --max-seconds or
--max-gib is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.engine import EngineRun, run_engine
from benchmarks.evaluation import most_levels
from benchmarks.provenance import RESULTS, ROOT, write_result
from benchmarks.shapes import SHAPES, BlockShape
from calibrate.config import RECIPES
from calibrate.inspection import inspect_checkpoint
from calibrate.plan import resolve_device
from vllm_autoround.format.reader import read_manifest, read_tensors, tensor_files
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

_SEED = 42
_STD = 0.02  # of the weights, as transformers initializes them
_EOS = "</s>"  # token 0
_CHECKED_BLOCKS = 3  # first, middle and last: their weights are unpacked


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of `calibrate`. Start-up, blocks and end add up to the total."""

    total: float  # seconds of the process
    reported: float  # what it says itself: without imports
    startup: float  # imports, loading, tokens, inputs of the first block
    blocks: float
    end: float  # what is outside the blocks, the remaining files, the summary
    first: float  # seconds of the first block, compilation included
    later: float | None  # seconds, mean of the later blocks; None if there are none
    phases: dict[str, float]  # of a later block, in the mean
    peak_gib: float | None  # device memory; None on the CPU
    host_gib: float  # resident, mapped weights included


def main() -> int:
    args = _parse()
    device = resolve_device(args.device)
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        begin = time.perf_counter()
        _make_model(model, shape, args.layers, args.vocabulary, args.seqlen, device)
        _write_texts(Path(folder) / "texts.jsonl", args.nsamples, args.seqlen, args.vocabulary)
        print(f"model made in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        command = _command(args)
        run = _calibrate(command, Path(folder))
        begin = time.perf_counter()
        checked = _check(model, out, args.scheme, args.layers, device)
        print(f"{checked} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
        inspection = inspect_checkpoint(out).as_json()
        served = run_engine(out) if args.serve else None
    print(_table(run, served))
    misses = list(_misses(run, args.max_seconds, args.max_gib))
    payload = {
        "protocol": {
            "shape": args.shape,
            "block": asdict(shape),
            "layers": args.layers,
            "vocabulary": args.vocabulary,
            "calibrate": command,
        },
        "run": asdict(run),
        "checked": checked,
        "checkpoint": inspection,
        "served": None if served is None else asdict(served),
        "misses": misses,
    }
    print(f"\nwritten to {write_result(args.name, payload, args.results)}")
    for miss in misses:
        print(f"end_to_end: {miss}", file=sys.stderr)
    return 1 if misses else 0


def _make_model(
    folder: Path, shape: BlockShape, layers: int, vocabulary: int, seqlen: int, device: torch.device
) -> None:
    """Write a Llama with random bfloat16 weights, a block a file, never more than one of them in memory."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(seqlen, 8192),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=0,
    )
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(_SEED)
    weight_map: dict[str, str] = {}
    for index, sizes in enumerate(_files(shape, layers, vocabulary), start=1):
        name = f"model-{index:05}-of-{layers + 2:05}.safetensors"
        tensors = {tensor: _random(size, generator, device) for tensor, size in sizes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    words = Tokenizer(WordLevel({_word(token): token for token in range(vocabulary)}, unk_token=_EOS))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=_EOS).save_pretrained(folder)
    _leave_device(device)


def _files(shape: BlockShape, layers: int, vocabulary: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensor name -> size, file by file."""
    yield {"model.embed_tokens.weight": (vocabulary, shape.hidden)}
    for index in range(layers):
        block = f"model.layers.{index}"
        norms = ("input_layernorm", "post_attention_layernorm")
        yield {
            **{f"{block}.{name}.weight": size for name, size in shape.linears().items()},
            **{f"{block}.{name}.weight": (shape.hidden,) for name in norms},
        }
    yield {"model.norm.weight": (shape.hidden,), "lm_head.weight": (vocabulary, shape.hidden)}


def _random(size: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """A weight on the CPU, drawn on the device; ones for a norm."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    weight = torch.empty(size, dtype=torch.bfloat16, device=device)
    return weight.normal_(std=_STD, generator=generator).cpu()


def _word(token: int) -> str:
    # Not "0" for the end of text: special tokens are found within words, too.
    return str(token) if token else _EOS


def _write_texts(path: Path, nsamples: int, seqlen: int, vocabulary: int) -> None:
    """As many texts of ``seqlen`` words, each a token that is not the end of text."""
    tokens = torch.randint(1, vocabulary, (nsamples, seqlen), generator=torch.Generator().manual_seed(_SEED))
    lines = [json.dumps({"text": " ".join(map(_word, row))}) for row in tokens.tolist()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _command(args: argparse.Namespace) -> list[str]:
    """`calibrate`'s arguments, to be run in the folder with model and texts."""
    command = ["model", "out", "--scheme", args.scheme, "--recipe", args.recipe, "--dataset", "texts.jsonl"]
    command += ["--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen), "--device", args.device]
    return command if args.iters is None else [*command, "--iters", str(args.iters)]


def _calibrate(command: list[str], folder: Path) -> Run:
    """Run ``python -m calibrate`` and time it from outside; inside its blocks, by its report.

    Raises:
        RuntimeError: it failed.
    """
    environment = {
        "HF_HUB_OFFLINE": "1",  # everything is local
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "calibrate", *command],
        cwd=folder,
        env=environment,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    finished = []  # when each block's line came
    for line in child.stderr:
        if line.startswith("model.layers."):
            finished.append(time.perf_counter() - begin)
        print(line, end="", file=sys.stderr, flush=True)
    status = child.wait()
    total = time.perf_counter() - begin
    if status:
        raise RuntimeError(f"calibrate ended with status {status}")
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    return _run(report, total, finished)


def _run(report: dict[str, Any], total: float, finished: list[float]) -> Run:
    first, *later = report["blocks"]
    if len(finished) != 1 + len(later):
        raise RuntimeError(f"calibrate announced {len(finished)} blocks and reports {1 + len(later)}")
    startup = finished[0] - first["seconds"]
    names = dict.fromkeys(name for block in later for name in block["phases"])
    peak = report["peak_memory"]
    return Run(
        total=total,
        reported=report["seconds"],
        startup=startup,
        blocks=finished[-1] - startup,
        end=total - finished[-1],
        first=first["seconds"],
        later=sum(block["seconds"] for block in later) / len(later) if later else None,
        phases={name: sum(block["phases"].get(name, 0.0) for block in later) / len(later) for name in names},
        peak_gib=peak["device_mib"] / 1024 if "device_mib" in peak else None,
        host_gib=peak["host_mib"] / 1024,
    )


def _check(model: Path, out: Path, scheme: str, layers: int, device: torch.device) -> str:
    """The checkpoint is whole: what was looked at, in words.

    Raises:
        ValueError: a layer that is missing, not of the scheme or not near its original; a tensor that is not finite; a
            tensor that should be the original's and is not.
    """
    manifest, originals = read_manifest(out), tensor_files(model)
    expected = {name.removesuffix(".weight") for name in originals if name.endswith("_proj.weight")}
    if manifest.schemes.keys() != expected:
        raise ValueError(f"{len(manifest.schemes)} layers are quantized, {len(expected)} should be")
    tensors = kept = 0
    for name, tensor in read_tensors(out):
        tensors += 1
        if tensor.is_floating_point() and not tensor.to(torch.bfloat16).isfinite().all():
            raise ValueError(f"{name} is not finite")
        if name in originals:
            kept += 1
            if not torch.equal(tensor, _read(originals, name)):
                raise ValueError(f"{name} is not quantized and differs from the original")
    if kept != len(originals) - len(expected):
        raise ValueError(f"{kept} tensors are the original's, {len(originals) - len(expected)} should be")
    blocks = sorted({round(part * (layers - 1) / (_CHECKED_BLOCKS - 1)) for part in range(_CHECKED_BLOCKS)})
    chosen = [layer for layer in manifest.schemes if int(layer.split(".")[2]) in blocks]
    files = tensor_files(out)
    for layer in chosen:
        packed = {suffix: _read(files, f"{layer}.{suffix}") for suffix in manifest.suffixes(layer)}
        weight = manifest.layout_of(layer).from_tensors(packed, manifest.schemes[layer]).dequantize()
        _check_weight(layer, weight.to(device), _read(originals, f"{layer}.weight").to(device), scheme)
    _leave_device(device)
    return (
        f"checked: {tensors} tensors are finite, {kept} of them the original's, {len(chosen)} layers of blocks "
        f"{', '.join(map(str, blocks))} are quantized and near theirs"
    )


def _check_weight(layer: str, weight: Tensor, original: Tensor, scheme: str) -> None:
    kind = QuantScheme.parse(scheme).weights
    if isinstance(kind, Integer) and most_levels(weight, kind.group_size) > 1 << kind.bits:
        raise ValueError(f"{layer} is not quantized to {kind.bits} bits")
    # Weights of another layer, all random, would be at 2 or so, and zeros at 1; two bits round to about .15.
    error = (weight.float() - original.float()).square().mean() / original.float().square().mean()
    if not error < 0.5:
        raise ValueError(f"{layer} is far from the original: relative squared error {error:.2f}")


def _read(files: dict[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _leave_device(device: torch.device) -> None:
    """Give the device's memory back: it is for the child process that comes next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _misses(run: Run, max_seconds: float | None, max_gib: float | None) -> Iterator[str]:
    """A line for every limit that is missed, or that nothing was measured for."""
    if max_seconds is not None and run.total > max_seconds:
        yield f"{run.total:.1f} s miss the limit {max_seconds}"
    if max_gib is not None and run.peak_gib is None:
        yield "--max-gib has a limit, but there is no device memory to measure on the CPU"
    elif max_gib is not None and run.peak_gib is not None and run.peak_gib > max_gib:
        yield f"{run.peak_gib:.2f} GiB of device memory miss the limit {max_gib}"


def _table(run: Run, served: EngineRun | None) -> str:
    """The run in seconds, with the phases of a later block; then what vLLM took."""
    values = {
        "total": run.total,
        "start-up": run.startup,
        "blocks": run.blocks,
        "first": run.first,
        "later": run.later,
        "end": run.end,
        "peak GiB": run.peak_gib,
        "host GiB": run.host_gib,
    }
    lines = [
        "".join(f"{name:>10}" for name in values),
        "".join(f"{'-' if value is None else format(value, '.2f'):>10}" for value in values.values()),
    ]
    if run.later is not None:
        shares = {phase: 100 * seconds / run.later for phase, seconds in run.phases.items()}
        parts = [f"{phase} {share:.0f}" for phase, share in shares.items() if share >= 0.5]
        lines.append("a later block, in hundredths: " + ", ".join(parts))
    if served is not None:
        lines.append(f"vLLM: loaded in {served.load_seconds:.1f} s, first request {served.generate_seconds:.1f} s")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what to measure")
    what.add_argument("--scheme", default="W4A16", help="default: %(default)s")
    what.add_argument("--recipe", default="default", choices=RECIPES, metavar="NAME", help="default: %(default)s")
    what.add_argument("--shape", default="llama-3-8b", choices=SHAPES, help="default: %(default)s")
    what.add_argument("--layers", type=int, default=32, metavar="N", help="blocks (default: %(default)s)")
    what.add_argument("--vocabulary", type=int, default=128_256, metavar="N", help="tokens (default: %(default)s)")
    what.add_argument(
        "--serve", action=argparse.BooleanOptionalAction, default=True, help="load the checkpoint with vLLM, too"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=int, metavar="N", help="steps (default: the recipe's)")
    how.add_argument("--nsamples", type=int, default=128, metavar="N", help="samples (default: %(default)s)")
    how.add_argument("--seqlen", type=int, default=2048, metavar="N", help="tokens a sample (default: %(default)s)")
    how.add_argument("--device", default="auto", help="default: %(default)s")
    how.add_argument(
        "--folder", type=Path, metavar="DIR", help="for model and checkpoint, 50 GB free (default: the system's)"
    )
    demand = parser.add_argument_group("what to demand")
    demand.add_argument("--max-seconds", type=float, metavar="S", help="of the whole process, e.g. 150")
    demand.add_argument("--max-gib", type=float, metavar="GIB", help="of device memory, e.g. 14")
    parser.add_argument("--name", default="end_to_end", help="of the result file (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args()
    if args.serve and importlib.util.find_spec("vllm") is None:
        parser.error("vLLM is not installed; --no-serve leaves it out")
    return args


if __name__ == "__main__":
    sys.exit(main())
