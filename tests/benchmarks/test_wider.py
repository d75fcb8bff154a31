"""What the benchmark at larger width holds out stays out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.corpus import read_corpus, train_tokenizer
from benchmarks.pretraining import _schedule, token_stream

TEXTS = [f"{number} bottles of beer on the wall, take {number % 7} down\n" * 3 for number in range(120)]


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Half of the texts as lines of a .jsonl.gz, half as files, a third of these twice."""
    for number, text in enumerate(TEXTS[:60]):
        (tmp_path / f"{number}.py").write_text(text)
        if number % 3 == 0:
            (tmp_path / f"copy_{number}.md").write_text(text)
    with gzip.open(tmp_path / "rest.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[60:])
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "table.py").write_text("#" * (1 << 21))
    return [tmp_path]


def test_every_text_is_taken_once_and_the_held_out_is_apart(sources: list[Path]) -> None:
    corpus = read_corpus(sources, megabytes=1, seed=1)
    assert sorted(corpus.training + corpus.heldout) == sorted(TEXTS)
    assert len(corpus.heldout) == 3
    assert read_corpus(sources, megabytes=1, seed=1) == corpus
    assert read_corpus(sources, megabytes=1, seed=2).heldout != corpus.heldout


def test_the_limit_and_too_little_text(sources: list[Path]) -> None:
    corpus = read_corpus(sources, megabytes=0.01, seed=1)
    assert 10_000 <= sum(map(len, corpus.training + corpus.heldout)) < 10_200
    with pytest.raises(ValueError, match="50 are needed"):
        read_corpus(sources, megabytes=0.001, seed=1)
    with pytest.raises(ValueError, match="does not exist"):
        read_corpus([sources[0] / "absent"], megabytes=1, seed=1)


def test_the_stream_is_the_texts_with_an_end_behind_each() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    stream = token_stream(tokenizer, TEXTS[:3])
    assert tokenizer.decode(stream.tolist()) == "".join(text + tokenizer.eos_token for text in TEXTS[:3])


def test_the_rate_rises_from_nothing_and_falls() -> None:
    assert _schedule(0.0) == 0.0
    assert _schedule(0.03) > 0.99
    assert _schedule(0.5) == pytest.approx(0.525)
    assert _schedule(1.0) == pytest.approx(0.05)
