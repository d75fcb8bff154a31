"""A Llama trained from scratch within a time limit, in bfloat16 autocast with float32 parameters."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.peer import synchronize

_WARM_UP = 0.03  # share of the time
_FINAL_RATE = 0.05  # relative to the highest
_SAID = 10  # times that the loss is printed
_CHUNK = 1024  # texts tokenized at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How it went."""

    parameters: int
    steps: int
    tokens: int  # trained on, repetitions included
    distinct_tokens: int  # in the training text
    loss: float  # mean over the last tenth of the steps
    seconds: float  # without compilation


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Token ids [T] int32 of all texts, each with EOS behind it."""
    parts = []
    for begin in range(0, len(texts), _CHUNK):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[begin : begin + _CHUNK]):
            parts.append(np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32))
    return torch.from_numpy(np.concatenate(parts))


def train(
    model: LlamaForCausalLM, stream: Tensor, *, seqlen: int, batch: int, rate: float, seconds: float, seed: int
) -> Training:
    """AdamW on windows from anywhere in ``stream`` [T], with warm-up and a cosine by the clock.

    Raises:
        FloatingPointError: the loss is not finite at the end.
    """
    device = model.device
    ids, generator = stream.to(device), torch.Generator(device).manual_seed(seed)
    optimizer = _optimizer(model, rate)
    loss_of = torch.compile(_loss) if device.type == "cuda" else _loss
    offsets = torch.arange(seqlen + 1, device=device)
    losses: list[Tensor] = []

    def step(share: float) -> None:
        begins = torch.randint(len(ids) - seqlen, (batch,), generator=generator, device=device)
        loss = loss_of(model, ids[begins[:, None] + offsets].long())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(share)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    step(0.0)  # compiles, and learns nothing: the rate is 0
    losses.clear()
    synchronize(device)
    begin = time.perf_counter()
    said = 0
    while (share := (time.perf_counter() - begin) / seconds) < 1:
        step(share)
        if share * _SAID >= said:
            # Waits for the device, too: the clock is not to run ahead of it by much.
            print(f"{len(losses):6} steps, loss {losses[-1].item():.3f}", file=sys.stderr, flush=True)
            said += 1
    synchronize(device)
    elapsed = time.perf_counter() - begin
    loss = torch.stack(losses[-max(1, len(losses) // 10) :]).mean().item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss} after {len(losses)} steps; lower the rate")
    return Training(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=len(losses),
        tokens=len(losses) * batch * seqlen,
        distinct_tokens=len(ids),
        loss=loss,
        seconds=elapsed,
    )


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of tokens [B, T + 1]."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def _schedule(share: float) -> float:
    """The rate relative to the highest when ``share`` of the time is over."""
    cosine = _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
    return min(share / _WARM_UP, cosine)
