"""auto-round, the peer, on our samples: used through its public interface, observed from outside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate.config import Recipe

_DATASET = "benchmark-samples"


@dataclass(frozen=True, slots=True)
class PeerRun:
    """How auto-round got on."""

    seconds: float  # of everything after loading the model, writing the checkpoint included
    block_seconds: list[float]  # one a block, of its tuning and its forwards


def run_auto_round(
    model: Path,
    out: Path,
    samples: Tensor,
    *,
    scheme: str,
    group_size: int | None,
    symmetric: bool,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> PeerRun:
    """Quantize with auto-round's defaults, on exactly ``samples`` [S, T], into a checkpoint of its own format.

    The samples come as one of its registered data sets: that is the way its own data takes. A list of tensors would
    get a padding mask, which costs it the fast attention kernel and the positions that hold the padding token.

    Args:
        scheme: auto-round's name: W4A16, FP8_STATIC, NVFP4, MXFP4 ...
        group_size: of integer weights; None: the scheme's own.

    Raises:
        RuntimeError: it calibrated on other tokens than ``samples``.
    """
    os.environ["AR_DISABLE_DATASET_SUBPROCESS"] = "1"  # nothing to gain from a fork of a process that uses CUDA
    from auto_round import AutoRound
    from auto_round.algorithms.composer import AlgorithmComposer
    from auto_round.calib_dataset import register_dataset

    register_dataset(_DATASET)(lambda **_: _as_dataset(samples))
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    settings: dict[str, Any] = {} if recipe.lr is None else {"lr": recipe.lr}
    if group_size is not None:
        settings |= {"group_size": group_size, "sym": symmetric}
    begin = time.perf_counter()
    tuner = AutoRound(
        network,
        AutoTokenizer.from_pretrained(model),
        scheme=scheme,
        iters=recipe.iters,
        batch_size=recipe.batch_size,
        nsamples=len(samples),
        seqlen=samples.shape[1],
        seed=seed,
        dataset=_DATASET,
        device_map="cpu" if device.type == "cpu" else device.index or 0,
        **settings,
    )
    with _tokens_seen(network) as seen, timed_calls(AlgorithmComposer, "compress_block", device) as block_seconds:
        tuner.quantize_and_save(str(out), format="auto_round")
    seconds = time.perf_counter() - begin
    _check_tokens(torch.cat(seen), samples)
    return PeerRun(seconds, block_seconds)


@contextmanager
def timed_calls(owner: type, method: str, device: torch.device) -> Iterator[list[float]]:
    """Seconds of every call of ``owner.method`` until the end of the block, the device's work included."""
    original: Callable[..., Any] = getattr(owner, method)
    seconds: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = original(*args, **kwargs)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        return result

    setattr(owner, method, timed)
    try:
        yield seconds
    finally:
        setattr(owner, method, original)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _as_dataset(samples: Tensor) -> Any:
    from datasets import Dataset

    rows = samples.tolist()
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


@contextmanager
def _tokens_seen(model: nn.Module) -> Iterator[list[Tensor]]:
    """Token ids [B, T] of every call of the embedding, on the CPU."""
    seen: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].cpu()))
    try:
        yield seen
    finally:
        hook.remove()


def _check_tokens(seen: Tensor, samples: Tensor) -> None:
    if not torch.equal(seen.unique(dim=0), samples.unique(dim=0)):
        raise RuntimeError(f"auto-round calibrated on tokens {list(seen.shape)} that are not the samples given to it")
