"""What each format says of each scheme, as the format's readers here find it again; and what it refuses by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibrate.config import CalibrationError
from calibrate.exporters import EXPORTERS
from calibrate.origin import Origin
from tests.calibrate.exports import as_json, export, llama
from tests.conftest import DEMO_MODEL
from vllm_autoround.format.layouts import LAYOUTS
from vllm_autoround.format.manifest import KVCache, Manifest
from vllm_autoround.format.reader import dequantized_state_dict, read_manifest, read_tensors
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer, QuantizedWeight

MIXED = {"q_proj": "W8A16G32", "down_proj": "W2A16G32", "o_proj": None}
# format, scheme -> layout, and the config's key that says it
CASES = [
    *[("compressed-tensors", f"W{bits}A16G32", "compressed-tensors", None) for bits in range(2, 9)],
    *[("compressed-tensors", f"W{bits}A16_ASYM_G32", "compressed-tensors", None) for bits in range(2, 9)],
    *[("auto_round", f"W{bits}A16G32", "gptq", "auto_round:auto_gptq") for bits in range(2, 9)],
    *[("auto_round", f"W{bits}A16_ASYM_G32", "gptq_v2", "auto_round") for bits in (2, 3, 5, 6, 7, 8)],
    ("auto_round", "W4A16_ASYM_G32", "awq", "auto_round:auto_awq"),
    ("auto_round", "W4A16_ASYM_G-1", "gptq_v2", "auto_round"),
    ("auto_round", "FP8_STATIC", "fp8_static", "auto_round:fp8_static"),
    ("auto_round", "FP8_BLOCK", "fp8_block", "auto_round:fp8"),
    ("auto_round", "NVFP4", "compressed-tensors", "auto_round:llm_compressor"),
    ("auto_round", "MXFP4", "compressed-tensors", "auto_round:llm_compressor"),
    ("auto_round", "MXFP8", "compressed-tensors", "auto_round:llm_compressor"),
    *[("auto_gptq", f"W{bits}A16G32", "gptq+g_idx", "gptq") for bits in (2, 3, 4, 8)],
    *[("auto_gptq", f"W{bits}A16_ASYM_G32", "gptq_v2+g_idx", "gptq_v2") for bits in (2, 3, 4, 8)],
    ("auto_awq", "W4A16_ASYM_G32", "awq", "gemm"),
    *[
        ("compressed-tensors", name, "compressed-tensors", None)
        for name in ("FP8", "FP8_STATIC", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP8", "W4A8_FP8")
    ],
]  # fmt: skip


@pytest.mark.parametrize(("name", "scheme", "layout", "said"), CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_every_scheme_reads_back_as_it_was(
    name: str, scheme: str, layout: str, said: str | None, tmp_path: Path
) -> None:
    wide = {"hidden_size": 128, "head_dim": 32} if scheme in ("FP8_BLOCK", "W4A8_FP8") else {}
    config = llama(**wide, intermediate_size=128, num_hidden_layers=1)
    exported = export(tmp_path, config, scheme, [name])
    manifest = read_manifest(exported.out)
    assert set(manifest.schemes.values()) == {QuantScheme.parse(scheme)}
    assert manifest.layout == layout
    written = as_json(exported.out / "config.json")["quantization_config"]
    assert said in (None, *(written.get(key) for key in ("packing_format", "checkpoint_format", "version")))
    state, expected = dequantized_state_dict(exported.out, torch.float32), exported.state()
    assert state.keys() == expected.keys()
    for tensor in expected:
        assert torch.equal(state[tensor], expected[tensor]), tensor
    if name != "compressed-tensors" and scheme.startswith("W"):
        assert {t.dtype for _, t in read_tensors(exported.out, (".scales",))} == {torch.float16}


@pytest.mark.parametrize("name", ["compressed-tensors", "auto_round", "auto_gptq"])
def test_mixtures_and_unquantized_layers(name: str, tmp_path: Path) -> None:
    exported = export(tmp_path, llama(), lambda layer: MIXED.get(layer.rpartition(".")[2], "W4A16G32"), [name])
    manifest = read_manifest(exported.out)
    assert {layer: manifest.schemes.get(layer) for layer in exported.weights} == {
        layer: QuantScheme(weight.type) for layer, weight in exported.weights.items()
    }
    assert {"lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(2))} == set(manifest.ignore)
    state = dequantized_state_dict(exported.out, torch.float32)
    assert all(torch.equal(state[tensor], expected) for tensor, expected in exported.state().items())


@pytest.mark.parametrize("name", ["compressed-tensors", "auto_round"])
@pytest.mark.parametrize("scheme", ["W4A16G32", "FP8_STATIC"])
def test_kv_cache_scales(name: str, scheme: str, tmp_path: Path) -> None:
    out = export(tmp_path, llama(), scheme, [name], kv_cache="fp8").out
    assert read_manifest(out).kv_cache == "fp8"
    scales = {tensor: value.tolist() for tensor, value in read_tensors(out, ("k_scale", "q_scale"))}
    assert scales["model.layers.1.self_attn.q_scale"] == [1.25]
    assert len(scales) == 4


def problems(
    name: str, scheme: str, rows: int = 64, columns: int = 64, kv_cache: KVCache | None = None, other: str | None = None
) -> list[str]:
    schemes = {"model.layers.0.a": QuantScheme.parse(scheme), "model.layers.0.b": QuantScheme.parse(other or scheme)}
    manifest = Manifest(schemes=schemes, ignore=("lm_head",), kv_cache=kv_cache)
    origin = Origin(DEMO_MODEL, as_json(DEMO_MODEL / "config.json"))
    return EXPORTERS[name].problems(manifest, dict.fromkeys(schemes, (rows, columns)), origin)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("auto_awq", {"scheme": "W4A16"}, "takes 4 bits, asymmetric, in groups, not int4 symmetric g128"),
        ("auto_awq", {"scheme": "W8A16_ASYM"}, "not int8 asymmetric g128"),
        ("auto_awq", {"scheme": "W4A16_ASYM_G-1"}, "not int4 asymmetric per channel"),
        ("auto_awq", {"scheme": "W4A16_ASYM", "other": "W4A16_ASYM_G32"}, "one scheme for every layer"),
        ("auto_awq", {"scheme": "W4A16_ASYM", "kv_cache": "fp8"}, "auto_awq has no place for KV-cache scales"),
        ("auto_gptq", {"scheme": "W5A16"}, "takes integer weights of 2, 3, 4 or 8 bits, not int5 symmetric"),
        ("auto_gptq", {"scheme": "NVFP4"}, "takes integer weights of 2, 3, 4 or 8 bits, not nvfp4"),
        ("auto_gptq", {"scheme": "W4A8_FP8"}, "cannot be said, activations stay in 16 bits"),
        ("auto_gptq", {"scheme": "W4A16", "kv_cache": "fp8"}, "auto_gptq has no place for KV-cache scales"),
        (
            "auto_gptq",
            {"scheme": "W4A16", "rows": 48},
            "a layer of 48 x 64 is not made of whole words, 32 x 32 weights",
        ),
        ("auto_round", {"scheme": "W4A16", "columns": 80}, "a layer of 64 x 80 is not made of whole words"),
        ("auto_round", {"scheme": "FP8_DYNAMIC"}, "no reader takes fp8 per channel, fp8 dynamic per token activations"),
        ("auto_round", {"scheme": "NVFP4A16"}, "no reader takes nvfp4, 16-bit activations"),
        ("auto_round", {"scheme": "W4A8_FP8"}, "activations stay in 16 bits"),
        ("auto_round", {"scheme": "W4A16", "other": "NVFP4"}, "one packing_format"),
        ("gguf:q4_0", {"scheme": "W4A16"}, "takes int4 symmetric g32, 16-bit activations only; 2 layers are not"),
        ("gguf:q4_0", {"scheme": "W4A16_ASYM_G32"}, "use --scheme W4A16G32"),
        ("gguf:q4_1", {"scheme": "W4A16G32"}, "use --scheme W4A16_ASYM_G32"),
        ("gguf:q4_0", {"scheme": "W4A16G32", "other": "W8A16"}, "1 layers are not, the first is model.layers.0.b"),
        ("gguf:q4_0", {"scheme": "W4A16G32", "kv_cache": "fp8"}, "gguf:q4_0 has no place for KV-cache scales"),
    ],
)
def test_what_a_format_cannot_say_is_refused_before_tuning(
    name: str, arguments: dict[str, object], message: str
) -> None:
    [problem] = problems(name, **arguments)
    assert message in problem


@pytest.mark.parametrize("name", EXPORTERS)
def test_what_a_format_can_say_is_not_refused(name: str) -> None:
    scheme = "W4A16G32" if name in ("auto_gptq", "gguf:q4_0") else "W4A16_ASYM_G32"
    assert not problems(name, scheme)


def test_zero_points_of_0_are_for_the_layouts_that_hold_them() -> None:
    type_ = Integer(bits=4, group_size=32, symmetric=False)
    zero = torch.tensor([[0], [15]], dtype=torch.uint8).repeat(16, 1)
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    weight = QuantizedWeight(type=type_, codes=codes, scale=torch.ones(32, 1).bfloat16(), zero_point=zero)
    manifest = Manifest(schemes={"layer": QuantScheme(type_)})
    for name in ("auto_round", "auto_gptq", "auto_awq"):
        exporter = EXPORTERS[name]
        written = exporter.manifest(manifest)  # type: ignore[attr-defined]
        tensors = exporter.layer_tensors("layer", weight, written)  # type: ignore[attr-defined]
        back = written.layout_of("layer").from_tensors(tensors, QuantScheme(type_))
        assert torch.equal(back.zero_point, zero)
    with pytest.raises(ValueError, match="a zero point of 0 cannot be stored minus one"):
        LAYOUTS["gptq"].to_tensors(weight)


def test_a_scale_that_float16_cannot_hold_is_refused_by_name() -> None:
    type_ = Integer(bits=4, group_size=32)
    scale = torch.full((32, 1), 1e5).bfloat16()
    weight = QuantizedWeight(type=type_, codes=torch.zeros(32, 32, dtype=torch.uint8), scale=scale)
    manifest = Manifest(schemes={"model.x": QuantScheme(type_)}, layout="gptq")
    with pytest.raises(CalibrationError, match=r"auto_gptq: model.x: scale 99840 of row 0, group 0 is not a float16"):
        EXPORTERS["auto_gptq"].layer_tensors("model.x", weight, manifest)  # type: ignore[attr-defined]
