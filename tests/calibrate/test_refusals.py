"""What is refused before any work: all problems in one message, exit status 2."""

from pathlib import Path

import pytest
import transformers as tf

from calibrate import CalibrationError, calibrate
from calibrate.cli import main
from tests.calibrate.conftest import COMMON, QUICK, copied_model, save_tiny
from tests.conftest import DEMO_MODEL


def broken_model(folder: Path) -> Path:
    """The demo model with one NaN in a layer and one outside the blocks."""
    nan = float("nan")
    return copied_model(folder, **{"model.layers.2.mlp.up_proj.weight": nan, "model.norm.weight": nan})


def test_every_problem_is_reported_at_once_before_any_work(tmp_path: Path, demo_texts: list[str]) -> None:
    source, out = broken_model(tmp_path / "broken"), tmp_path / "out"
    with pytest.raises(CalibrationError) as caught:
        calibrate(
            source,
            out,
            group_size=256,
            dataset=demo_texts[:1],
            ignore=["model.layers.0.self_attn.q_proj", "model.layers.9.mlp"],
            stock_vllm=True,
            seqlen=4096,
            batch_size=8,
            nsamples=2,
            device="cuda:99",
        )
    message = str(caught.value)
    for part in (
        "model.layers.2.mlp.up_proj.weight has values that are not finite",
        "model.norm.weight has values that are not finite",
        "model.layers.0.self_attn: stock vLLM fuses q_proj, k_proj, v_proj into one layer and needs one scheme for it",
        "'model.layers.9.mlp' matches no layer; names look like model.layers.0.self_attn.q_proj",
        "seqlen 4096 is more than the model's 2048 positions; use --seqlen 2048",
        "batch-size 8 is more than the 1 of 2 samples that are tuned on",
        "device 'cuda:99' cannot be used",
        "the data set gives",
    ):
        assert part in message
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_group_size_that_does_not_divide_names_the_fitting_ones(tmp_path: Path, demo_texts: list[str]) -> None:
    source = save_tiny(tmp_path / "source", tf.LlamaConfig(**COMMON))
    with pytest.raises(
        CalibrationError, match=r"q_proj: in_features 64 is not a multiple .* use a group size of 16, 32, 64"
    ):
        calibrate(source, tmp_path / "out", dataset=demo_texts, **QUICK)


def test_experts_are_refused_by_name(tmp_path: Path, demo_texts: list[str]) -> None:
    source = save_tiny(tmp_path / "source", tf.MixtralConfig(**COMMON, num_local_experts=2))
    with pytest.raises(CalibrationError, match=r"model.layers.0.mlp.experts.* is a matrix that no linear layer owns"):
        calibrate(source, tmp_path / "out", group_size=32, dataset=demo_texts, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "W9A16"], "weight bits must be 2 to 8, got 9"),
        (["--group-size", "48"], "group size must be one of"),
        (["--lr", "2"], "lr must be above 0 and at most 1, got 2.0"),
        (["--end-to-end-lr", "0"], "end-to-end-lr must be above 0 and at most 1, got 0.0"),
        (["--end-to-end-iters", "-1"], "end-to-end-iters must be a whole number of at least 0, got -1"),
        (
            ["--end-to-end-iters", "10"],
            "end-to-end-iters has no effect: no layer has integer weights of 3 bits or fewer",
        ),
        (["--tuning-precision", "fp8", "--device", "cpu"], "cpu has no FP8 matrix products"),
        (["--tuning-precision", "fp8", "--seqlen", "1001"], "to be a multiple of 16, got 2 x 1001; change --seqlen"),
        (["--iters", "-1", "--nsamples", "0"], "nsamples must be a whole number of at least 1, got 0"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--dataset", "gone.jsonl"], "dataset gone.jsonl does not exist"),
    ],
)
def test_bad_input_exits_2_with_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["calibrate", str(DEMO_MODEL), str(out), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not out.exists()


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert main(["calibrate", str(DEMO_MODEL), str(tmp_path)]) == 2
    assert "exists and is not an empty folder; choose another or remove it" in capsys.readouterr().err
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_a_quantized_model_is_refused(demo_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"is quantized already \(compressed-tensors\)"):
        calibrate(demo_checkpoint, tmp_path / "out")


def test_unknown_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CalibrationError, match="is neither a folder nor to be had from the Hub"):
        calibrate("nobody/no-such-model", tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"is a folder without config.json"):
        calibrate(tmp_path, tmp_path / "out")


def test_missing_tensors_are_not_made_up(tmp_path: Path, demo_texts: list[str]) -> None:
    source = copied_model(tmp_path / "source", **{"model.layers.1.mlp.down_proj.weight": None})
    with pytest.raises(CalibrationError, match=r"1 missing tensors, the first is model.layers.1.mlp.down_proj.weight"):
        calibrate(source, tmp_path / "out", dataset=demo_texts, **QUICK)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "cannot be loaded: "),
        ("config.json", '{"model_type": "no-such-model"}', "cannot be loaded: "),
        ("model.safetensors", "not a header", "cannot be loaded: "),
        ("model.safetensors", None, "has no safetensors files; convert its weights first"),
    ],
)
def test_damaged_models_are_refused(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copied_model(tmp_path / "source")
    (source / name).unlink()
    if content is not None:
        (source / name).write_text(content)
    assert main(["calibrate", str(source), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
