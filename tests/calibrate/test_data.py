"""The sampling rule, the file formats, and the errors."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoTokenizer

from calibrate.config import CalibrationError
from calibrate.data import load_padded_samples, load_samples
from tests.conftest import DEMO_MODEL


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def samples_of(*args: Any, **settings: Any) -> Tensor:
    return load_samples(*args, **{"vocabulary": 1024, **settings})


def test_long_texts_give_their_beginning_and_short_ones_are_packed(tokenizer: AutoTokenizer) -> None:
    long = list(range(100, 140))
    short = [[5, 6, 7], [8, 9]]
    samples = samples_of([long, *short], tokenizer, seqlen=6, nsamples=2, seed=0).tolist()
    eos = tokenizer.eos_token_id
    assert long[:6] in samples
    assert [5, 6, 7, eos, 8, 9] in samples or [8, 9, eos, 5, 6, 7] in samples


def test_order_depends_on_the_seed_alone(tokenizer: AutoTokenizer) -> None:
    texts = [[value] * 4 for value in range(2, 50)]
    first, again, other = (samples_of(texts, tokenizer, seqlen=4, nsamples=8, seed=s).tolist() for s in (1, 1, 2))
    assert first == again != other


def test_too_little_text_says_how_much_there_was(tokenizer: AutoTokenizer) -> None:
    with pytest.raises(CalibrationError, match="gives 1 samples of 4 tokens from 2 texts, 3 are needed"):
        samples_of([[1, 2, 3, 4, 5], [6, 7]], tokenizer, seqlen=4, nsamples=3, seed=0)


def test_padded_samples_are_one_text_each(tokenizer: AutoTokenizer) -> None:
    texts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [], [14]]
    ids, real = load_padded_samples(texts, tokenizer, seqlen=4, nsamples=3, seed=0, vocabulary=1024)
    assert ids.shape == real.shape == (3, 4)
    assert sorted(sample[counted].tolist() for sample, counted in zip(ids, real, strict=True)) == [
        [5, 6, 7],
        [8, 9, 10, 11],
        [14],
    ]
    assert all(counted == sorted(counted, reverse=True) for counted in real.tolist())  # padding comes last
    with pytest.raises(CalibrationError, match="gives 3 texts that are not empty, 4 are needed"):
        load_padded_samples(texts, tokenizer, seqlen=4, nsamples=4, seed=0, vocabulary=1024)


TEXTS = ["How many apples does Tom have now? " * 3, "Emma has 12 stickers and buys 9 more. " * 3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps({"text": text}) for text in TEXTS)),
        ("a.jsonl.gz", "\n".join(json.dumps({"text": text}) for text in TEXTS)),
        ("a.json", json.dumps(TEXTS)),
        ("a.txt", "\n\n".join(TEXTS)),
        ("b.v2.txt.gz", "\n\n".join(TEXTS)),
    ],
)
def test_file_formats_give_the_same_samples(tokenizer: AutoTokenizer, tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    expected = samples_of(TEXTS, tokenizer, seqlen=16, nsamples=2, seed=3)
    assert samples_of(str(path), tokenizer, seqlen=16, nsamples=2, seed=3).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("bad.json", "{", "is not valid json"),
        ("bad.json", '{"a text": 1}', "is a JSON dict, expected a list of texts"),
        ("bad.txt.gz", "not gzipped", "cannot be read: Not a gzipped file"),
        ("bad.jsonl", '{"content": "x"}', "item 0 is neither a string nor an object with a string under 'text'"),
    ],
)
def test_bad_files(tokenizer: AutoTokenizer, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        samples_of(str(tmp_path / name), tokenizer, seqlen=4, nsamples=1, seed=0)


def test_an_unreachable_hub_dataset_says_so(tokenizer: AutoTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"neither a local .json, .jsonl, .txt file .* nor loadable"):
        samples_of("nobody/no-such-dataset", tokenizer, seqlen=4, nsamples=1, seed=0)


def test_jsonl_may_hold_unicode_line_ends_inside_strings(tokenizer: AutoTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three " * 9}, ensure_ascii=False) + "\n\n")
    assert samples_of(str(path), tokenizer, seqlen=8, nsamples=1, seed=0).shape == (1, 8)


def test_token_ids_outside_the_vocabulary_are_refused(tokenizer: AutoTokenizer) -> None:
    with pytest.raises(CalibrationError, match="token ids run from 2 to 5000, the model's vocabulary is 0 to 1023"):
        samples_of([[2, 3, 5000, 4]], tokenizer, seqlen=4, nsamples=1, seed=0)
