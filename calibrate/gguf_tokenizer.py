"""A tokenizer.json as GGUF metadata: BPE over bytes (Llama 3, Qwen, Mistral's Tekken, GPT-2) and over text with byte
fallback (Llama 2, Mistral)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# How text is split before merging -> llama.cpp's name for that.
_SPLITS = {
    rf"{_ENDINGS}\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WORDS}": "llama-bpe",
    rf"{_ENDINGS}\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WORDS}": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WORDS}": "tekken",
}

logging.getLogger("gguf").setLevel(logging.ERROR)  # it warns of templates that it reads well enough


class _Token(NamedTuple):
    text: str
    type: gguf.TokenType
    score: float


def tokenizer_problems(folder: Path) -> list[str]:
    """Why the tokenizer in a folder cannot be written as GGUF."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return [f"{folder} has no tokenizer.json, from which GGUF's tokenizer is made"]
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer["model"].get("type") != "BPE":
        return [f"GGUF: tokenizers of type {tokenizer['model'].get('type')} are not supported, only BPE is"]
    if not tokenizer["model"].get("byte_fallback") and _split_name(tokenizer) is None:
        return ["GGUF: llama.cpp has no name for the way in which this tokenizer splits text (its pre_tokenizer)"]
    return []


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer in a folder, padded to the ``vocab_size`` rows of the embedding."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = _tokens(tokenizer, vocab_size)
    split = None if tokenizer["model"].get("byte_fallback") else _split_name(tokenizer)
    writer.add_tokenizer_model("llama" if split is None else "gpt2")
    writer.add_tokenizer_pre(split or "default")
    writer.add_token_list([token.text for token in tokens])
    writer.add_token_types([token.type for token in tokens])
    if split is None:
        writer.add_token_scores([token.score for token in tokens])
        writer.add_add_space_prefix(_prefixes_space(tokenizer))
    special = gguf.SpecialVocab(folder, load_merges=split is not None, n_vocab=vocab_size)
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int) -> list[_Token]:
    model = tokenizer["model"]
    scores = _scores(model["merges"]) if model.get("byte_fallback") else {}
    tokens = [_Token(f"[PAD{index}]", gguf.TokenType.UNUSED, -1e4) for index in range(vocab_size)]
    for text, index in model["vocab"].items():
        kind = gguf.TokenType.NORMAL
        if model.get("byte_fallback") and _BYTE.fullmatch(text):
            kind = gguf.TokenType.BYTE
        elif text == model.get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        tokens[index] = _Token(text, kind, scores.get(text, -1e4))
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        if added["content"] != model.get("unk_token"):
            tokens[added["id"]] = _Token(added["content"], kind, -1e3)
    return tokens


def _scores(merges: list[Any]) -> dict[str, float]:
    """Token -> score: llama.cpp joins the pair whose result has the highest score, tokenizers the earliest merge."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank))
    return scores


def _split_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of BPE over bytes, None if it has none."""
    steps = tokenizer["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if not steps[-1].get("use_regex", True):
        [first] = steps[:-1] or [{}]
        isolated = first.get("type") == "Split" and first["behavior"] == "Isolated" and not first.get("invert")
        return _SPLITS.get(first["pattern"].get("Regex")) if isolated else None
    match steps[:-1]:
        case []:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}]:
            return "smollm"
    return None


def _prefixes_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer, splitter = tokenizer["normalizer"] or {}, tokenizer["pre_tokenizer"] or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splitter.get("pretokenizers", [splitter])]
    prepends = any(step.get("type") == "Prepend" and step["prepend"] == _SPACE for step in steps)
    return prepends or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
    )
