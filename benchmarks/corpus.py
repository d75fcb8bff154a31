"""Text that a machine without a network has, in what its Python brought along: documents, held-out text, tokenizer.

Files are found in sorted order, shuffled with a seed and taken until there is enough; the same text is taken once, and
every 50th is held out. Another machine has other files: perplexities compare within a run, or where `Corpus.sha256` is
the same.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_SUFFIXES = (".txt", ".py", ".md", ".rst")
_MOST_CODE = 1 << 20  # characters of a .py file: larger ones are tables
_HELD_OUT = 50  # one document in so many
_TOKENIZER_CHARACTERS = 10_000_000  # 16 s on two cores
_EOS = "<|end of document|>"  # not "</s>" or the like, which Python packages have in their text


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a random order."""

    training: list[str]
    heldout: list[str]
    sha256: str  # of both


def installed_text() -> list[Path]:
    """Folders with the sources and documentation of Python's library and of the installed packages."""
    return sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})


def read_corpus(sources: Iterable[Path], *, megabytes: float, seed: int) -> Corpus:
    """At most ``megabytes`` of the text in files and folders: .txt, .py, .md, .rst, plain or .gz, and .jsonl.gz whose
    every line has a 'text'.

    Raises:
        ValueError: no text in them, or too little to hold any out.
    """
    paths = sorted(set(chain.from_iterable(map(_walk, sources))))
    random.Random(seed).shuffle(paths)
    documents: dict[bytes, str] = {}
    room = megabytes * 1e6
    for text in chain.from_iterable(map(_read, paths)):
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in documents:
            documents[digest] = text
            room -= len(text)
        if room <= 0:
            break
    texts = list(documents.values())
    random.Random(seed).shuffle(texts)  # a .jsonl.gz gave its texts in a row
    if len(texts) < _HELD_OUT:
        raise ValueError(f"{len(texts)} texts in {len(paths)} files; {_HELD_OUT} are needed to hold one out")
    return Corpus(
        training=[text for index, text in enumerate(texts) if index % _HELD_OUT],
        heldout=texts[::_HELD_OUT],
        sha256=hashlib.sha256(b"".join(documents)).hexdigest(),
    )


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS, from the first texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts, _TOKENIZER_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS, pad_token=_EOS)


def _first(texts: list[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _walk(source: Path) -> Iterator[Path]:
    """The file itself, or every file of text in the folder and below it.

    Raises:
        ValueError: there is neither.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if source.is_file():
        yield source
    for folder, _, names in os.walk(source):
        for name in names:
            if name.endswith(".jsonl.gz") or name.removesuffix(".gz").endswith(_SUFFIXES):
                yield Path(folder, name)


def _read(path: Path) -> list[str]:
    """The texts in a file; none if it is not UTF-8, a link to nothing, or a table.

    Raises:
        ValueError: a line of a .jsonl.gz without a 'text'.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            content = file.read()
    except (UnicodeDecodeError, FileNotFoundError):
        return []
    if path.suffix == ".py" and len(content) > _MOST_CODE:
        return []
    if not path.name.endswith(".jsonl.gz"):
        return [content]
    try:
        return [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
    except KeyError as error:
        raise ValueError(f"{path} has a line without a {error}") from error
