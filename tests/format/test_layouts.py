"""Every layout: golden words worked out by hand, compressed-tensors 0.17 as the oracle of padded words, and cuts for
tensor parallelism."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from vllm_autoround.format.layouts import LAYOUTS, Layout
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, QuantizedWeight, TensorSpec, WeightType, quantize

ROWS, COLUMNS = 64, 128
INTEGER_LAYOUTS = [name for name in LAYOUTS if not name.startswith("fp8")]


def unsigned(words: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


def codes_of(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def channel(bits: int, symmetric: bool = True) -> Integer:
    return Integer(bits=bits, group_size=None, symmetric=symmetric)


def weight_of(codes: Tensor, type_: Integer, zeros: list[int] | None = None) -> QuantizedWeight:
    scale = torch.arange(1.0, len(codes) + 1)[:, None]
    zero_point = None if zeros is None else codes_of([[zero] for zero in zeros])
    return QuantizedWeight(type=type_, codes=codes, scale=scale, zero_point=zero_point)


def same(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    zeros = (left.zero_point is None) == (right.zero_point is None) and (
        left.zero_point is None or torch.equal(left.zero_point, right.zero_point)
    )
    codes = torch.equal(left.codes.view(torch.uint8), right.codes.view(torch.uint8))
    return zeros and codes and torch.equal(left.scale.float(), right.scale.float())


def test_gptq_words_of_three_bits_straddle_down_a_column() -> None:
    # Row n of the weight is 0 1 2 3 4 5 6 7 four times over, whose dense words are those of the packing tests; row 1
    # begins with 7 instead, so that only word 0 of column 1 differs, by its low three bits.
    codes = codes_of([[*range(8)] * 4 for _ in range(32)])
    codes[1, 0] = 7
    tensors = LAYOUTS["gptq"].to_tensors(weight_of(codes, channel(3)))
    assert tensors["qweight"].shape == (3, 32)
    assert unsigned(tensors["qweight"][:, 0]) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert unsigned(tensors["qweight"][:, 1]) == [0x88FAC68F, 0xC688FAC6, 0xFAC688FA]
    # The midpoint 4 minus one is 0b011, 32 times: the pattern is cut after 32 bits, within a code.
    assert unsigned(tensors["qzeros"]) == [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]
    assert tensors["scales"].tolist() == [[float(n) for n in range(1, 33)]]
    # Without the minus one: 0b100.
    assert unsigned(LAYOUTS["gptq_v2"].to_tensors(weight_of(codes, channel(3)))["qzeros"]) == [
        0x24924924,
        0x49249249,
        0x92492492,
    ]


@pytest.mark.parametrize(
    ("layout", "zeros"),
    [("gptq", 0x76543210), ("gptq_v2", 0x87654321), ("awq", 0x86427531)],
    ids=str,
)
def test_zero_points_of_four_bits(layout: str, zeros: int) -> None:
    codes = codes_of([[(row + column) % 16 for column in range(8)] for row in range(8)])
    weight = weight_of(codes, channel(4, symmetric=False), zeros=[1, 2, 3, 4, 5, 6, 7, 8])
    assert unsigned(LAYOUTS[layout].to_tensors(weight)["qzeros"]) == [zeros]


def test_awq_order() -> None:
    # Feature k of row n has code n + k: at k = 0 eight rows have 0 to 7, which the word holds as 0 2 4 6 1 3 5 7.
    codes = codes_of([[row + column for column in range(8)] for row in range(8)])
    words = LAYOUTS["awq"].to_tensors(weight_of(codes, channel(4)))["qweight"]
    assert words.shape == (8, 1)
    assert unsigned(words)[:2] == [0x75316420, 0x86427531]


def test_padded_words() -> None:
    # Ten 3-bit codes a word, two bits to spare.
    codes = codes_of([[1] * 10 + [2, 7]])
    tensors = LAYOUTS["padded"].to_tensors(weight_of(codes, channel(3)))
    assert unsigned(tensors["weight_packed"]) == [0x09249249, 0b111_010]


def test_unpacked_integers_are_signed() -> None:
    weight = weight_of(codes_of([[0, 8, 15]]), channel(4, symmetric=False), zeros=[3])
    tensors = LAYOUTS["int-quantized"].to_tensors(weight)
    assert tensors["weight"].tolist() == [[-8, 0, 7]]
    assert tensors["weight_zero_point"].tolist() == [[-5]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_padded_words_are_those_of_compressed_tensors_0_17(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (33, 70), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 1 << bits, (33,), generator=generator).tolist()
    type_ = channel(bits, symmetric=False)
    tensors = LAYOUTS["padded"].to_tensors(weight_of(codes, type_, zeros))
    half = 1 << (bits - 1)
    assert torch.equal(tensors["weight_packed"], pack_to_int32((codes.short() - half).to(torch.int8), bits))
    signed = (torch.tensor(zeros)[:, None] - half).to(torch.int8)
    assert torch.equal(tensors["weight_zero_point"], pack_to_int32(signed, bits, packed_dim=0))


def types_of(layout: str) -> list[WeightType]:
    if layout.startswith("fp8"):
        return (
            [Float8(strategy="block")] if layout == "fp8_block" else [Float8(strategy=s) for s in ("channel", "tensor")]
        )
    types: list[WeightType] = [
        Integer(bits=bits, group_size=group, symmetric=symmetric)
        for bits, group, symmetric in product((4,) if "g_idx" in layout else range(2, 9), (None, 32), (True, False))
    ]
    floats = [Float8(strategy="channel"), Float8(strategy="block"), NvFp4(), Mx(bits=4), Mx(bits=8)]
    return [*types, *floats] if layout == "compressed-tensors" else types


CASES = [pytest.param(name, type_, id=f"{name}-{type_}") for name in LAYOUTS for type_ in types_of(name)]


def example(type_: WeightType, rows: int = ROWS, columns: int = COLUMNS) -> QuantizedWeight:
    weight = quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), type_)
    if weight.zero_point is not None:
        weight.zero_point.clamp_(min=1, max=(1 << type_.bits) - 2)  # what a layout stores minus one
    return weight


@pytest.mark.parametrize(("layout", "type_"), CASES)
def test_round_trip(layout: str, type_: WeightType) -> None:
    weight, scheme = example(type_), QuantScheme(type_)
    tensors = LAYOUTS[layout].to_tensors(weight)
    specs = LAYOUTS[layout].specs(scheme, ROWS, COLUMNS, torch.float32)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert same(LAYOUTS[layout].from_tensors(tensors, scheme), weight)
    rows, columns = LAYOUTS[layout].size({name: tuple(t.shape) for name, t in tensors.items()}, scheme)
    assert rows == ROWS
    assert columns == COLUMNS or (layout == "padded" and COLUMNS <= columns < COLUMNS + 32 // type_.bits)


def cut(tensors: dict[str, Tensor], specs: dict[str, TensorSpec], axis: str) -> dict[str, Tensor]:
    """The second half of a layer along N ("output_dim") or K ("input_dim"), as a loader takes it by the specs."""
    halves = {}
    for name, tensor in tensors.items():
        dim = getattr(specs[name], axis)
        halves[name] = tensor if dim is None else tensor.chunk(2, dim)[1].contiguous()
    return halves


@pytest.mark.parametrize("axis", ["output_dim", "input_dim"])
@pytest.mark.parametrize(("layout", "type_"), [case for case in CASES if case.values[1].bits in (3, 4, 8)])
def test_specs_say_how_to_cut(layout: str, type_: WeightType, axis: str) -> None:
    if layout == "padded" and 32 % type_.bits:
        rows, columns = 32 // type_.bits * 64, 32 // type_.bits * 64  # halves of whole words and whole groups
    else:
        rows, columns = 256, 256
    along_n, scheme = axis == "output_dim", QuantScheme(type_)
    weight = example(type_, rows, columns)
    tensors = LAYOUTS[layout].to_tensors(weight)
    half = cut(tensors, LAYOUTS[layout].specs(scheme, rows, columns, torch.float32), axis)
    if "weight_shape" in half:
        half["weight_shape"] = torch.tensor([rows // 2, columns] if along_n else [rows, columns // 2])
    whole = weight.dequantize()
    expected = whole[rows // 2 :] if along_n else whole[:, columns // 2 :]
    assert torch.equal(LAYOUTS[layout].from_tensors(half, scheme).dequantize(), expected)


def tensors_of(layout: str, type_: Integer) -> tuple[Layout, dict[str, Tensor], QuantScheme]:
    return LAYOUTS[layout], LAYOUTS[layout].to_tensors(example(type_)), QuantScheme(type_)


def test_only_a_trivial_g_idx_is_read() -> None:
    layout, tensors, scheme = tensors_of("gptq+g_idx", Integer(bits=4, group_size=32))
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32 + [2] * 32 + [3] * 32
    layout.from_tensors({**tensors, "g_idx": tensors["g_idx"] + 4}, scheme)  # the second of two ranks
    swapped = tensors["g_idx"].clone()
    swapped[[0, 127]] = swapped[[127, 0]]
    with pytest.raises(ValueError, match="desc_act"):
        layout.from_tensors({**tensors, "g_idx": swapped}, scheme)
    with pytest.raises(ValueError, match="g_idx has shape"):
        layout.from_tensors({**tensors, "g_idx": swapped[:-1]}, scheme)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_a_symmetric_layer_has_the_midpoint_only(layout: str) -> None:
    """Which also tells zero points minus one from those that are not."""
    other = LAYOUTS["gptq_v2" if layout == "gptq" else "gptq"]
    type_ = Integer(bits=4, group_size=32)
    reader, tensors, scheme = tensors_of(layout, type_)
    with pytest.raises(ValueError, match=r"every zero point is 8, but one is [79]"):
        reader.from_tensors({**tensors, "qzeros": other.to_tensors(example(type_))["qzeros"]}, scheme)


def test_what_minus_one_cannot_say() -> None:
    type_ = Integer(bits=4, group_size=32, symmetric=False)
    weight = example(type_)
    assert weight.zero_point is not None
    weight.zero_point[3, 1] = 0
    with pytest.raises(ValueError, match="zero point of 0 cannot be stored minus one"):
        LAYOUTS["gptq"].to_tensors(weight)
    assert same(LAYOUTS["gptq_v2"].from_tensors(LAYOUTS["gptq_v2"].to_tensors(weight), QuantScheme(type_)), weight)
    _, tensors, scheme = tensors_of("gptq", type_)
    tensors["qzeros"][0, 0] |= 0xF
    with pytest.raises(ValueError, match="stored as 15, minus one: some readers"):
        LAYOUTS["gptq"].from_tensors(tensors, scheme)


@pytest.mark.parametrize("layout", ["compressed-tensors", "padded", "int-quantized"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_placeholder_zero_points_are_refused(layout: str, bits: int) -> None:
    type_ = Integer(bits=bits, group_size=32, symmetric=False)
    weight = example(type_)
    weight = replace(weight, zero_point=torch.full_like(weight.scale, 1 << (bits - 1), dtype=torch.uint8))
    tensors = LAYOUTS[layout].to_tensors(weight)
    if layout == "compressed-tensors" and bits == 4:
        assert set(unsigned(tensors["weight_zero_point"])) == {0x88888888}
    with pytest.raises(ValueError, match="placeholder midpoint"):
        LAYOUTS[layout].from_tensors(tensors, QuantScheme(type_))
    assert weight.zero_point is not None
    weight.zero_point[5, 1] -= 1
    assert same(LAYOUTS[layout].from_tensors(LAYOUTS[layout].to_tensors(weight), QuantScheme(type_)), weight)


@pytest.mark.parametrize("layout", INTEGER_LAYOUTS)
def test_a_ragged_last_group_is_refused_by_its_shapes(layout: str) -> None:
    type_ = Integer(bits=4, group_size=32)
    tensors = LAYOUTS[layout].to_tensors(example(type_, columns=160))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ragged = {name: tuple(3 if size == 5 else size for size in shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="last group is ragged: 160 input features in 3 groups of 64"):
        LAYOUTS[layout].size(ragged, QuantScheme(Integer(bits=4, group_size=64)))


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_only_whole_words_are_written(layout: str) -> None:
    with pytest.raises(ValueError, match="do not fill whole words"):
        LAYOUTS[layout].to_tensors(example(Integer(bits=3, group_size=None), rows=40, columns=40))


def test_only_integers_go_into_layouts_of_integers() -> None:
    for layout in ("gptq", "awq", "int-quantized"):
        with pytest.raises(ValueError, match="integer weights only, not mxfp4"):
            LAYOUTS[layout].to_tensors(example(Mx(bits=4)))
    with pytest.raises(ValueError, match="FP8 weights only"):
        LAYOUTS["fp8_static"].to_tensors(example(Mx(bits=8)))


def test_bytes_beyond_their_width_are_refused() -> None:
    layout, tensors, scheme = tensors_of("int-quantized", Integer(bits=4, group_size=32))
    tensors["weight"][0, 0] = 8
    with pytest.raises(ValueError, match="not 4-bit integers"):
        layout.from_tensors(tensors, scheme)
