"""Between dialects without calibrating again: the same weights bit for bit, or a refusal that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibrate import exporters
from calibrate.cli import main
from calibrate.config import CalibrationError
from calibrate.convert import convert
from calibrate.exporters import EXPORTERS, Folder
from calibrate.origin import Origin
from tests.calibrate.exports import Exported, as_json, export, llama
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.layouts import LAYOUTS
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.reader import dequantized_state_dict, read_manifest, read_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
INTEGERS = ("compressed-tensors", "auto_round", "auto_gptq")
WAYS = {
    "W4A16G32": (*INTEGERS, "gguf:q4_0"),
    "W4A16_ASYM_G32": (*INTEGERS, "auto_awq", "gguf:q4_1"),
    "W3A16G32": INTEGERS,
    "W2A16_ASYM_G32": INTEGERS,
    "FP8_STATIC": INTEGERS[:2],
    "NVFP4": INTEGERS[:2],
    "MXFP4": INTEGERS[:2],
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A checkpoint of a scheme in every format that can be read here, made once."""
    made: dict[str, Exported] = {}

    def make(scheme: str) -> Exported:
        if scheme not in made:
            torch.manual_seed(0)
            formats = [name for name in WAYS[scheme] if not name.startswith("gguf")]
            made[scheme] = export(tmp_path_factory.mktemp("converted"), llama(), scheme, formats)
        return made[scheme]

    return make


@pytest.mark.parametrize(
    ("scheme", "old", "new"),
    [(scheme, old, new) for scheme, ways in WAYS.items() for old in ways for new in ways if "gguf" not in old],
)
def test_every_way_there_is(
    scheme: str, old: str, new: str, exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    exported = exports(scheme)
    report = convert(exported.out / old, tmp_path / "out", new)
    assert report == as_json(tmp_path / "out" / "report.json")
    assert report["layers"] == {str(next(iter(read_manifest(exported.out / old).schemes.values()))): 14}
    assert not list(tmp_path.glob("*.partial"))
    if new.startswith("gguf"):
        direct = next(EXPORTERS[new].read_back(tmp_path / "out", *rest) for rest in [gguf_arguments(exported)])
        assert all(torch.equal(tensor, exported.state()[name]) for name, tensor in direct)
        return
    state, config = dequantized_state_dict(tmp_path / "out", torch.float32), as_json(tmp_path / "out" / "config.json")
    assert state.keys() == exported.state().keys()
    assert all(torch.equal(state[name], expected) for name, expected in exported.state().items())
    # What calibration in that format would have written, in another order.
    direct = dict(read_tensors(exported.out / new))
    converted = dict(read_tensors(tmp_path / "out"))
    assert direct.keys() == converted.keys()
    assert all(torch.equal(direct[name].float(), tensor.float()) for name, tensor in converted.items())
    expected = as_json(exported.out / new / "config.json")["quantization_config"]
    assert config["quantization_config"].keys() == expected.keys()
    assert config["vllm_autoround"]["made_by"] == "a test"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def gguf_arguments(exported: Exported) -> tuple[object, ...]:
    origin = Origin(exported.source, as_json(exported.source / "config.json"))
    return Manifest(schemes={}), origin, list(exported.state())


def test_kv_scales_and_mixtures_go_along(tmp_path: Path) -> None:
    mixed = {"q_proj": "W8A16G32", "down_proj": "W2A16G32", "o_proj": None}
    exported = export(
        tmp_path,
        llama(),
        lambda layer: mixed.get(layer.rpartition(".")[2], "W4A16G32"),
        ["auto_round"],
        kv_cache="fp8",
    )
    convert(exported.out, tmp_path / "there", "compressed-tensors")
    convert(tmp_path / "there", tmp_path / "back", "auto_round")
    there, back = read_manifest(tmp_path / "there"), read_manifest(tmp_path / "back")
    assert there.schemes == back.schemes == read_manifest(exported.out).schemes
    assert there.kv_cache == back.kv_cache == "fp8"
    assert "model.layers.0.self_attn.o_proj" in there.ignore  # stock vLLM asks for every layer, quantized or not
    assert dict(read_tensors(tmp_path / "back")).keys() == dict(read_tensors(exported.out)).keys()


def test_layers_that_the_config_does_not_speak_of_are_named_in_the_new_one(tmp_path: Path) -> None:
    """compressed-tensors may leave them out of ignore; auto-round would take them for quantized."""
    unquantized = "model.layers.1.self_attn.o_proj"
    exported = export(
        tmp_path, llama(), lambda layer: None if layer == unquantized else "W4A16G32", ["compressed-tensors"]
    )
    config = as_json(exported.out / "config.json")
    assert set(config["quantization_config"]["ignore"]) == {unquantized, "lm_head"}
    config["quantization_config"]["ignore"] = []
    (exported.out / "config.json").write_text(json.dumps(config))
    convert(exported.out, tmp_path / "converted", "auto_round")
    extra = as_json(tmp_path / "converted" / "config.json")["quantization_config"]["extra_config"]
    assert extra == {unquantized: {"bits": 16, "act_bits": 16}}


def test_a_tied_model_stays_tied(tmp_path: Path) -> None:
    exported = export(tmp_path, llama(tie_word_embeddings=True), "W4A16G32", ["compressed-tensors"])
    convert(exported.out, tmp_path / "gptq", "auto_gptq")
    assert as_json(tmp_path / "gptq" / "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in dict(read_tensors(tmp_path / "gptq"))
    convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    assert as_json(tmp_path / "back" / "config.json")["quantization_config"]["ignore"] == ["lm_head"]
    convert(exported.out, tmp_path / "gguf", "gguf:q4_0")


@pytest.mark.parametrize(
    ("scheme", "new", "message"),
    [
        ("W4A16G32", "auto_awq", "takes 4 bits, asymmetric, in groups, not int4 symmetric g32"),
        ("W4A16G32", "gguf:q4_1", "takes int4 asymmetric g32"),
        ("W3A16G32", "gguf:q4_0", "takes int4 symmetric g32"),
        ("FP8_STATIC", "auto_gptq", "takes integer weights of 2, 3, 4 or 8 bits, not fp8 per channel"),
        ("NVFP4", "auto_awq", "not nvfp4"),
    ],
)
def test_what_the_other_format_cannot_say(
    scheme: str,
    new: str,
    message: str,
    exports: Callable[[str], Exported],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = exports(scheme).out / "compressed-tensors"
    assert main(["convert", str(source), str(tmp_path / "out"), "--format", new]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def changed(source: Path, folder: Path, name: str, change: Callable[[torch.Tensor], None]) -> Path:
    """A copy of a checkpoint with one tensor changed in place."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if name in tensors:
                change(tensors[name])
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("scheme", "new", "value", "message"),
    [
        (
            "W4A16G32",
            "auto_gptq",
            2.0**-25,
            "auto_gptq: {layer}: scale 2.98023224e-08 of row 5, group 1 is not a float16",
        ),
        ("W4A16G32", "auto_round", 2.0**17, "auto_round: {layer}: scale 131072 of row 5, group 1 is not a float16"),
        ("W4A16G32", "gguf:q4_0", 2.0**-25, "gguf:q4_0: {layer}: scale 2.98023224e-08 of row 5, group 1"),
        ("W4A16_ASYM_G32", "auto_awq", 2.0**-25, "auto_awq: {layer}: scale 2.98023224e-08"),
    ],
)
def test_scales_that_float16_cannot_hold_are_named(
    scheme: str, new: str, value: float, message: str, exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    layer = "model.layers.1.mlp.up_proj"

    def change(scale: torch.Tensor) -> None:
        scale[5, 1] = value

    source = changed(exports(scheme).out / "compressed-tensors", tmp_path / "source", f"{layer}.weight_scale", change)
    with pytest.raises(CalibrationError) as caught:
        convert(source, tmp_path / "out", new)
    assert message.format(layer=layer) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_wrapped_zero_point_is_refused_as_unknown(exports: Callable[[str], Exported], tmp_path: Path) -> None:
    """GPTQ's first version, stored minus one: readers disagree on what 15 means."""
    exported = exports("W4A16_ASYM_G32")
    source = changed(
        exported.out / "auto_gptq",
        tmp_path / "source",
        "model.layers.0.mlp.up_proj.qzeros",
        lambda words: words.fill_(-1),
    )
    config = (source / "config.json").read_text()
    assert '"gptq_v2"' in config
    (source / "config.json").write_text(config.replace('"gptq_v2"', '"gptq"'))
    with pytest.raises(ManifestError, match=r"model.layers.\d.\S+: a zero point is stored as 15, minus one"):
        convert(source, tmp_path / "out", "compressed-tensors")


def test_what_reads_back_with_other_values_is_never_published(
    exports: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exports("W4A16G32").out / "compressed-tensors"
    layout = type(LAYOUTS["gptq"])
    original = layout.to_tensors

    def planted(self: object, weight: object) -> dict[str, torch.Tensor]:
        tensors = original(self, weight)
        tensors["qweight"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(layout, "to_tensors", planted)
    message = r"does not survive as auto_gptq: model.layers.\d.\S+.weight reads back with other values"
    with pytest.raises(CalibrationError, match=message):
        convert(source, tmp_path / "out", "auto_gptq")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_lost_a_tensor_is_never_published(
    exports: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = exporters.save_tensors

    def planted(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        original(path, {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"})

    monkeypatch.setattr(exporters, "save_tensors", planted)
    with pytest.raises(CalibrationError, match=r"does not survive as auto_round: model.norm.weight is lost"):
        convert(exports("W4A16G32").out / "auto_gptq", tmp_path / "out", "auto_round")
    assert not list(tmp_path.iterdir())


def test_what_reads_back_as_another_scheme_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = export(tmp_path, llama(num_hidden_layers=1), "FP8_DYNAMIC", ["compressed-tensors"]).out
    exporter = cast(Folder, EXPORTERS["compressed-tensors"])

    def planted(manifest: Manifest) -> dict[str, Any]:
        config = exporter.write_config(manifest)
        config["config_groups"]["group_0"]["input_activations"] = None
        return config

    monkeypatch.setitem(EXPORTERS, "compressed-tensors", replace(exporter, write_config=planted))
    message = (
        r"reads back as 7 layers of fp8 per channel, 16-bit activations with .* not as 7 layers of fp8 per channel, fp8"
    )
    with pytest.raises(CalibrationError, match=message):
        convert(source, tmp_path / "again", "compressed-tensors")
    assert not list(tmp_path.glob("again*"))


def test_a_folder_in_use_and_an_unknown_format_are_refused(exports: Callable[[str], Exported], tmp_path: Path) -> None:
    source = exports("W4A16G32").out / "compressed-tensors"
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(CalibrationError, match="exists and is not an empty folder"):
        convert(source, tmp_path, "auto_round")
    with pytest.raises(CalibrationError, match=r"format 'exl2' is unknown; known are compressed-tensors, auto_round"):
        convert(source, tmp_path / "out", "exl2")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    "name",
    sorted(path.parent.name for path in GOLDEN.glob("*/golden.json")) or [pytest.param("", marks=pytest.mark.skip)],
)
def test_checkpoints_of_other_tools_become_compressed_tensors(name: str, tmp_path: Path) -> None:
    """What can be read at all can be rewritten in our own dialect."""
    source = GOLDEN / name
    if as_json(source / "golden.json")["expect"] == "refused":
        with pytest.raises(ManifestError):
            convert(source, tmp_path / "out", "compressed-tensors")
        return
    convert(source, tmp_path / "out", "compressed-tensors")
    assert as_json(tmp_path / "out" / "config.json")["vllm_autoround"]["converted_from"]
    state = dequantized_state_dict(source, torch.float32)
    converted = dequantized_state_dict(tmp_path / "out", torch.float32)
    assert state.keys() == converted.keys()
    assert all(torch.equal(state[tensor], converted[tensor]) for tensor in state)


def test_where_there_is_no_q_scale_it_is_1(tmp_path: Path) -> None:
    """vLLM takes it for 1 then; our checkpoints say so."""
    source = export(tmp_path, llama(), "W4A16G32", ["compressed-tensors"], kv_cache="fp8").out
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: t for name, t in load_file(path).items() if not name.endswith("q_scale")}
            save_file(tensors, theirs / path.name, metadata={"format": "pt"})
        elif path.name == "config.json":
            config = as_json(path)
            del config["vllm_autoround"]
            (theirs / path.name).write_text(json.dumps(config))
    for name in ("compressed-tensors", "auto_round"):
        convert(theirs, tmp_path / name, name)
        before, after = dict(read_tensors(source)), dict(read_tensors(tmp_path / name))
        for layer in range(2):
            assert after[f"model.layers.{layer}.self_attn.q_scale"].tolist() == [1.0]
            scale = f"model.layers.{layer}.self_attn.k_scale"
            assert torch.equal(after[scale], before[scale])
