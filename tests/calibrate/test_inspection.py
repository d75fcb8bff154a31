"""`inspect` on the checkpoints of other tools."""

from pathlib import Path

import pytest

from calibrate.inspection import Inspection, inspect_checkpoint, inspection_table
from vllm_autoround.format.errors import ManifestError

GOLDEN = Path(__file__).parents[1] / "golden"


def inspect(name: str) -> Inspection:
    folder = next((path for path in (GOLDEN / name, GOLDEN / ".made" / name) if (path / "golden.json").is_file()), None)
    if folder is None:
        pytest.skip(f"{name} is not there; tests/golden/make.sh makes it")
    return inspect_checkpoint(folder)


def test_auto_round_with_mixed_bits_and_a_quantized_head() -> None:
    inspection = inspect("ar_mixed_lm_head")
    assert (inspection.dialect, inspection.layouts) == ("auto-round", {"gptq": 14})
    # Bits, a float16 scale and a zero point of as many bits a group.
    assert {scheme.scheme: scheme.bits_per_weight for scheme in inspection.schemes} == {
        "int4 symmetric g32, 16-bit activations": 4 + (16 + 4) / 32,
        "int2 symmetric g64, 16-bit activations": 2 + (16 + 2) / 64,
        "int8 symmetric g32, 16-bit activations": 8 + (16 + 8) / 32,
    }
    table = inspection_table(inspection)
    assert "dialect     auto-round, tensors gptq (14 layers)" in table
    assert "KV cache    as the model" in table


def test_llm_compressor_with_a_quantized_kv_cache() -> None:
    inspection = inspect("lc_mixed_kv")
    assert inspection.dialect == "compressed-tensors"
    assert inspection.kv_scale_ranges.keys() == {"k_scale", "v_scale"}
    assert "KV cache    fp8 e4m3, static per tensor: k_scale" in inspection_table(inspection)


def test_static_fp8() -> None:
    inspection = inspect("ar_fp8_static")
    assert inspection.layouts == {"fp8_static": 14}
    assert [scheme.scheme for scheme in inspection.schemes] == ["fp8 per channel, fp8 static per tensor activations"]


def test_defects_are_named() -> None:
    with pytest.raises(ManifestError, match="k_scale is there but kv_cache_scheme is not"):
        inspect("arct_w4_kv")
