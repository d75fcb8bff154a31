"""Text -> calibration samples of equal length.

The rule: texts are shuffled with the seed and read in that order. A text of at least `seqlen` tokens gives one sample,
its first `seqlen` tokens; the rest of it is dropped, so that one long document cannot dominate. Shorter texts are
packed: joined with EOS until `seqlen` tokens are there, cut, and the next pack begins with the next text. Too few
samples is an error.

On request no text is joined with another: each gives a sample, a shorter one is padded, and the padding counts nowhere.
It comes last, where no token of a causal model sees it, and so needs no attention mask.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calibrate.config import CalibrationError, Dataset

_SUFFIXES = (".json", ".jsonl", ".txt")


def load_samples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, seqlen: int, nsamples: int, seed: int, vocabulary: int
) -> Tensor:
    """Calibration samples [nsamples, seqlen] int64, by the rule of this module.

    Args:
        vocabulary: rows of the model's embedding; every token id must be below.

    Raises:
        CalibrationError: an unreadable data set, too little text in it, or token ids that the model does not have.
    """
    texts = _shuffled(dataset, seed)
    samples = list(islice(_pack(_tokenize(texts, tokenizer), seqlen, tokenizer.eos_token_id), nsamples))
    if len(samples) < nsamples:
        raise _too_few(dataset, f"{len(samples)} samples of {seqlen} tokens from {len(texts)} texts", nsamples)
    return _checked(torch.tensor(samples), vocabulary)


class PaddedSamples(NamedTuple):
    """Samples of texts that may be shorter."""

    ids: Tensor  # [S, T] int64
    real: Tensor  # [S, T] bool: no padding


def load_padded_samples(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, seqlen: int, nsamples: int, seed: int, vocabulary: int
) -> PaddedSamples:
    """One sample a text, cut or padded to ``seqlen`` tokens; arguments and errors are those of `load_samples`."""
    texts = _shuffled(dataset, seed)
    documents = [ids[:seqlen] for ids in islice(_tokenize(texts, tokenizer), nsamples)]
    if len(documents) < nsamples:
        raise _too_few(dataset, f"{len(documents)} texts that are not empty", nsamples)
    lengths = torch.tensor([len(ids) for ids in documents])
    # Whatever stands there is not looked at; 0 is an id that every model has.
    padded = torch.tensor([ids + [0] * (seqlen - len(ids)) for ids in documents])
    return PaddedSamples(_checked(padded, vocabulary), torch.arange(seqlen) < lengths[:, None])


def _shuffled(dataset: Dataset, seed: int) -> list[str | Sequence[int]]:
    texts = list(_read(dataset))
    random.Random(seed).shuffle(texts)
    return texts


def _too_few(dataset: Dataset, given: str, needed: int) -> CalibrationError:
    name = dataset if isinstance(dataset, str) else "the data set"
    return CalibrationError(f"{name} gives {given}, {needed} are needed; lower nsamples or seqlen, or give more text")


def _checked(samples: Tensor, vocabulary: int) -> Tensor:
    low, high = samples.min().item(), samples.max().item()
    if low < 0 or high >= vocabulary:
        raise CalibrationError(f"token ids run from {low} to {high}, the model's vocabulary is 0 to {vocabulary - 1}")
    return samples


def _read(dataset: Dataset) -> Iterable[str | Sequence[int]]:
    if not isinstance(dataset, str):
        return dataset
    path = Path(dataset)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if suffixes and suffixes[-1] in _SUFFIXES:
        if not path.is_file():
            raise CalibrationError(f"dataset {dataset} does not exist")
        return _read_file(path, suffixes[-1])
    return _read_hub(dataset)


def _read_file(path: Path, kind: str) -> list[str]:
    """One text a line (.jsonl), an item (.json) or a paragraph, that is, between blank lines (.txt)."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            content = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CalibrationError(f"dataset {path} cannot be read: {error}") from error
    if kind == ".txt":
        return [text for text in content.split("\n\n") if text.strip()]
    # Not splitlines(): JSON strings may hold the other characters that it takes for line ends.
    documents = [content] if kind == ".json" else [line for line in content.split("\n") if line.strip()]
    try:
        rows = [json.loads(document) for document in documents]
    except json.JSONDecodeError as error:
        raise CalibrationError(f"dataset {path} is not valid {kind[1:]}: {error}") from error
    if kind == ".json":
        rows = rows[0]
        if not isinstance(rows, list):
            raise CalibrationError(f"dataset {path} is a JSON {type(rows).__name__}, expected a list of texts")
    return [_text_of(row, f"{path}, item {index}") for index, row in enumerate(rows)]


def _read_hub(name: str) -> list[str]:
    # Imported here: it takes seconds and local files do not need it.
    from datasets import load_dataset  # noqa: PLC0415

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # the library raises a dozen unrelated types for "cannot be had"
        raise CalibrationError(
            f"dataset {name} is neither a local {', '.join(_SUFFIXES)} file (plain or .gz) nor loadable from the Hub: "
            f"{type(error).__name__}: {error}"
        ) from error
    return [_text_of(row, f"{name}, row {index}") for index, row in enumerate(rows)]


def _text_of(row: object, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise CalibrationError(f"{where} is neither a string nor an object with a string under 'text'")
    return text


def _tokenize(texts: Sequence[str | Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each text that has any."""
    for text in texts:
        # A text may be far longer than the model reads; `verbose` is the tokenizer's warning about that.
        ids = tokenizer(text, verbose=False).input_ids if isinstance(text, str) else list(text)
        if ids:
            yield ids


def _pack(documents: Iterable[list[int]], seqlen: int, eos: int | None) -> Iterator[list[int]]:
    """Samples of exactly ``seqlen`` token ids, by the rule of this module."""
    pack: list[int] = []
    for ids in documents:
        if len(ids) >= seqlen:
            yield ids[:seqlen]
            continue
        pack += ids
        if len(pack) >= seqlen:
            yield pack[:seqlen]
            pack = []
        elif eos is not None:
            pack.append(eos)
