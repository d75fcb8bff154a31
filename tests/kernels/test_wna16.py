"""The Triton kernel on the CPU: its layout by hand, its results under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, hence a process of its own. There the activations are
float16: its bfloat16 truncates and cannot multiply. tests/gpu has bfloat16, and what only a compiler can get wrong.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.numerics import relative_error
from vllm_autoround.format.weights import Float8, Integer, QuantizedWeight
from vllm_autoround.kernels import wna16
from vllm_autoround.kernels.wna16 import prepare, wna16_linear

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    from tests.interpreter import patch_once_a_launch

    patch_once_a_launch()
REPOSITORY = Path(__file__).parents[2]
GROUPS = (16, 32, 64, 128, 256, None)
TYPES = [
    Integer(bits=bits, group_size=group, symmetric=symmetric)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for group in GROUPS
]
Run = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]
ROWS = (1, 3, 16, 17)
PATHS = [wna16.fused, wna16.unpacked]


def random_weight(type_: Integer, rows: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    """Random codes and zero points, scales of both signs."""
    groups = type_.tile(rows, columns).tiles(rows, columns)
    return QuantizedWeight(
        type=type_,
        codes=torch.randint(0, type_.max_code + 1, (rows, columns), dtype=torch.uint8),
        scale=((torch.rand(groups) + 0.5) * torch.randn(groups).sign() * 0.02).to(dtype),
        zero_point=None if type_.symmetric else torch.randint(0, type_.max_code + 1, groups, dtype=torch.uint8),
    )


def some_columns(type_: Integer) -> int:
    """A few groups, seldom a whole number of blocks; per channel not even whole slices."""
    return type_.group_size * (3 if type_.group_size < 256 else 2) if type_.group_size else 100


def check_weights(run: Run, weight: QuantizedWeight, features: Tensor, dtype: torch.dtype) -> None:
    """One-hot activations return the weights of these features, rounded to their type and not otherwise."""
    x = torch.nn.functional.one_hot(features, weight.codes.shape[1]).to(dtype)
    out = run(x, *prepare(weight), weight.type.bits, None)
    assert out.dtype == dtype
    assert torch.equal(out, weight.dequantize().to(dtype)[:, features].T)


def check(run: Run, weight: QuantizedWeight, rows: int, dtype: torch.dtype, bias: Tensor | None = None) -> None:
    """Random activations, within the budget of tests/numerics.py at their type; every other row one-hot, exactly."""
    columns, device = weight.codes.shape[1], weight.codes.device
    features = torch.randint(0, columns, (max(rows // 2, 1),), device=device)
    if rows == 1:
        check_weights(run, weight, features, dtype)
    x, dense = torch.randn(rows, columns, device=device).to(dtype), weight.dequantize()
    x[1::2] = torch.nn.functional.one_hot(features, columns).to(dtype)[: rows // 2]
    out = run(x, *prepare(weight), weight.type.bits, bias)
    assert out.dtype == dtype
    if bias is None:
        assert torch.equal(out[1::2], dense.to(dtype)[:, features[: rows // 2]].T)
    exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, dense.to(dtype), bias)
    assert relative_error(out[::2], exact[::2]) <= 2 * relative_error(plain[::2], exact[::2])


class TestLayout:
    """Words by hand: one unit of 8 bits, and a code of 3 bits that straddles two words."""

    def test_eight_bits(self) -> None:
        type_ = Integer(bits=8, group_size=None, symmetric=False)
        codes = torch.zeros(2, 64, dtype=torch.uint8)
        codes[1, [5, 21, 37, 53]] = torch.tensor([0x11, 0x22, 0x33, 0x44], dtype=torch.uint8)
        scale, zero = torch.tensor([[0.5], [-0.5]]).half(), torch.tensor([[5], [255]], dtype=torch.uint8)
        words, affine = prepare(QuantizedWeight(type=type_, codes=codes, scale=scale, zero_point=zero))
        assert words.shape == (1, 1, 2, 16)
        assert words[0, 0, 1, 5].item() == 0x44332211
        assert words.count_nonzero() == 1
        assert [value & 0xFFFFFFFF for value in affine.flatten().tolist()] == [0x3F000005, 0xBF0000FF]

    def test_three_bits(self) -> None:
        type_ = Integer(bits=3, group_size=256)
        codes = torch.zeros(3, 768, dtype=torch.uint8)
        codes[2, 512 + 10 * 16 + 7] = 7  # bits 30 to 32 of the unit of lane 7 in the second block
        words, affine = prepare(QuantizedWeight(type=type_, codes=codes, scale=torch.ones(3, 3).bfloat16()))
        assert words.shape == (2, 3, 3, 16)
        assert words[1, 0, 2, 7].item() == -0x40000000
        assert words[1, 1, 2, 7].item() == 1
        assert words.count_nonzero() == 2
        assert affine.tolist() == [[0x3F800004] * 3] * 3

    def test_part_of_a_weight(self) -> None:
        """Codes, scales and zero points that are views, as those of one rank are."""
        whole = random_weight(Integer(bits=4, group_size=128, symmetric=False), 40, 512, torch.bfloat16)
        fields = {"codes": whole.codes[8:24, 128:384], "scale": whole.scale[8:24, 1:3]}
        part = replace(whole, **fields, zero_point=whole.zero_point[8:24, 1:3])
        copies = {name: getattr(part, name).clone() for name in ("codes", "scale", "zero_point")}
        for made, expected in zip(prepare(part), prepare(replace(part, **copies)), strict=True):
            assert torch.equal(made, expected)
            assert made.is_contiguous()

    def test_refusals(self) -> None:
        weight = random_weight(Integer(bits=4, group_size=32), 4, 64, torch.bfloat16)
        with pytest.raises(ValueError, match="scales must be bfloat16 or float16, got"):
            prepare(replace(weight, scale=weight.scale.float()))
        for columns in (32, 48):
            with pytest.raises(ValueError, match=rf"\[4, {columns}\] with scales \[4, 2\] has not whole groups"):
                prepare(replace(weight, codes=weight.codes[:, :columns]))
        with pytest.raises(ValueError, match="integer weights, got"):
            prepare(replace(weight, type=Float8(strategy="channel")))
        if wna16.triton is not None:
            words, affine = prepare(weight)
            with pytest.raises(ValueError, match="activations must be bfloat16 or float16, got"):
                wna16_linear(torch.zeros(1, 64), words, affine, 4)
            with pytest.raises(ValueError, match="another number of input features than 192"):
                wna16_linear(torch.zeros(1, 192).half(), words, affine, 4)

    def test_without_triton(self) -> None:
        """The module imports, its layout can be made, and the operator says what is missing."""
        program = """if True:
            import sys; sys.modules["triton"] = None
            import torch
            from vllm_autoround.format.weights import Integer, quantize
            from vllm_autoround.kernels import wna16
            weight = quantize(torch.randn(8, 64).bfloat16(), Integer(bits=5, group_size=32))
            try:
                wna16.wna16_linear(torch.randn(1, 64).bfloat16(), *wna16.prepare(weight), 5)
            except RuntimeError as error:
                print(error)
        """
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert "needs Triton, which is not installed" in done.stdout, done.stderr

    def test_operator(self) -> None:
        """Registered once, also when the module is imported anew, with a shape that follows without running it."""
        importlib.reload(wna16)
        words, affine = prepare(random_weight(Integer(bits=3, group_size=64), 40, 64, torch.bfloat16))
        x = torch.empty(2, 5, 64, dtype=torch.bfloat16, device="meta")
        out = torch.ops.vllm_autoround.wna16_linear(x, words.to("meta"), affine.to("meta"), 3, None)
        assert (out.shape, out.dtype, out.device.type) == ((2, 5, 40), torch.bfloat16, "meta")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
def test_results_under_the_interpreter() -> None:
    """All of TestResults, in a process that interprets kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestResults"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


class TestResults:
    __test__ = INTERPRETING

    @pytest.mark.parametrize("type_", TYPES, ids=str)
    def test_weights(self, type_: Integer) -> None:
        """37 output rows; 1, 3, 16 and 17 rows of activations in turn."""
        weight, rows = random_weight(type_, 37, some_columns(type_), torch.float16), ROWS[TYPES.index(type_) % 4]
        check(wna16.fused, weight, rows, torch.float16)
        if type_.group_size in (16, None):
            check(wna16.unpacked, weight, rows, torch.float16)

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_identity(self, bits: int) -> None:
        """Every weight of a block and a part of the next, and fused one of each slice; two tiles, K in one part."""
        columns = {2: 272, 3: 528, 4: 144, 5: 528, 6: 272, 7: 528, 8: 80}[bits]
        weight = random_weight(Integer(bits=bits, group_size=16, symmetric=False), 65, columns, torch.bfloat16)
        check_weights(wna16.unpacked, weight, torch.arange(columns), torch.float16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wna16, "PROGRAMS", 1)
            slices = torch.arange(0, columns, 16)
            check_weights(wna16.fused, weight, slices + torch.randint(0, 16, slices.shape), torch.float16)

    @pytest.mark.parametrize("run", PATHS)
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("code", ["least", "greatest"])
    def test_extreme_codes(self, bits: int, code: str, run: Run) -> None:
        """All codes 0 or all 2^bits - 1, under both extreme zero points."""
        type_ = Integer(bits=bits, group_size=32, symmetric=False)
        weight = random_weight(type_, 19, 64, torch.float16)
        weight.codes.fill_(0 if code == "least" else type_.max_code)
        weight.zero_point[:] = torch.tensor([0, type_.max_code], dtype=torch.uint8)
        check(run, weight, 16, torch.float16)

    @pytest.mark.parametrize("programs", [1, 2, 528])
    def test_cuts_along_k(self, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """One part, three parts of different lengths, one part a block; with and without bias."""
        monkeypatch.setattr(wna16, "PROGRAMS", programs)
        weight = random_weight(Integer(bits=8, group_size=64, symmetric=False), 64, 320, torch.bfloat16)
        for bias in (None, torch.randn(64).half()):
            check(wna16.fused, weight, 5, torch.float16, bias)

    def test_parts_of_an_unpacked_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wna16, "UNPACKED_BYTES", 2 * 96 * 64)
        weight = random_weight(Integer(bits=6, group_size=32), 150, 96, torch.float16)
        check_weights(wna16.unpacked, weight, torch.arange(96), torch.float16)
        check(wna16.unpacked, weight, 20, torch.float16, torch.randn(150).half())

    @pytest.mark.parametrize("rows", [3, 130])
    def test_shapes_of_activations(self, rows: int) -> None:
        """More dimensions, columns that are not contiguous, rows that are far apart, no rows; either path."""
        weight = random_weight(Integer(bits=5, group_size=16), 9, 48, torch.float16)
        prepared = prepare(weight)
        x = torch.randn(rows, 2, 48).half()
        expected = wna16_linear(x.flatten(0, 1), *prepared, 5)
        assert torch.equal(wna16_linear(x, *prepared, 5), expected.view(rows, 2, 9))
        transposed = x.flatten(0, 1).T.contiguous().T
        assert torch.equal(wna16_linear(transposed, *prepared, 5), expected)
        padded = torch.nn.functional.pad(x.flatten(0, 1), (3, 10))[:, 3:51]
        assert torch.equal(wna16_linear(padded, *prepared, 5), expected)
        assert wna16_linear(x[:0], *prepared, 5).shape == (0, 2, 9)

    def test_scale_of_zero(self) -> None:
        weight = random_weight(Integer(bits=4, group_size=32), 8, 64, torch.bfloat16)
        weight.scale[:, 0] = 0
        x = torch.randn(4, 64).half()
        out = wna16.fused(x, *prepare(weight), 4, None)
        exact = x.double() @ weight.dequantize().double().T
        assert relative_error(out, exact) < 1e-3

    def test_same_input_same_output(self) -> None:
        weight = random_weight(Integer(bits=3, group_size=128, symmetric=False), 33, 1536, torch.float16)
        x, prepared = torch.randn(2, 1536).half(), prepare(weight)
        assert torch.equal(wna16_linear(x, *prepared, 3), wna16_linear(x, *prepared, 3))
