"""The whole run: files, determinism, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from calibrate import CalibrationError, calibrate
from calibrate.chain import NonFiniteError
from calibrate.checkpoint import CheckpointWriter
from calibrate.cli import main
from calibrate.inspection import inspect_checkpoint
from calibrate.source import load_source
from tests.calibrate.conftest import COMMON, QUICK, copied_model, save_tiny
from tests.conftest import DEMO_MODEL, DEMO_SETTINGS, REPOSITORY
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.reader import dequantized_state_dict, read_manifest, read_tensors, tensor_files


def test_files_and_report(demo_checkpoint: Path) -> None:
    names = {path.name for path in demo_checkpoint.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "report.json", "tokenizer.json"} <= names
    assert not list(demo_checkpoint.parent.glob("*.partial"))
    config = json.loads((demo_checkpoint / "config.json").read_text())
    original = json.loads((DEMO_MODEL / "config.json").read_text())
    assert {key: config[key] for key in original} == original
    assert config["vllm_autoround"]["format_version"] == 2
    assert "vllm_autoround" not in config["quantization_config"]
    index = json.loads((demo_checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: path.name for name, path in tensor_files(demo_checkpoint).items()}
    assert "lm_head.weight" not in index  # tied in the original

    report = json.loads((demo_checkpoint / "report.json").read_text())
    assert report["settings"]["seed"] == 42
    assert report["tuning"]["iters"] == 16
    assert len(report["blocks"]) == 4
    assert all(len(block["layers"]) == 7 for block in report["blocks"])
    assert report["heldout_samples"] == 1
    for block in report["blocks"]:
        assert {"load", "original chain", "scale search", "steps", "verdict", "write"} < set(block["phases"])
        assert 0 < sum(block["phases"].values()) <= block["seconds"]
    assert report["environment"]["torch"] == torch.__version__


def test_inspection(demo_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspection = inspect_checkpoint(demo_checkpoint)
    assert inspection.average_bits == pytest.approx(4 + 16 / 128, abs=0.01)  # weight_shape adds 128 bits a layer
    assert inspection.original_size_bytes == sum(t.nbytes for t in load_file(DEMO_MODEL / "model.safetensors").values())
    assert [scheme.layers for scheme in inspection.schemes] == [28]
    assert main(["inspect", str(demo_checkpoint)]) == 0
    assert "int4 symmetric g128" in capsys.readouterr().out
    assert main(["inspect", str(demo_checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache"] == "fp8"


def test_same_seed_same_bytes(demo_checkpoint: Path, demo_texts: list[str], tmp_path: Path) -> None:
    again = tmp_path / "again"
    calibrate(DEMO_MODEL, again, dataset=demo_texts, **DEMO_SETTINGS)
    names = {path.name for path in again.iterdir()} - {"report.json", "gate.json"}  # the report holds timings
    assert len(names) > 6
    for name in names:
        assert (again / name).read_bytes() == (demo_checkpoint / name).read_bytes(), name


@pytest.mark.parametrize(
    "config",
    [
        tf.OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
        ),
        tf.Gemma3TextConfig(**{**COMMON, "num_hidden_layers": 2}, sliding_window=8),
        tf.Qwen3Config(**{**COMMON, "num_hidden_layers": 2}),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("scheme", ["W3A16", "W2A16_ASYM"])
def test_other_families_are_written_whole(
    config: tf.PreTrainedConfig, scheme: str, tmp_path: Path, demo_texts: list[str]
) -> None:
    source = save_tiny(tmp_path / "source", config)
    out = tmp_path / "out"
    calibrate(source, out, scheme=scheme, group_size=32, kv_cache="fp8", dataset=demo_texts, **{**QUICK, "iters": 0})
    state = dequantized_state_dict(out, torch.float32)
    original = tf.AutoModelForCausalLM.from_pretrained(source)
    assert state.keys() == original.state_dict().keys()
    quantized = read_manifest(out).schemes
    for name, tensor in original.state_dict().items():
        if name.removesuffix(".weight") in quantized:
            assert 0 < (state[name] - tensor).norm() / tensor.norm() < 0.7
        else:
            assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("scheme", ["FP8", "FP8_STATIC", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8", "W4A8_FP8"])
def test_every_scheme_with_quantized_activations_in_a_whole_model(
    scheme: str, tmp_path: Path, demo_texts: list[str]
) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
    source = save_tiny(tmp_path / "source", tf.LlamaConfig(**{**COMMON, **wide}))
    calibrate(source, tmp_path / "out", scheme=scheme, dataset=demo_texts, **{**QUICK, "iters": 2})
    state = dequantized_state_dict(tmp_path / "out", torch.float32)
    for name, tensor in tf.AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        quantized = name.endswith("_proj.weight")
        assert (
            0 < (state[name] - tensor).norm() / tensor.norm() < 0.2 if quantized else torch.equal(state[name], tensor)
        )
    scales = dict(read_tensors(tmp_path / "out", ("input_scale", "input_global_scale")))
    for name, scale in scales.items():  # layers that vLLM fuses share theirs
        assert torch.equal(scale, scales[name.replace("q_proj", "v_proj").replace("gate_proj", "up_proj")])


@pytest.mark.parametrize(
    ("scheme", "how", "low", "high"),
    [
        ("FP8_STATIC", {"recipe": "rtn"}, 1.0, 2.0),
        ("NVFP4", {"recipe": "rtn"}, 0.5, 1.0),  # a divisor
        ("FP8_STATIC", {"recipe": "autoround", "iters": 4, "lr": 0.02}, 0.9, 1.0),
        ("NVFP4", {"recipe": "autoround", "iters": 2}, 1.0, 1.0),
    ],
)
def test_static_scales_of_inputs_are_stored_as_they_were_tuned(
    scheme: str, how: dict[str, Any], low: float, high: float, tmp_path: Path, demo_texts: list[str]
) -> None:
    common = {"scheme": scheme, "dataset": demo_texts, "nsamples": 16, "seqlen": 64}
    calibrate(DEMO_MODEL, tmp_path / "plain", recipe="rtn", scale_search=False, **common)
    report = calibrate(DEMO_MODEL, tmp_path / "tuned", **common, **{"batch_size": 2, **how})
    suffixes = ("input_scale", "input_global_scale")
    plain, tuned = (dict(read_tensors(tmp_path / name, suffixes)) for name in ("plain", "tuned"))
    moved = [factor != 1 for block in report["blocks"] for factor in block["input_scales"].values()]
    assert any(moved) == (low != high)
    for index, block in enumerate(report["blocks"]):
        factors = block["input_scales"]
        assert len(factors) == 7
        assert all(low <= factor <= high for factor in factors.values())
        assert factors["self_attn.q_proj"] == factors["self_attn.v_proj"]
        for name, factor in factors.items() if index == 0 else ():  # the others are fed something else
            [stored] = (key for key in tuned if key.startswith(f"{block['name']}.{name}."))
            assert tuned[stored].item() == pytest.approx(plain[stored].item() * factor, rel=1e-6)


@pytest.mark.parametrize("kl_last_block", [False, True])
def test_padding_counts_nowhere(tmp_path: Path, kl_last_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 24 tokens, padded to 40 and not: the same but for the signs of gradients near 0."""
    monkeypatch.setattr("calibrate.plan.has_amx", lambda: False)  # float32
    texts = torch.randint(2, 800, (16, 24), generator=torch.Generator().manual_seed(0)).tolist()
    settings: dict[str, Any] = {
        "scheme": "W3A16",
        "layers": {"o_proj": "FP8_STATIC", "gate_proj": "NVFP4", "lm_head": "W2A16G32"},
        "kv_cache": "fp8_per_head",
        "dataset": texts,
        "nsamples": 16,
        "iters": 2,
        "lr": 0.01,
        "kl_last_block": kl_last_block,
    }
    reports, scales = [], []
    for name, shape in (("plain", {"seqlen": 24}), ("padded", {"seqlen": 40, "pad": True})):
        reports.append(calibrate(DEMO_MODEL, tmp_path / name, **settings, **shape))
        scales.append(dict(read_tensors(tmp_path / name, ("_scale",))))
    for mine, other in zip(*(report["blocks"] for report in reports), strict=True):
        for key in ("start_db", "tuned_db", "start_loss", "tuned_loss", "final_loss"):
            assert mine[key] == pytest.approx(other[key], rel=0.01), (mine["name"], key)
    for name, scale in scales[0].items():
        if scale.dtype == torch.float32:  # of activations, and of weights that no step changes
            torch.testing.assert_close(scales[1][name], scale, rtol=0.01, atol=0.0, msg=name)
    # Searched with the importance of what the head is fed: rounding turns .03 of them at most, counted padding .6.
    assert (scales[0]["lm_head.weight_scale"] != scales[1]["lm_head.weight_scale"]).float().mean() < 0.05


def test_ignored_layers_stay_as_they_were(tmp_path: Path, demo_texts: list[str]) -> None:
    out = tmp_path / "out"
    ignore = ("model.layers.1.mlp.down_proj", r"re:.*layers\.0\.self_attn\..*")
    calibrate(DEMO_MODEL, out, dataset=demo_texts, ignore=ignore, **QUICK)
    manifest = read_manifest(out)
    assert len(manifest.schemes) == 28 - 5
    assert set(manifest.ignore) == {
        "lm_head",
        "model.layers.1.mlp.down_proj",
        *(f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"),
    }
    state, original = dequantized_state_dict(out, torch.bfloat16), load_file(DEMO_MODEL / "model.safetensors")
    for layer in set(manifest.ignore) - {"lm_head"}:
        assert torch.equal(state[f"{layer}.weight"], original[f"{layer}.weight"])


def test_a_value_that_overflows_stops_the_run_by_name_and_leaves_nothing(tmp_path: Path, demo_texts: list[str]) -> None:
    source = copied_model(tmp_path / "overflowing", **{"model.layers.2.mlp.up_proj.weight": 1e38})
    with pytest.raises(NonFiniteError, match=r"model.layers.2: mlp.up_proj gives a value that is not finite"):
        calibrate(source, tmp_path / "out", dataset=demo_texts, **QUICK)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_run_leaves_no_checkpoint_and_the_next_one_succeeds(tmp_path: Path, demo_texts: list[str]) -> None:
    data, out = tmp_path / "data.json", tmp_path / "out"
    data.write_text(json.dumps(demo_texts))
    command = [sys.executable, "-m", "calibrate", str(DEMO_MODEL), str(out), "--dataset", str(data)]
    command += ["--iters", "3", "--batch-size", "2", "--seqlen", "64", "--nsamples", "4"]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 120
    while not list(partial.glob("model-*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(partial.glob("model-*.safetensors"))  # it was killed with work on disk
    assert not out.exists()
    assert main([*command[2:2], "calibrate", *command[3:]]) == 0
    assert (out / "config.json").is_file()
    assert not partial.exists()
    inspect_checkpoint(out)


def test_help_states_the_defaults_schemes_and_recipes() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "calibrate", "--help"],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(run.stdout.splitlines()) <= 100
    for flag in ("scheme", "group-size", "kv-cache", "dataset", "recipe", "iters", "batch-size", "lr", "seqlen"):
        assert f"--{flag}" in run.stdout
    for name in ("W3A16_ASYM", "FP8_STATIC", "NVFP4", "MXFP4", "gguf:q4_0", "autoround-best"):
        assert name in run.stdout
    for default in ("W4A16", "128", "default", "compressed-tensors", "NeelNanda/pile-10k", "42", "auto"):
        assert f"default: {default})" in " ".join(run.stdout.split())


@pytest.mark.parametrize("ignore", [(), (r"re:model\.layers\.0\.",)])
def test_one_sample_tunes_and_judges(ignore: tuple[str, ...], tmp_path: Path, demo_texts: list[str]) -> None:
    settings = {**QUICK, "nsamples": 1, "batch_size": 1}
    report = calibrate(DEMO_MODEL, tmp_path / "out", dataset=demo_texts, ignore=ignore, **settings)
    assert report["heldout_samples"] == 0
    assert all(block["start_db"] < -10 for block in report["blocks"] if block["layers"])


def test_a_whole_block_may_be_ignored(tmp_path: Path, demo_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrate.plan.has_amx", lambda: False)  # sums in bfloat16 depend on the size of a batch
    out = tmp_path / "out"
    report = calibrate(DEMO_MODEL, out, dataset=demo_texts, ignore={r"re:model\.layers\.0\."}, **QUICK)
    assert report["blocks"][0]["start_db"] is None  # no error at all
    assert report["blocks"][0]["layers"] == {}
    assert len(read_manifest(out).schemes) == 21
    json.loads((out / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_float16_models_keep_their_type(tmp_path: Path, demo_texts: list[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tf.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float16).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((DEMO_MODEL / name).read_bytes())
    calibrate(source, out, scheme="W8A16", dataset=demo_texts, scale_search=False, **{**QUICK, "iters": 0})
    tensors = {name: load_file(path)[name] for name, path in tensor_files(out).items()}
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float16
    state, original = dequantized_state_dict(out, torch.float32), load_file(source / "model.safetensors")
    for layer in read_manifest(out).schemes:
        weight = original[f"{layer}.weight"].float()
        step = weight.unflatten(1, (-1, 128)).abs().amax(-1, keepdim=True) / 128
        error = (state[f"{layer}.weight"] - weight).unflatten(1, (-1, 128)).abs()
        # Half a step; a whole one where the smaller extreme falls off the end; 2^-10 for the rounded scale.
        assert (error <= step * (1 + 2**-3)).all()
        assert (error <= step * 0.5 * (1 + 2**-3)).float().mean() > 0.98


@pytest.mark.parametrize("kind", ["symlink", "dot"])
def test_unusual_ways_to_name_an_empty_folder(
    kind: str, tmp_path: Path, demo_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    if kind == "symlink":
        (tmp_path / "link").symlink_to(target)
        calibrate(DEMO_MODEL, tmp_path / "link", dataset=demo_texts, **{**QUICK, "iters": 0})
    else:
        monkeypatch.chdir(target)
        calibrate(DEMO_MODEL, ".", dataset=demo_texts, **{**QUICK, "iters": 0})
    inspect_checkpoint(target)


def test_a_partial_folder_that_is_not_ours_is_left_alone(tmp_path: Path, demo_texts: list[str]) -> None:
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(CalibrationError, match=r"out.partial is in the way"):
        calibrate(DEMO_MODEL, tmp_path / "out", dataset=demo_texts, **QUICK)
    assert mine.read_text() == "mine"


def writer_of_nothing(out: Path) -> CheckpointWriter:
    source = load_source(str(DEMO_MODEL), trust_remote_code=False)
    return CheckpointWriter(out, source, [], Manifest(schemes={}))


def test_a_second_run_to_the_same_folder_is_refused(tmp_path: Path) -> None:
    first, second = (writer_of_nothing(tmp_path / "out") for _ in range(2))
    with first, pytest.raises(CalibrationError, match=r"another run is writing .*out.partial"), second:
        pass


def test_a_finished_checkpoint_is_kept_when_its_name_was_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer_of_nothing(out) as writer:
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")
        with pytest.raises(CalibrationError, match=r"the finished checkpoint is .*out.partial"):
            writer.publish({})
    assert (out / "theirs.txt").is_file()
    assert (tmp_path / "out.partial" / "report.json").is_file()
