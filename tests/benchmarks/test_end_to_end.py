"""The end-to-end benchmark's model is one that loads whole, and its checks see what they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.end_to_end import Run, _check, _make_model, _misses, _run, _write_texts
from benchmarks.shapes import BlockShape
from calibrate.data import load_samples
from calibrate.source import load_source
from tests.checkpoints import linear_layers, write_rtn_checkpoint
from vllm_autoround.format.reader import tensor_files
from vllm_autoround.format.scheme import QuantScheme

SHAPE = BlockShape(hidden=128, mlp=128, heads=2, kv_heads=2, head_dim=64)
LAYERS, VOCABULARY = 2, 64
FIRST, SECOND = "model.layers.0.mlp.up_proj.", "model.layers.1.mlp.up_proj."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end_to_end") / "model"
    _make_model(folder, SHAPE, LAYERS, VOCABULARY, 32, torch.device("cpu"))
    return folder


def test_the_model_loads_whole_and_the_texts_are_its_tokens(model: Path, tmp_path: Path) -> None:
    source = load_source(str(model), trust_remote_code=False)  # raises on missing and unexpected tensors
    assert source.model.dtype == torch.bfloat16
    _write_texts(tmp_path / "texts.jsonl", 4, 32, VOCABULARY)
    samples = load_samples(
        str(tmp_path / "texts.jsonl"), source.tokenizer, seqlen=32, nsamples=4, seed=0, vocabulary=VOCABULARY
    )
    assert samples.min() > 0  # neither the end of text nor an unknown word
    assert len(samples.unique()) > VOCABULARY // 2


def _not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}weight_scale"][0, 0] = torch.nan


def _zeroed(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}weight_scale"].zero_()


def _swapped(tensors: dict[str, Tensor]) -> None:
    for suffix in ("weight_packed", "weight_scale"):
        tensors[FIRST + suffix], tensors[SECOND + suffix] = tensors[SECOND + suffix], tensors[FIRST + suffix]


def _other_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"][0, 0] += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, None),
        (_not_finite, "not finite"),
        (_zeroed, "relative squared error 1.00"),
        (_swapped, "far from the original"),
        (_other_head, "differs from the original"),
    ],
)
def test_damage_is_seen(
    model: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None] | None, message: str | None
) -> None:
    out, cpu = tmp_path / "out", torch.device("cpu")
    write_rtn_checkpoint(model, out, dict.fromkeys(linear_layers(model), QuantScheme.parse("W4A16")))
    if damage is None:
        assert "14 layers of blocks 0, 1" in _check(model, out, "W4A16", LAYERS, cpu)
        return
    [file] = set(tensor_files(out).values())
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        _check(model, out, "W4A16", LAYERS, cpu)


def test_more_levels_than_the_bits_have_are_seen(model: Path, tmp_path: Path) -> None:
    write_rtn_checkpoint(model, tmp_path / "out", dict.fromkeys(linear_layers(model), QuantScheme.parse("W4A16")))
    with pytest.raises(ValueError, match="not quantized to 3 bits"):
        _check(model, tmp_path / "out", "W3A16", LAYERS, torch.device("cpu"))


def _measured(device_mib: float | None) -> Run:
    blocks = [{"seconds": seconds, "phases": {"steps": seconds / 2}} for seconds in (4.0, 1.0, 3.0)]
    peak = {"host_mib": 1024.0} | ({} if device_mib is None else {"device_mib": device_mib})
    return _run({"blocks": blocks, "peak_memory": peak, "seconds": 12.0}, 20.0, [9.0, 10.5, 14.0])


def test_parts_add_up_to_the_total() -> None:
    run = _measured(2048.0)
    assert (run.startup, run.blocks, run.end) == (5.0, 9.0, 6.0)
    assert (run.first, run.later, run.phases, run.peak_gib) == (4.0, 2.0, {"steps": 1.0}, 2.0)


def test_a_limit_that_is_missed_or_not_measured_is_told() -> None:
    assert not list(_misses(_measured(2048.0), 20.0, 2.0))
    assert len(list(_misses(_measured(2048.0), 19.9, 1.9))) == 2
    assert len(list(_misses(_measured(None), None, 2.0))) == 1
