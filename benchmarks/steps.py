"""Where the time of a tuning step goes, and how far each part is from its floor; a GPU is needed.

    python -m benchmarks.steps

Of one decoder block of a real model's shape with random weights: the fused update of all its layers in milliseconds and
bytes a second, beside a copy of as many bytes; a whole step, recorded or eager, the block compiled or not, matrix
products in bfloat16 or FP8, beside a plain bfloat16 forward and backward with weight gradients; and which kernels the
fastest steps consist of.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.evaluation import forget
from benchmarks.profiling import profiled
from benchmarks.provenance import RESULTS, write_result
from benchmarks.shapes import SHAPES, BlockShape
from calibrate import fused_step, steps
from calibrate.activations import quantized_inputs_of
from calibrate.blocks import Block, capture_inputs, find_blocks, run_block
from calibrate.config import Recipe
from calibrate.layer_state import LayerState
from calibrate.rounding import MOST_CLIP, Gradients, Rounding, targets
from calibrate.tuning import _rates, sample_order
from calibrate.verdict import mean_squared_error
from calibrate.workbench import Workbench, WorkingBlock
from vllm_autoround.format.scheme import QuantScheme

_CUDA = torch.device("cuda")
_SEQLEN = 2048
_UPDATES = ["W4A16", "W2A16G64", "W4A16_ASYM", "W4A16G-1", "NVFP4", "MXFP4", "FP8_DYNAMIC"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How a step is run."""

    graphed: bool = False
    compiled: bool = False
    fp8: bool = False


_FASTEST = _How(graphed=True, compiled=True)


def main() -> int:
    args = _parse()
    shape = SHAPES[args.shape]
    torch.manual_seed(0)
    updates = [_time_update(scheme, shape) for scheme in args.schemes]
    copied = _time_copy(14 * shape.parameters())
    print(f"{'update of a block':<20}{'ms':>8}{'GB/s':>8}   (copy of 14 bytes a weight: {copied:.3f} ms)")
    for row in updates:
        print(f"{row['scheme']:<20}{row['ms']:>8.3f}{row['gb_s']:>8.0f}")
    rows = []
    for batch in args.batches:
        for compiled in (False, True):
            rows.append(
                {"what": "floor", "compiled": compiled, "batch": batch, "ms": _time_floor(shape, batch, compiled)}
            )
        for scheme in args.step_schemes:
            for how in (_How(), _How(graphed=True), _FASTEST, replace(_FASTEST, fp8=True)):
                rows.append(_time_step(scheme, shape, batch, how))
                print(rows[-1], flush=True)
    payload = {"shape": args.shape, "seqlen": _SEQLEN, "copy_ms": copied, "updates": updates, "steps": rows}
    print(f"\n{'step':<12}{'batch':>6}{'graph':>7}{'compiled':>9}{'fp8':>7}{'ms':>9}{'peak GiB':>9}")
    for row in rows:
        peak = f"{row['peak_gib']:.2f}" if "peak_gib" in row else "-"
        print(
            f"{row['what']:<12}{row['batch']:>6}{row.get('graphed', '-')!s:>7}{row['compiled']!s:>9}"
            f"{row.get('fp8', '-')!s:>7}{row['ms']:>9.2f}{peak:>9}"
        )
        if "kernels" in row:
            print("".join(f"{kind:>24} {time:.2f}" for kind, time in row["kernels"]["kinds"].items()))
    print(f"\nwritten to {write_result('steps', payload, args.results)}")
    return 0


def _time_update(scheme: str, shape: BlockShape) -> dict[str, Any]:
    """The fused update of every layer once, on memory that does not fit in the cache."""
    kind = QuantScheme.parse(scheme).weights
    calls = []
    for rows, columns in shape.linears().values():
        weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=_CUDA)
        [target] = targets([weight], kind)
        rounding = Rounding.nearest(target).clone()
        grad, out = 1e-4 * torch.randn_like(weight), torch.empty_like(weight)
        finite, rate = torch.tensor(True, device=_CUDA), torch.tensor([163.0, 0.002], device=_CUDA)
        calls.append((target, rounding, Gradients.means(rounding), grad, rate, out, finite))

    def update() -> None:
        for call in calls:
            fused_step.fused_sign_step(*call, momentum=0.7, most_clip=2.0)

    milliseconds = _milliseconds(update)
    return {"scheme": scheme, "ms": milliseconds, "gb_s": 14 * shape.parameters() / milliseconds / 1e6}


def _time_copy(traffic: int) -> float:
    """Milliseconds of a copy that reads and writes ``traffic`` bytes in total."""
    source = torch.empty(traffic // 2, dtype=torch.uint8, device=_CUDA)
    target = torch.empty_like(source)
    return _milliseconds(lambda: target.copy_(source))


def _time_step(scheme: str, shape: BlockShape, batch: int, how: _How) -> dict[str, Any]:
    """A step of the tuner as it is, in the mean of many; with its kernels if it is compiled."""
    forget()
    block, working, hidden = _working_block(shape, compile=how.compiled)
    recipe = Recipe(iters=20, batch_size=batch, momentum=0.7, scale_lr=0.5)
    quant = QuantScheme.parse(scheme)
    statistics = {name: _Statistics(hidden) for name in block.linears()}
    inputs = quantized_inputs_of(dict.fromkeys(block.linears(), quant), statistics)  # type: ignore[arg-type]
    with (
        mock.patch.object(steps, "GRAPHED", how.graphed),
        working.quantized_inputs(inputs),
        working.fp8_matmuls(dict.fromkeys(block.linears(), quant) if how.fp8 else {}),
    ):
        working.module.requires_grad_(False)
        layers = []
        for name in block.linears():
            [target] = targets([working.wanted[name]], quant.weights)
            module = working.module.get_submodule(name)
            layers.append(LayerState(module, target, Rounding.nearest(target), recipe, MOST_CLIP))  # type: ignore[arg-type]
        shape_of_steps = (recipe.iters, 1, batch)
        runner = steps.Steps(
            working,
            layers,
            hidden,
            hidden.roll(1, 0),
            None,
            mean_squared_error,
            shape_of_steps,
        )
        order = sample_order(len(hidden), shape_of_steps, torch.Generator().manual_seed(0))
        rates = torch.stack([_rates(recipe, quant.weights)] * len(layers), dim=1)
        run = lambda: runner.run(order, rates, lambda: None)  # noqa: E731
        milliseconds = _milliseconds(run, repeats=3) / recipe.iters
        kernels = {"kernels": asdict(profiled(run, recipe.iters))} if how.compiled else {}
    return {
        "what": scheme,
        **asdict(how),
        "batch": batch,
        "ms": milliseconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        **kernels,
    }


def _time_floor(shape: BlockShape, batch: int, compiled: bool) -> float:
    """Milliseconds of a forward and backward with weight gradients."""
    forget()
    _, working, hidden = _working_block(shape)
    module = working.module.requires_grad_(False)
    weights = [layer.weight.requires_grad_(True) for layer in module.modules() if isinstance(layer, nn.Linear)]
    forward: Callable[..., Tensor] = torch.compile(run_block) if compiled else run_block

    def step() -> None:
        F.mse_loss(forward(module, hidden[:batch], working.arguments).float(), hidden[1 : batch + 1].float()).backward()
        for weight in weights:
            weight.grad = None

    return _milliseconds(step)


class _Statistics:
    """Stands for the statistics of normally distributed inputs."""

    def __init__(self, hidden: Tensor) -> None:
        self.amax = torch.tensor(5.0, device=hidden.device)


def _working_block(shape: BlockShape, *, compile: bool = False) -> tuple[Block, WorkingBlock, Tensor]:
    """A block with random weights, and samples [16, T, H]."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=_SEQLEN,
    )
    with _CUDA:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.randint(0, 1024, (1, _SEQLEN), device=_CUDA)
    captured = capture_inputs(model, find_blocks(model), tokens, torch.bfloat16)
    block = find_blocks(model)[0]
    working = Workbench(_CUDA, torch.bfloat16, compile=compile).load(block, captured.arguments[0])
    return block, working, torch.randn(16, _SEQLEN, shape.hidden, dtype=torch.bfloat16, device=_CUDA)


def _milliseconds(function: Callable[[], Any], repeats: int = 20) -> float:
    """Median of single runs, by the device's clock, after three to warm up."""
    times = []
    for run in range(3 + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times += [begin.elapsed_time(end)] if run >= 3 else []
    return sorted(times)[len(times) // 2]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES, help="default: %(default)s")
    parser.add_argument("--schemes", nargs="+", default=_UPDATES, help="to time the update of")
    parser.add_argument("--step-schemes", nargs="*", default=["W4A16", "NVFP4"], help="to time whole steps of")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8], help="samples a step")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
