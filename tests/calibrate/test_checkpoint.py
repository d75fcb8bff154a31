"""The writer: formats side by side, tied weights, all or nothing, and what a folder must hold."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from calibrate.blocks import find_blocks
from calibrate.checkpoint import CheckpointWriter, format_problems
from calibrate.config import CalibrationError
from calibrate.source import load_source
from tests.calibrate.exports import Exported, as_json, export, llama, save_source, write
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.layouts import LAYOUTS
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.reader import dequantized_state_dict, read_manifest, read_tensors, tensor_files
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import quantize

ASYMMETRIC = ("compressed-tensors", "auto_round", "auto_gptq", "auto_awq", "gguf:q4_1")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    return export(tmp_path_factory.mktemp("several"), llama(), "W4A16_ASYM_G32", ASYMMETRIC)


def test_several_formats_are_folders_side_by_side(several: Exported) -> None:
    names = {path.name for path in several.out.iterdir()}
    assert names == {"report.json", "compressed-tensors", "auto_round", "auto_gptq", "auto_awq", "gguf-q4_1"}
    assert {path.name for path in (several.out / "gguf-q4_1").iterdir()} == {"model-q4_1.gguf", "LICENSE.txt"}
    for name in ASYMMETRIC[:-1]:
        folder = several.out / name
        state = dequantized_state_dict(folder, torch.float32)
        assert state.keys() == several.state().keys()
        for tensor, expected in several.state().items():
            assert torch.equal(state[tensor], expected), (name, tensor)
        assert (folder / "tokenizer.json").read_bytes() == (several.source / "tokenizer.json").read_bytes()
        config, original = as_json(folder / "config.json"), as_json(several.source / "config.json")
        assert {key: config[key] for key in original} == original
        assert config["vllm_autoround"] == {"format_version": 2, "made_by": "a test"}


def test_the_index_names_every_tensor_and_their_size(several: Exported) -> None:
    folder = several.out / "auto_gptq"
    index = as_json(folder / "model.safetensors.index.json")
    assert index["weight_map"] == {name: path.name for name, path in tensor_files(folder).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in read_tensors(folder))
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044, path
        assert path.suffix != ".tmp"


def test_one_format_is_the_folder_itself_and_the_same_bytes(several: Exported, tmp_path: Path) -> None:
    source = load_source(str(several.source), trust_remote_code=False)
    write(tmp_path / "one", source, "W4A16_ASYM_G32", ["auto_awq"])
    one, among = tmp_path / "one", several.out / "auto_awq"
    assert {path.name for path in one.iterdir()} == {"report.json", *(path.name for path in among.iterdir())}
    for path in among.iterdir():
        assert path.read_bytes() == (one / path.name).read_bytes(), path
    write(tmp_path / "gguf", source, "W4A16_ASYM_G32", ["gguf:q4_1"])
    again, file = tmp_path / "gguf" / "model-q4_1.gguf", several.out / "gguf-q4_1" / "model-q4_1.gguf"
    assert again.read_bytes() == file.read_bytes()


def test_no_format_is_left_when_one_fails(tmp_path: Path) -> None:
    source = load_source(str(save_source(tmp_path / "source", llama())), trust_remote_code=False)
    blocks = find_blocks(source.model)
    scheme = QuantScheme.parse("W4A16G32")
    name = "self_attn.q_proj"
    weight = quantize(blocks[0].module.get_submodule(name).weight.detach(), scheme.weights)
    weight.scale[3, 1] = 2.0**-30
    manifest = Manifest(schemes={f"{blocks[0].name}.{name}": scheme})
    message = (
        r"auto_round: model.layers.0.self_attn.q_proj: scale 9.31322575e-10 of row 3, group 1 is not a float16 number"
    )
    formats = ("compressed-tensors", "auto_round")
    with (
        pytest.raises(CalibrationError, match=message),
        CheckpointWriter(tmp_path / "out", source, blocks, manifest, formats) as writer,
    ):
        writer.write_block(0, {name: weight}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_layer_that_was_promised_but_not_written_is_an_error(tmp_path: Path) -> None:
    source = load_source(str(save_source(tmp_path / "source", llama())), trust_remote_code=False)
    blocks = find_blocks(source.model)
    manifest = Manifest(schemes={"model.layers.1.mlp.up_proj": QuantScheme.parse("W4A16G32")})

    def write_without(name: str) -> None:
        with CheckpointWriter(tmp_path / "out", source, blocks, manifest, [name]) as writer:
            for index in range(len(blocks)):
                writer.write_block(index, {}, {})
            writer.complete({})

    for name, missing in (("compressed-tensors", "promised tensors"), ("gguf:q4_0", "promised layers")):
        with pytest.raises(ManifestError, match=rf"{missing} are missing, the first is model.layers.1.mlp.up_proj"):
            write_without(name)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("outside", [(), (HEAD,), (EMBEDDING,), (HEAD, EMBEDDING)])
@pytest.mark.parametrize("format_", ["compressed-tensors", "auto_round", "gguf:q4_0"])
def test_tied_weights_part_when_one_of_them_is_quantized(
    outside: tuple[str, ...], format_: str, tmp_path: Path
) -> None:
    exported = export(tmp_path, llama(vocab_size=832, tie_word_embeddings=True), "W4A16G32", [format_], outside=outside)
    if format_.startswith("gguf"):
        loaded = tf.AutoModelForCausalLM.from_pretrained(exported.out, gguf_file="model-q4_0.gguf", dtype=torch.float32)
        state, tied = loaded.state_dict(), loaded.config.tie_word_embeddings
    else:
        assert (read_manifest(exported.out).schemes.keys() & {HEAD, EMBEDDING}) == set(outside)
        state = dequantized_state_dict(exported.out, torch.float32)
        tied = as_json(exported.out / "config.json")["tie_word_embeddings"]
        assert (f"{HEAD}.weight" in state) is bool(outside)
    assert tied is not bool(outside)
    for name, expected in exported.state().items():
        if name in state:
            assert torch.equal(state[name], expected), name


def test_scales_of_activations_and_kv_cache_are_written_with_their_block(tmp_path: Path) -> None:
    out = export(tmp_path, llama(), "FP8_STATIC", ["compressed-tensors"], kv_cache="fp8").out
    last = load_file(out / "model-00002-of-00003.safetensors")
    assert last["model.layers.1.self_attn.k_scale"].tolist() == [1.25]
    assert last["model.layers.1.mlp.up_proj.input_scale"].tolist() == [0.25]


@pytest.mark.parametrize(
    ("dtype", "formats", "problems"),
    [
        (torch.float32, ["compressed-tensors"], []),
        (
            torch.float32,
            ["compressed-tensors", "auto_gptq"],
            ["auto_gptq cannot hold float32 scales without rounding them; save the model in bfloat16 or float16 first"],
        ),
        (torch.float16, ["auto_gptq", "gguf:q4_0"], []),
        (
            torch.float16,
            ["gguf:q4_1"],
            ["gguf:q4_1 cannot hold float16 scales without rounding them; save the model in bfloat16 first"],
        ),
    ],
)
def test_a_dtype_whose_scales_do_not_fit_is_refused_before_tuning(
    dtype: torch.dtype, formats: list[str], problems: list[str], tmp_path: Path
) -> None:
    source = load_source(str(save_source(tmp_path / "source", llama(), dtype)), trust_remote_code=False)
    kind = "W4A16_ASYM_G32" if "gguf:q4_1" in formats else "W4A16G32"
    manifest = Manifest(schemes={"model.layers.0.mlp.up_proj": QuantScheme.parse(kind)})
    assert format_problems(formats, manifest, source) == problems


def test_the_report_is_json_and_the_layouts_are_known(several: Exported) -> None:
    assert json.loads((several.out / "report.json").read_text()) == {"seconds": 0}
    for name in ASYMMETRIC[:-1]:
        assert read_manifest(several.out / name).layout in LAYOUTS
