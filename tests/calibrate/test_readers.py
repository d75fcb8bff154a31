"""Every format read back by its own readers, most of them in environments of their own (tests/exporters.sh).

A reader that multiplies in float16 rounds each weight to it once, by 2^-11 of its size at most; auto-round's FP8 layer
to bfloat16, by 2^-8.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from calibrate.source import load_source
from demo.problems import generate
from tests.calibrate.exports import Exported, export, llama, save_source, train_tokenizer, write
from tests.conftest import DEMO_MODEL, REPOSITORY
from tests.e2e.engine import run_engine

READERS = Path(os.environ.get("READERS", REPOSITORY / ".readers"))
SCRIPTS = REPOSITORY / "tests" / "readers"
FLOAT16, BFLOAT16 = 2.0**-11, 2.0**-8
WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}
MIXED = {"q_proj": "W8A16G32", "v_proj": "W8A16G32", "k_proj": "W8A16G32", "down_proj": "W2A16G32"}

HERE = [f"W{bits}A16{kind}" for bits in (2, 4, 8) for kind in ("G32", "_ASYM_G32")]
HERE += ["FP8", "FP8_STATIC", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8"]
ELSEWHERE = {
    "compressed-tensors": [f"W{bits}A16{kind}" for bits in (3, 5, 6, 7) for kind in ("G32", "_ASYM_G32")] + ["mixed"],
    "auto_round": [
        *(f"W{bits}A16G32" for bits in range(2, 9)),
        *(f"W{bits}A16_ASYM_G32" for bits in range(2, 9)),
        *("FP8_STATIC", "NVFP4", "MXFP4", "MXFP8", "mixed"),
    ],
    "auto_gptq": [*(f"W{bits}A16{kind}G32" for bits in (2, 3, 4, 8) for kind in ("", "_ASYM_")), "W4A16G-1", "mixed"],
    "auto_awq": ["W4A16_ASYM_G32", "W4A16_ASYM_G64"],
}


def scheme_of(name: str) -> Any:
    if name != "mixed":
        return name
    return lambda layer: MIXED.get(layer.rpartition(".")[2], "W4A16G32")


def python_of(environment: str) -> Path:
    python = READERS / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is not there; tests/exporters.sh makes it")
    return python


def run(python: Path | str, script: str, *arguments: str, given: str = "") -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, SCRIPTS / script, *arguments],
        input=given,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


class Reading:
    """What one environment reads, in one process."""

    def __init__(self, python: Path | str, folder: Path, cases: list[tuple[str, str]]) -> None:
        self.exported: dict[tuple[str, str], Exported] = {}
        request = []
        for format_, scheme in cases:
            torch.manual_seed(0)
            target = folder / f"{format_} {scheme}"
            exported = export(target, llama(**WIDE), scheme_of(scheme), [format_], dtype=torch.bfloat16)
            self.exported[format_, scheme] = exported
            gptq_mixture = (format_, scheme) == ("auto_gptq", "mixed")  # transformers has no word for it
            request.append(
                {
                    "folder": str(exported.out),
                    "out": str(target / "read.safetensors"),
                    "dtype": "bfloat16" if self._in_bfloat16(format_, scheme) else "float16",
                    "columns": {name: weight.codes.shape[1] for name, weight in exported.weights.items()},
                    "loader": "gptqmodel" if gptq_mixture else "transformers",
                }
            )
        self._results = json.loads(run(python, "read_weights.py", given=json.dumps(request)).splitlines()[-1])

    @staticmethod
    def _in_bfloat16(format_: str, scheme: str) -> bool:
        """compressed-tensors unpacks E2M1 and MX weights in bfloat16, whatever the model's dtype."""
        return format_ == "compressed-tensors" and scheme.startswith(("NV", "MX"))

    def weights(self, format_: str, scheme: str) -> tuple[dict[str, Tensor], str]:
        """Each layer's weight as the reader has it (and the logits), and the class that holds it."""
        exported = self.exported[format_, scheme]
        result = self._results[str(exported.out)]
        assert not result.startswith("error"), result
        return load_file(exported.out.parent / "read.safetensors"), result


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    cases = [(format_, scheme) for format_, schemes in ELSEWHERE.items() for scheme in schemes]
    return Reading(python_of("transformers"), tmp_path_factory.mktemp("elsewhere"), cases)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    """transformers with the compressed-tensors release that vLLM pins."""
    return Reading(sys.executable, tmp_path_factory.mktemp("here"), [("compressed-tensors", name) for name in HERE])


def check(read: Mapping[str, Tensor], exported: Exported, rounding: float = FLOAT16) -> None:
    for name, weight in exported.weights.items():
        torch.testing.assert_close(
            read[name], weight.dequantize(), rtol=rounding, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "scheme"), [(f, s) for f, schemes in ELSEWHERE.items() for s in schemes])
def test_the_formats_own_reader_has_the_same_weights(format_: str, scheme: str, elsewhere: Reading) -> None:
    read, holder = elsewhere.weights(format_, scheme)
    # compressed-tensors puts dense weights into plain layers; the others keep theirs packed.
    assert holder.startswith("torch.nn") is (format_ == "compressed-tensors"), holder
    check(read, elsewhere.exported[format_, scheme], BFLOAT16 if scheme == "FP8_STATIC" else FLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", HERE)
def test_transformers_has_the_same_weights(scheme: str, here: Reading) -> None:
    read, _ = here.weights("compressed-tensors", scheme)
    check(read, here.exported["compressed-tensors", scheme], BFLOAT16 if scheme.startswith("NV") else FLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "scheme"), [("gguf:q4_0", "W4A16G32"), ("gguf:q4_1", "W4A16_ASYM_G32")])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_llama_cpp_has_the_same_tokens_and_logits(format_: str, scheme: str, family: str, tmp_path: Path) -> None:
    config = llama() if family == "llama" else tf.Qwen3Config(**llama().to_dict() | {"architectures": None})
    exported = export(tmp_path, config, scheme, [format_])
    [file] = exported.out.glob("*.gguf")
    text = "Sam has 3 boxes of 17 apples, and 'll buy more! How many?\n\nSam: 51."
    run(python_of("llamacpp"), "read_gguf.py", str(file), str(tmp_path / "read.json"), text)
    read = json.loads((tmp_path / "read.json").read_text())
    assert read["tokens"] == tf.AutoTokenizer.from_pretrained(DEMO_MODEL).encode(text, add_special_tokens=False)
    expected = exported.logits(torch.arange(20)[None])[0]
    error = (torch.tensor(read["logits"]) - expected).norm() / expected.norm()
    assert error < 0.1  # it rounds activations to 8 bits in groups of 32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_llama_cpp_splits_text_like_the_tokenizer(kind: str, tmp_path: Path, demo_texts: list[str]) -> None:
    python = python_of("llamacpp")
    train_tokenizer(save_source(tmp_path / "source", llama()), kind, demo_texts)
    source = load_source(str(tmp_path / "source"), trust_remote_code=False)
    exported = write(tmp_path / "out", source, "W4A16G32", ["gguf:q4_0"])
    file = exported.out / "model-q4_0.gguf"
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == kind
    text = "Sam has 3 boxes of 1750 apples,  and he'll BUY!\n\n\tH\u00e4us\u00df \u732b \U0001f680 What's left?\n"
    run(python, "read_gguf.py", str(file), str(tmp_path / "read.json"), text)
    expected = Tokenizer.from_file(str(tmp_path / "source" / "tokenizer.json")).encode(text, add_special_tokens=False)
    assert json.loads((tmp_path / "read.json").read_text())["tokens"] == expected.ids


STOCK = [
    ("auto_round", "W4A16G64"),
    ("auto_round", "W4A16_ASYM_G64"),
    ("auto_gptq", "W4A16G64"),
    ("auto_awq", "W4A16_ASYM_G64"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "scheme"), STOCK, ids=[" ".join(case) for case in STOCK])
@torch.no_grad()
def test_stock_vllm_has_the_same_tokens(format_: str, scheme: str, tmp_path: Path) -> None:
    source = load_source(str(DEMO_MODEL), trust_remote_code=False)
    exported = write(tmp_path / "out", source, scheme, [format_])
    prompts = [source.tokenizer(f"Question: {p['question']}\nAnswer:").input_ids for p in generate("test", 4, seed=2)]
    result = run_engine(exported.out, prompts, plugins=False, dtype="float16")
    assert not any(method.startswith("AutoRound") for method in result["methods"].values())
    model = source.model.float()
    model.load_state_dict({**model.state_dict(), **exported.state()}, strict=False)
    pairs = []
    for ids, tokens in zip(prompts, result["tokens"], strict=True):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False)[
            0, len(ids) :
        ]
        pairs += list(zip(expected.tolist(), tokens, strict=True))
    assert sum(a == b for a, b in pairs) >= 0.9 * len(pairs)  # float16 against float32: paths may part at a near tie
