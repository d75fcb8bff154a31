"""What the quality benchmark measures, with plain transformers: perplexity, divergence, accuracy on word problems."""

from __future__ import annotations

import gc
import gzip
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from benchmarks.paired import RIGHT, WRONG
from calibrate.activations import QuantizedInput
from calibrate.blocks import find_blocks
from calibrate.linear import make_working, quantized_inputs
from vllm_autoround.format.reader import dequantized_state_dict, read_manifest, read_tensors

Problem = dict[str, str]  # GSM8K's format: "question", and "answer" that ends in "#### N"

STOP = "Question:"
_TAIL = 12  # the tokens at a row's end in which STOP must show


def forget() -> None:
    """Every contestant starts with free memory and compiles for itself."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def served_model(folder: Path, checkpoint: Path | None, device: torch.device) -> Iterator[PreTrainedModel]:
    """The model in ``folder`` in bfloat16 or, of a checkpoint in any dialect, what it stands for.

    Weights are dequantized; inputs of layers whose scheme quantizes activations are fake-quantized, with the
    checkpoint's own scales.

    Raises:
        ValueError: a tensor of the checkpoint that the model lacks, or one of the model's that it does not set.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    inputs = {}
    if checkpoint is not None:
        missing, unexpected = model.load_state_dict(dequantized_state_dict(checkpoint, torch.bfloat16), strict=False)
        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        if wrong := unexpected or sorted(set(missing) - tied):
            raise ValueError(f"{len(wrong)} tensors do not fit {type(model).__name__}, the first is {wrong[0]}")
        inputs = _input_types(checkpoint, device)
    with quantized_inputs(make_working(model.to(device)), inputs):
        yield model


def _input_types(checkpoint: Path, device: torch.device) -> dict[str, QuantizedInput]:
    """Layer -> how its input is quantized."""
    scalars = dict(read_tensors(checkpoint, (".input_scale", ".input_global_scale")))
    inputs = {}
    for layer, scheme in read_manifest(checkpoint).schemes.items():
        if scheme.activations is not None:
            scalar = scalars.get(f"{layer}.{scheme.activations.static}")
            scale = None if scalar is None else scalar.float().reshape(1).to(device)
            inputs[layer] = QuantizedInput(scheme.activations, scale)
    return inputs


def check_levels(model: PreTrainedModel, bits: int, group_size: int | None) -> None:
    """Every linear layer of the blocks takes at most 2**bits distinct, finite values in each group of inputs.

    Raises:
        ValueError: a layer that does not, by name: it is not the result of such a quantization.
    """
    for block in find_blocks(model):
        for name, layer in block.linears().items():
            levels = most_levels(layer.weight.detach(), group_size)
            if levels > 1 << bits or not layer.weight.isfinite().all():
                raise ValueError(
                    f"{block.name}.{name} has {levels} values in a group, {1 << bits} is the most, or is not finite"
                )


def most_levels(weight: Tensor, group_size: int | None) -> int:
    """The greatest number of distinct values in a group of weight [N, K]."""
    ordered = weight.unflatten(-1, (-1, group_size or weight.shape[1])).sort(-1).values
    return 1 + int((ordered.diff(dim=-1) != 0).sum(-1).max())


def read_windows(path: Path, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int) -> Tensor:
    """The first windows [count, length] of a gzipped text, tokenized as a whole."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(), verbose=False).input_ids)
    windows = ids[: len(ids) // length * length].unflatten(0, (-1, length))
    if len(windows) < count:
        raise ValueError(f"{path} gives {len(windows)} windows of {length} tokens, {count} are needed")
    return windows[:count]


def read_problems(path: Path) -> list[Problem]:
    """Problems of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean negative log likelihood over all predicted tokens of windows [W, T]."""
    total = 0.0
    for part in windows.split(8):
        ids = part.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


@torch.no_grad()
def divergence(model: PreTrainedModel, original: PreTrainedModel, windows: Tensor) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the model's next-token distributions from the original's, over all
    positions of windows [W, T].

    It sees every change of a distribution; perplexity sees only what becomes of the text's own tokens, which may gain.
    """
    total = 0.0
    for part in windows.split(8):
        ids = part.to(model.device)
        theirs, mine = (net(ids, use_cache=False).logits.float().log_softmax(-1) for net in (original, model))
        total += F.kl_div(mine, theirs, reduction="sum", log_target=True).item()
    return total / windows.numel()


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Problem],
    problems: list[Problem],
    *,
    batch_size: int,
) -> str:
    """`RIGHT` or `WRONG` for each problem: whether the greedy answer, after the examples, ends in the right number."""
    shots = "".join(f"Question: {example['question']}\nAnswer: {example['answer']}\n\n" for example in examples)
    marks = ""
    for begin in range(0, len(problems), batch_size):
        part = problems[begin : begin + batch_size]
        prompts = [f"{shots}Question: {problem['question']}\nAnswer:" for problem in part]
        answers = generate(model, tokenizer, prompts)
        for answer, problem in zip(answers, part, strict=True):
            marks += RIGHT if _number(answer) == _number(problem["answer"]) else WRONG
    return marks


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Greedy continuations of at most 256 tokens, each up to BOS, EOS or STOP."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    prompt_length = inputs.input_ids.shape[1]
    ends = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        max_new_tokens=256,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[_StopAtText(tokenizer, prompt_length)],
    )
    return [_decode(tokenizer, row, ends) for row in output[:, prompt_length:].tolist()]


class _StopAtText(StoppingCriteria):
    """A row is done when STOP is among its last new tokens; generation ends when every row is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = input_ids[:, max(self._prompt_length, input_ids.shape[1] - _TAIL) :].tolist()
        self._done = self._done or [False] * len(tails)
        rows = [row for row, done in enumerate(self._done) if not done]
        for row, text in zip(rows, self._tokenizer.batch_decode([tails[row] for row in rows]), strict=True):
            self._done[row] = STOP in text or tails[row][-1] == self._tokenizer.pad_token_id
        return torch.tensor(self._done, device=input_ids.device)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: list[int]) -> str:
    length = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:length]).partition(STOP)[0]


def _number(answer: str) -> str | None:
    """What follows "####" on its line; None without it."""
    _, marker, rest = answer.partition("####")
    return rest.strip().partition("\n")[0].strip().replace(",", "") if marker else None
