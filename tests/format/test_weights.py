"""What weights stand for on disk: written out by hand, and held against compressed-tensors and auto-round.

compressed-tensors divides and multiplies in the dtype of its inputs. In float32 both compute the same; its
decompressors work in bfloat16 or in the dtype of the scale and round their product once, so that they equal ours
rounded once to that dtype: a code times a scale of at most eleven bits is exact in float32.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as peer_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as peer_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.format.make_golden_autoround import CLIP_HIGH, CLIP_LOW, CORNER, golden_weight
from vllm_autoround.format.grids import E2M1, E4M3
from vllm_autoround.format.packing import pack, unpack_padded
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import (
    Float8,
    Integer,
    Mx,
    NvFp4,
    QuantizedWeight,
    TensorSpec,
    WeightType,
    quantize,
    store,
)
from vllm_autoround.format.weights.base import MIN_SCALE
from vllm_autoround.format.weights.integer import GROUP_SIZES

INTEGERS = [
    Integer(bits=bits, group_size=group, symmetric=symmetric)
    for bits in range(2, 9)
    for group in (*GROUP_SIZES, None)
    for symmetric in (True, False)
]
FLOATS: list[WeightType] = [
    *(Float8(strategy=strategy) for strategy in ("channel", "tensor", "block")),  # type: ignore[arg-type]
    NvFp4(),
    Mx(bits=4),
    Mx(bits=8),
]
TYPES = [*INTEGERS, *FLOATS]
ONE_GROUP_SIZE = [type_ for type_ in INTEGERS if type_.group_size == 32] + FLOATS
FEW = [*ONE_GROUP_SIZE, *(Integer(bits=4, group_size=group, symmetric=group != 16) for group in (16, 256, None))]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BF16 = torch.bfloat16
N, K = 256, 256


@pytest.fixture(autouse=True)
def _eager() -> Any:
    """The library compiles its E2M1 rounding, which takes a quarter of a minute a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def adversarial(type_: WeightType) -> Tensor:
    """Random numbers, and groups that break a quantizer, of any size."""
    weight = torch.randn(N, K)
    weight[0] = 0
    weight[1, ::16] = 300.0  # one outlier a group
    weight[2] = torch.where(torch.arange(K) == 5, -1e4, 1e-3)  # one outlier in the row
    weight[3] = 1e-40  # subnormal
    weight[4] = torch.linspace(-1e-38, 1e-38, K)
    weight[5] = torch.linspace(0, 1, K)  # one sign
    weight[6] = -weight[5]
    weight[7] = torch.arange(K) % 17 - 8  # ties
    weight[8] = 1e30 * weight[9]
    weight[10] = 1e-6 * weight[9]
    weight[11] = -2.0
    weight[12, :128] = 0  # a group without anything beside one with something
    weight[13] = weight[14].bfloat16().float()
    if isinstance(type_, NvFp4) or type_.one_scale:  # what is one number a layer follows the largest of them
        weight[[1, 2, 8]] = weight[[1, 2, 8]].clamp(-50, 50)
    return weight


def round_to_grid(type_: WeightType, weight: Tensor, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """`quantize` of a float32 weight with scales in ``dtype``."""
    low, high = type_.bounds(weight)
    divisor = type_.global_scale(torch.maximum(-low, high).amax())
    scale, zero = type_.scale_and_zero_point(low, high, dtype, divisor)
    return round_with(type_, weight, scale, zero, dtype, divisor)


def round_with(
    type_: WeightType, weight: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, divisor: Tensor | None
) -> QuantizedWeight:
    tile = type_.tile(*weight.shape)
    offset = type_.zero if zero is None else zero[:, None, :, None]
    values = type_.round(tile.split(weight) / scale[:, None, :, None], offset)
    return store(tile.merge(values, weight.shape), scale, zero, type_, dtype, divisor)


def peer_args(type_: WeightType) -> QuantizationArgs:
    return QuantizationArgs(**type_.args())


def peer_scale(weight: QuantizedWeight) -> Tensor:
    """The scale as the library keeps it in memory: float, a power of two for MX."""
    scale = weight.type.acting_scale(weight.scale, None) if isinstance(weight.type, Mx) else weight.scale.float()
    return scale.reshape(1) if peer_args(weight.type).strategy == "tensor" else scale


def peer_zero(weight: QuantizedWeight) -> Tensor | None:
    """The library's codes are signed: zero points too are smaller by 2^(bits-1)."""
    return None if weight.zero_point is None else weight.zero_point.float() - weight.type.zero


def values_of(weight: QuantizedWeight) -> Tensor:
    """The library's quantized values: of the grid, signed."""
    return weight.type.decode(weight.codes) - weight.type.zero


# --- (a) the same numbers as compressed-tensors, given the same scales ---


@pytest.mark.parametrize("type_", FEW, ids=str)
def test_rounds_and_dequantizes_exactly_as_compressed_tensors(type_: WeightType) -> None:
    weight = adversarial(type_)
    ours = round_to_grid(type_, weight)
    scale, zero, divisor = peer_scale(ours), peer_zero(ours), ours.global_scale
    peer = peer_quantize(weight, scale, zero, peer_args(type_), global_scale=divisor)
    wrong = values_of(ours) != peer
    if not type_.symmetric:
        # The library adds the zero point before it rounds: x = W/s is then known to 2^-16 only (|x + z| < 256), and
        # ties go to even sums instead of even x. Elsewhere nothing differs, and here by one code.
        tile = type_.tile(*weight.shape)
        x = tile.merge(tile.split(weight) / ours.scale.float()[:, None, :, None], weight.shape)
        wrong = wrong & ~(((x - x.floor() - 0.5).abs() <= 2.0**-16) & ((values_of(ours) - peer).abs() == 1))
    assert not wrong.any()
    same = peer_dequantize(values_of(ours), scale, zero, peer_args(type_), global_scale=divisor)
    assert torch.equal(ours.dequantize(), same)


def test_a_tie_of_an_asymmetric_type_goes_to_an_even_quotient_as_in_tuning() -> None:
    """q = round(W/s) + z, as while tuning; the library's round(W/s + z) differs on ties where z is odd."""
    type_ = Integer(bits=4, group_size=16, symmetric=False)
    weight, scale, zero = torch.full((1, 16), 0.5), torch.ones(1, 1), torch.full((1, 1), 3.0)
    assert round_with(type_, weight, scale, zero, BF16, None).codes[0, 0] == 3
    assert peer_quantize(weight, scale, zero - 8, peer_args(type_))[0, 0] + 8 == 4


def test_bfloat16_weights_are_divided_in_float32() -> None:
    """The library divides bfloat16 by bfloat16 in bfloat16, which moves quotients onto ties; we round once."""
    type_ = Integer(bits=8, group_size=32)
    weight = torch.randn(64, 256).to(BF16)
    ours = quantize(weight, type_)
    same = peer_quantize(weight.float(), ours.scale.float(), None, peer_args(type_))
    coarse = peer_quantize(weight, ours.scale, None, peer_args(type_)).float()
    assert torch.equal(values_of(ours), same)
    assert (values_of(ours) != coarse).any()
    error = (ours.dequantize() - weight.float()).square().mean()
    assert (
        error < (peer_dequantize(coarse, ours.scale.float(), None, peer_args(type_)) - weight.float()).square().mean()
    )


@pytest.mark.parametrize("type_", FLOATS, ids=str)
def test_scale_rules_of_float_types_against_compressed_tensors(type_: WeightType) -> None:
    weight = adversarial(type_)
    ours = round_to_grid(type_, weight)
    low, high = type_.bounds(weight)
    peer, _ = calculate_qparams(low, high, peer_args(type_), ours.global_scale)
    amax = torch.maximum(-low, high)
    scale = type_.acting_scale(ours.scale, None) if isinstance(type_, Mx) else ours.scale.float()
    if isinstance(type_, Float8):  # the library has no least scale, and 2^-23 for groups of zeros
        usual = amax >= MIN_SCALE * E4M3.highest
        assert (scale[~usual] == torch.tensor(MIN_SCALE)).all()
    elif isinstance(type_, NvFp4):  # scales below half the least E4M3 number: the library takes 0.125, we the least
        usual = peer != 0.125
        assert (scale[~usual] <= 0.125).all()
        assert (E4M3.round((amax * ours.global_scale / 6)[~usual]) <= 0.125).all()
    else:  # the next test
        mantissa = amax / torch.exp2(amax.log2().floor())
        usual = (amax > 1e-35) & (mantissa < 1.74)
    assert torch.equal(scale[usual], peer[usual])
    assert usual.float().mean() > (0.5 if isinstance(type_, Mx) else 0.8)


@pytest.mark.parametrize(("bits", "amax", "ours", "peer"), [
    (4, 4.0, 0, 0), (4, 6.0, 0, 0), (4, 6.99, 0, 0), (4, 7.0, 0, 1), (4, 7.99, 0, 1), (4, 8.0, 1, 1),
    (8, 448.0, 0, 1), (8, 447.0, 0, 0), (8, 500.0, 0, 1), (8, 512.0, 1, 1),
])  # fmt: skip
def test_mx_exponent_is_the_specifications_where_compressed_tensors_rounds_up(
    bits: Any, amax: float, ours: int, peer: int
) -> None:
    """floor(log2 amax) - emax; the library's is one more where amax is 1.75 times a power of two or above."""
    type_ = Mx(bits=bits)
    bound = torch.tensor([[amax]])
    scale, _ = type_.scale_and_zero_point(-bound, bound, BF16, None)
    assert scale.item() == 2.0**ours
    assert calculate_qparams(-bound, bound, peer_args(type_))[0].item() == 2.0**peer


@pytest.mark.parametrize("amax", [0.0, 1e-40, 1e-37, 7e-36, 1e-30, 0.1, 6.0, 1234.5, 3e38])
def test_global_scale_is_compressed_tensors_own(amax: float) -> None:
    """448 * 6 / amax, and 1 where that is not finite: a layer that saw nothing must not map everything to 0."""
    largest = torch.tensor(amax)
    ours = NvFp4().global_scale(largest)
    assert torch.equal(ours, generate_gparam(-largest, largest))
    assert ours.isfinite().all()


def test_nvfp4_scales_are_rounded_as_compressed_tensors_rounds_them() -> None:
    """Where global_scale * (amax / 6) and amax * (global_scale / 6) fall on two sides of a tie."""
    divisor = 2688 / torch.linspace(1, 9, 400)[:, None]
    ties = (E4M3.spacing(torch.logspace(-6, 8, 99, base=2)) * 8.5).unique()  # 1.0625 * 2^e: half way
    amax = (ties * 6 / divisor).contiguous()
    for neighbour in (amax, torch.nextafter(amax, torch.zeros(()))):
        for g, bound in zip(divisor, neighbour, strict=True):
            scale, _ = NvFp4().scale_and_zero_point(-bound[None], bound[None], BF16, g)
            peer, _ = calculate_qparams(-bound[None], bound[None], peer_args(NvFp4()), g)
            assert torch.equal(NvFp4().stored_scale(scale, BF16, g).float(), peer)


# --- (b) the library's own compressors, both ways ---


def peer_scheme(type_: WeightType) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=peer_args(type_))


def compressor(type_: WeightType) -> Any:
    return BaseCompressor.get_value_from_registry(type_.format)


def rounded_by_peer(type_: WeightType, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The library's state of a layer before it compresses it: its own scales and zero points."""
    divisor = type_.global_scale(weight.abs().amax())
    scale, zero = calculate_qparams(*type_.bounds(weight), peer_args(type_), divisor)
    if isinstance(type_, (Integer, Float8)):
        scale = scale.to(dtype)
    scale = scale.reshape(1) if peer_args(type_).strategy == "tensor" else scale
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    return state if divisor is None else state | {"weight_global_scale": divisor}


def plain(rows: int = N, columns: int = K) -> Tensor:
    """Random, with outliers and zeros, all of it far from the ends of bfloat16 and float16."""
    weight = torch.randn(rows, columns)
    weight[0] = 0
    weight[1, ::16] = 300.0
    weight[2, 5] = -1e3
    return weight


@pytest.mark.parametrize(
    "type_", [t for t in ONE_GROUP_SIZE if not isinstance(t, Integer) or t.bits in (2, 4, 8)], ids=str
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_the_librarys_decompressor_reads_our_tensors(type_: WeightType, dtype: torch.dtype) -> None:
    ours = quantize(plain().to(dtype), type_)
    peer = compressor(type_).decompress(ours.type.to_tensors(ours), peer_scheme(type_))["weight"]
    assert peer.dtype == (dtype if isinstance(type_, (Integer, Float8)) else BF16)
    assert torch.equal(peer, ours.dequantize().to(peer.dtype))


@pytest.mark.parametrize(
    "type_", [t for t in ONE_GROUP_SIZE if not isinstance(t, Integer) or t.bits in (2, 4, 8)], ids=str
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_we_read_what_the_librarys_compressor_writes(type_: WeightType, dtype: torch.dtype) -> None:
    tensors = compressor(type_).compress(rounded_by_peer(type_, plain(), dtype), peer_scheme(type_))
    peer = compressor(type_).decompress(tensors, peer_scheme(type_))["weight"]
    ours = type_.from_tensors(tensors)
    assert torch.equal(ours.dequantize().to(peer.dtype), peer)
    specs = type_.specs(N, K, dtype)
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    "type_", [t for t in ONE_GROUP_SIZE if isinstance(t, Integer) and t.bits in (3, 5, 6, 7)], ids=str
)
def test_padded_words_of_the_library_hold_the_same_codes(type_: Integer) -> None:
    """Version 0.17 pads these widths; unpadded and packed densely they are ours."""
    tensors = compressor(type_).compress(rounded_by_peer(type_, plain(), BF16), peer_scheme(type_))
    peer = compressor(type_).decompress(tensors, peer_scheme(type_))["weight"]
    tensors["weight_packed"] = pack(unpack_padded(tensors["weight_packed"], type_.bits, K), type_.bits)
    if not type_.symmetric:
        zero = unpack_padded(tensors["weight_zero_point"].T.contiguous(), type_.bits, N)
        tensors["weight_zero_point"] = pack(zero, type_.bits).T.contiguous()
    assert torch.equal(type_.from_tensors(tensors).dequantize().to(BF16), peer)


def test_ragged_blocks_equal_the_librarys() -> None:
    """By its `dequantize` with arguments; its decompressor guesses blocks from the shapes, wrongly for ragged ones."""
    type_, weight = Float8(strategy="block"), plain(200, 300)
    ours = quantize(weight, type_)
    assert torch.equal(ours.dequantize(), peer_dequantize(ours.codes, ours.scale, None, peer_args(type_)))
    assert torch.equal(ours.codes.float(), peer_quantize(weight, ours.scale, None, peer_args(type_)))


# --- (d) written by hand ---


def test_golden_int4() -> None:
    words = torch.tensor([[0x76543210, -1]], dtype=torch.int32)
    tensors = {"weight_packed": words, "weight_scale": torch.tensor([[-0.5]]), "weight_shape": torch.tensor([1, 16])}
    weight = Integer(bits=4, group_size=16).from_tensors(tensors).dequantize()
    assert weight.tolist() == [[4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, *[-3.5] * 8]]  # -0.5 * (code - 8)


def test_golden_int4_asymmetric() -> None:
    """Zero points of eight rows in one word, row 0 in the lowest bits, nothing subtracted."""
    type_ = Integer(bits=4, group_size=16, symmetric=False)
    weight = QuantizedWeight(
        type=type_,
        codes=torch.full((8, 16), 5, dtype=torch.uint8),
        scale=torch.full((8, 1), 2.0),
        zero_point=torch.arange(8, dtype=torch.uint8)[:, None],
    )
    assert type_.to_tensors(weight)["weight_zero_point"].tolist() == [[0x76543210]]
    assert weight.dequantize()[:, 0].tolist() == [10.0, 8.0, 6.0, 4.0, 2.0, 0.0, -2.0, -4.0]


@pytest.mark.parametrize("extreme", [-3.0, 3.0])
def test_the_larger_extreme_of_a_symmetric_group_is_exact_whatever_its_sign(extreme: float) -> None:
    weight = torch.linspace(-1, 1, 16)[None].clone()
    weight[0, 5] = extreme
    result = quantize(weight, Integer(bits=4, group_size=16))
    assert result.codes[0, 5] == 0
    assert result.dequantize()[0, 5] == pytest.approx(extreme, rel=1e-6)
    assert (result.scale[0, 0] < 0) == (extreme > 0)


def test_golden_fp8_tiles() -> None:
    """[130, 200] in blocks of 128 x 128, of which three are ragged; rows of scales go with rows."""
    codes = torch.ones(130, 200).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.tensor([[1.0, 2.0], [4.0, 8.0]])}
    weight = Float8(strategy="block").from_tensors(tensors).dequantize()
    assert weight[126:, 126:130].tolist() == [[1.0, 1.0, 2.0, 2.0]] * 2 + [[4.0, 4.0, 8.0, 8.0]] * 2
    assert weight[-1, -1] == 8
    rows = {"weight": codes, "weight_scale": torch.arange(130.0)[:, None]}
    assert Float8(strategy="channel").from_tensors(rows).dequantize()[:, 7].tolist() == list(range(130))


def test_golden_fp8_codes() -> None:
    weight = quantize(
        torch.tensor([[448.0, -448.0, 1.0, 1.0625, 0.0, 2.0**-10, -3 * 2.0**-10, 26.0]]), Float8(strategy="channel")
    )
    assert weight.scale.item() == 1
    assert weight.codes.view(torch.uint8).tolist() == [[0x7E, 0xFE, 0x38, 0x38, 0x00, 0x00, 0x82, 0x5D]]


def test_golden_nvfp4() -> None:
    """acting scale = E4M3 scale / global scale; the first of two codes in the low nibble."""
    weight = torch.cat(
        [torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]), torch.full((16,), 0.75)]
    )
    quantized = quantize(weight[None], NvFp4())
    tensors = NvFp4().to_tensors(quantized)
    assert tensors["weight_global_scale"].tolist() == [448.0]  # 448 * 6 / 6
    # 6 * 448 / 6 = 448 -> 0x7E; 0.75 * 448 / 6 = 56 -> 0x66, which acts as 0.125: 0.75 is 6 of them.
    assert tensors["weight_scale"].view(torch.uint8).tolist() == [[0x7E, 0x66]]
    assert tensors["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE, *[0x77] * 8]]
    assert torch.equal(quantized.dequantize()[0], weight)


def test_golden_mxfp4() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([4.0, 5.0, 7.9, -0.25])  # exponent 0: 2^2 is the largest power of two of E2M1
    weight[0, 32:34] = torch.tensor([2.0**-10, 3 * 2.0**-12])  # exponent -12
    quantized = quantize(weight, Mx(bits=4))
    tensors = Mx(bits=4).to_tensors(quantized)
    assert tensors["weight_scale"].tolist() == [[127, 127 - 12]]
    assert tensors["weight_packed"][0, :2].tolist() == [0x66, 0x07]  # 5 is a tie; 7.9 saturates; -0.25 a tie to 0
    assert tensors["weight_packed"][0, 16] == 0x56
    assert quantized.dequantize()[0, :4].tolist() == [4.0, 4.0, 6.0, 0.0]
    assert quantized.dequantize()[0, 32:34].tolist() == [2.0**-10, 3 * 2.0**-12]


def test_golden_mxfp8() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([1.0, -1.75, 1.99])  # 2^8 is the largest power of two of E4M3: exponent -8
    tensors = Mx(bits=8).to_tensors(quantize(weight, Mx(bits=8)))
    assert tensors["weight_scale"].tolist() == [[127 - 8]]
    assert tensors["weight"].view(torch.uint8)[0, :4].tolist() == [0x78, 0xFE, 0x7E, 0x00]  # 256, -448, saturated


@pytest.mark.parametrize("byte", range(255))
def test_e8m0_bytes(byte: int) -> None:
    type_ = Mx(bits=4)
    scale = type_.acting_scale(torch.tensor([[byte]], dtype=torch.uint8), None)
    assert scale.item() == 2.0 ** (byte - 127)
    if byte:  # 2^-127 is subnormal in float32; we write 2^-126 instead
        assert type_.stored_scale(scale, BF16, None).item() == byte


# --- auto-round's own fake-quantizers ---

MIN_SCALE_FP16 = torch.tensor(MIN_SCALE).half().float()
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden_autoround.json").read_text())


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_equal_auto_rounds(bits: int, symmetric: bool, clipped: bool) -> None:
    golden = GOLDEN[f"int{bits}_{'sym' if symmetric else 'asym'}{'_clipped' if clipped else ''}"]
    type_ = Integer(bits=bits, group_size=32, symmetric=symmetric)
    weight = golden_weight(3, 128)
    low, high = type_.bounds(weight)
    if clipped:
        low, high = low * CLIP_LOW, high * CLIP_HIGH
    scale, zero = type_.scale_and_zero_point(low, high, torch.float16, None)
    expected = torch.tensor(golden["scale"]).reshape(scale.shape)
    # The sign of a scale that underflows in float16 is lost there; it then stands for zeros alone.
    tiny = scale.abs() == MIN_SCALE_FP16
    assert torch.equal(torch.where(tiny, scale.abs(), scale), expected)
    assert tiny.flatten().tolist() == [index in (0, 2) for index in range(12)]
    scale = expected
    assert (type_.zero if zero is None else zero.int().flatten().tolist()) == golden["zero"]
    ours = round_with(type_, weight, scale, zero, torch.float16, None)
    assert ours.codes.flatten().tolist() == golden["code"]


@pytest.mark.parametrize("bits", [4, 8])
def test_mx_equals_auto_rounds(bits: Any) -> None:
    golden, type_ = GOLDEN[f"mxfp{bits}"], Mx(bits=bits)
    ours = quantize(golden_weight(3, 128), type_)
    exponents = (ours.scale.int() - 127).flatten().tolist()
    assert exponents[1:] == golden["exponent"][1:]  # the first group is all zeros: it takes 2^(1 - emax), we 2^-126
    assert type_.decode(ours.codes).flatten().tolist() == golden["value"]


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_shared"])
def test_nvfp4_equals_auto_rounds(name: str) -> None:
    golden, weight = GOLDEN[name], golden_weight(3, 128)
    divisor = torch.tensor([golden["global_scale"]])
    assert torch.equal(NvFp4().global_scale(weight.abs().amax() * (3 if "shared" in name else 1)), divisor)
    ours = quantize(weight, NvFp4(), divisor)
    scale = torch.tensor(golden["scale"])
    # It keeps scales of 0 and writes zeros with them; we keep the least E4M3 number.
    assert torch.equal(ours.scale.float().flatten(), scale.clamp(min=2.0**-9))
    peer = torch.tensor(golden["value"]).reshape(3, 128)
    nonzero = (scale > 0).reshape(3, -1).repeat_interleave(16, 1)
    assert torch.equal(NvFp4().decode(ours.codes)[nonzero], peer[nonzero])


def test_fp8_equals_auto_rounds() -> None:
    golden, type_ = GOLDEN["fp8_channel"], Float8(strategy="channel")
    ours = quantize(golden_weight(3, 128), type_)
    assert ours.scale.flatten().tolist() == golden["scale"]
    assert ours.codes.float().flatten().tolist() == golden["value"]


def test_fp8_blocks_equal_auto_rounds() -> None:
    golden, type_ = GOLDEN["fp8_block"], Float8(strategy="block")
    ours = quantize(golden_weight(130, 200), type_)
    assert ours.scale.flatten().tolist() == golden["scale"]
    assert ours.codes.float()[CORNER].flatten().tolist() == golden["value"]


# --- (e) properties ---


def same(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    pairs = [(getattr(left, name), getattr(right, name)) for name in ("codes", "scale", "zero_point", "global_scale")]
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a.float(), b.float()))  # float8 has no equal
        for a, b in pairs
    )


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_tensors_round_trip_and_are_what_specs_says(type_: WeightType) -> None:
    for dtype in DTYPES:
        weight = quantize(plain(40, 512).to(dtype), type_)
        tensors = type_.to_tensors(weight)
        assert same(type_.from_tensors(tensors), weight)
        assert type_.from_tensors(tensors).dequantize().equal(weight.dequantize())
        described = {name: (spec.shape, spec.dtype) for name, spec in type_.specs(40, 512, dtype).items()}
        assert described == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        assert all(tensor.is_contiguous() for tensor in tensors.values())  # safetensors wants it


def cut(
    tensors: dict[str, Tensor], specs: dict[str, TensorSpec], along: str, begin: int, end: int, whole: int
) -> dict[str, Tensor]:
    """Every tensor's part for the rows or columns [begin, end) of ``whole``, by what its spec says alone."""
    parts = {}
    for name, tensor in tensors.items():
        dim = getattr(specs[name], along)
        if dim is None:
            parts[name] = tensor
            continue
        length = tensor.shape[dim]
        first, last = begin * length, end * length
        assert first % whole == 0, name
        parts[name] = tensor.narrow(dim, first // whole, -(-last // whole) - first // whole)
    return parts


@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_cutting_for_tensor_parallelism_commutes_with_dequantizing(data: st.DataObject) -> None:
    type_ = data.draw(st.sampled_from(FEW))
    ranks = data.draw(st.sampled_from([2, 4]))
    rank = data.draw(st.integers(0, ranks - 1))
    along = data.draw(st.sampled_from(["input_dim", "output_dim"]))
    rows, columns = (128 if isinstance(type_, Float8) else 32) * ranks, 256 * ranks
    weight = quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rank)), type_)
    size = {"input_dim": columns, "output_dim": rows}[along]
    begin, end = rank * size // ranks, (rank + 1) * size // ranks
    parts = cut(type_.to_tensors(weight), type_.specs(rows, columns, torch.float32), along, begin, end, size)
    shape = (rows, end - begin) if along == "input_dim" else (end - begin, columns)
    if "weight_shape" in parts:
        parts["weight_shape"] = torch.tensor(shape)
    expected = weight.dequantize()[(slice(None), slice(begin, end)) if along == "input_dim" else slice(begin, end)]
    assert torch.equal(type_.from_tensors(parts).dequantize(), expected)
    specs = type_.specs(*shape, torch.float32)
    assert {name: spec.shape for name, spec in specs.items()} == {name: tuple(t.shape) for name, t in parts.items()}


def test_packed_dimensions_and_factors() -> None:
    for type_ in TYPES:
        for name, spec in type_.specs(64, 256, BF16).items():
            assert spec.scalar == (spec.input_dim is None and spec.output_dim is None)
            if spec.packed_dim is not None:
                values = {0: 64, 1: 256}[spec.packed_dim]
                assert spec.shape[spec.packed_dim] * spec.pack_factor == values, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("type_", FEW, ids=str)
def test_error_is_at_most_half_a_step_inside_the_range(type_: WeightType, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 256)
    result = round_to_grid(type_, weight, dtype)
    tile = type_.tile(32, 256)
    scale = type_.acting_scale(result.scale, result.global_scale)[:, None, :, None]
    zero = type_.zero if result.zero_point is None else result.zero_point.float()[:, None, :, None]
    x = tile.split(weight) / scale
    error = (tile.split(result.dequantize() - weight) / scale).abs()
    # float32 divides and multiplies with relative errors of 2^-24, of at most 448 steps.
    limit = torch.as_tensor(type_.spacing(x)) / 2 + x.abs() * 2.0**-22
    inside = type_.within(x, zero).bool()
    assert (error <= limit)[inside].all()
    assert inside.float().mean() > (0.9 if getattr(type_, "bits", 8) > 3 else 0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("type_", FEW, ids=str)
def test_degenerate_groups_stay_finite_and_zeros_stay_zeros(type_: WeightType, dtype: torch.dtype) -> None:
    weight = torch.zeros(6, 256)
    weight[1, 3] = 1e-30
    weight[2] = 1e-8
    weight[3, 0] = 1e4
    weight[4, ::16] = -6e4
    weight[5] = 1e-40
    for part in (weight, weight[:1], weight[5:], weight[:3]):
        result = quantize(part.to(dtype), type_)
        assert result.dequantize().isfinite().all()
        assert (result.dequantize()[part.to(dtype) == 0] == 0).all()
        assert type_.acting_scale(result.scale, result.global_scale).isfinite().all()
        assert (type_.acting_scale(result.scale, result.global_scale) != 0).all()


@pytest.mark.parametrize("type_", [t for t in INTEGERS if not t.symmetric and t.group_size in (32, None)], ids=str)
def test_zero_is_exact_and_zero_points_stay_in_range(type_: Integer) -> None:
    for sign in (-1, 1):  # all-negative groups put the zero point at the last code; bfloat16 must not push it past
        weight = sign * torch.rand(64, 256) * torch.logspace(-4, 2, 64)[:, None]
        weight[:, ::16] = 0
        result = round_to_grid(type_, weight, BF16)
        assert result.zero_point is not None
        assert result.zero_point.max() <= type_.max_code
        assert (result.dequantize()[:, ::16] == 0).all()


@pytest.mark.parametrize("type_", ONE_GROUP_SIZE, ids=str)
def test_one_outlier_costs_only_its_own_group(type_: WeightType) -> None:
    weight = torch.randn(256, 256)
    spoilt = weight.clone()
    spoilt[3, 40] = 400.0
    divisor = type_.global_scale(torch.tensor(400.0))
    before, after = (quantize(w, type_, divisor).dequantize() for w in (weight, spoilt))
    tile = type_.tile(256, 256)
    changed = tile.split(before - after).abs().amax((1, 3)) > 0
    assert changed.sum() == 1
    assert changed[3 // tile.rows, 40 // tile.columns]
    assert after[3, 40] == pytest.approx(400.0, rel=0.07)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    type_=st.sampled_from([t for t in INTEGERS if t.symmetric]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([BF16, torch.float16, torch.float32]),
)
def test_any_sign_of_a_scale_is_legal(type_: Integer, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, type_.max_code + 1, (6, 256), generator=generator, dtype=torch.uint8)
    scale = torch.randn(type_.tile(6, 256).tiles(6, 256), generator=generator).to(dtype)
    weight = QuantizedWeight(type=type_, codes=codes, scale=scale)
    back = type_.from_tensors(type_.to_tensors(weight))
    assert torch.equal(back.scale, scale)
    spread = scale.float().repeat_interleave(type_.tile(6, 256).columns, 1)
    assert torch.equal(back.dequantize(), spread * (codes.float() - type_.zero))


def test_float8_scales_come_in_several_shapes() -> None:
    codes = torch.ones(4, 8).to(torch.float8_e4m3fn)
    for scale in (torch.arange(4.0), torch.arange(4.0)[:, None]):
        weight = Float8(strategy="channel").from_tensors({"weight": codes, "weight_scale": scale})
        assert weight.dequantize()[:, 0].tolist() == [0, 1, 2, 3]
    for scale in (torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]])):
        weight = Float8(strategy="tensor").from_tensors({"weight": codes, "weight_scale": scale})
        assert weight.dequantize().unique().tolist() == [2.0]


def good_tensors(type_: WeightType) -> dict[str, Tensor]:
    return type_.to_tensors(quantize(torch.randn(64, 256), type_))


@pytest.mark.parametrize("type_", ONE_GROUP_SIZE, ids=str)
def test_a_missing_tensor_is_named(type_: WeightType) -> None:
    for name in good_tensors(type_):
        with pytest.raises(KeyError, match=name):
            type_.from_tensors({key: value for key, value in good_tensors(type_).items() if key != name})


@pytest.mark.parametrize("type_", ONE_GROUP_SIZE, ids=str)
def test_a_wrong_shape_is_refused(type_: WeightType) -> None:
    known_by = "weight_shape" if isinstance(type_, Integer) else "weight"  # what gives the layer's own shape
    for name, tensor in good_tensors(type_).items():
        if name in (known_by, f"{known_by}_packed"):
            continue
        for wrong in (tensor[:-1], torch.cat([tensor, tensor]), torch.cat([tensor, tensor], -1)):
            with pytest.raises(ValueError, match=f"{name} has shape"):
                type_.from_tensors({**good_tensors(type_), name: wrong})


@pytest.mark.parametrize("type_", ONE_GROUP_SIZE, ids=str)
def test_a_wrong_dtype_is_refused(type_: WeightType) -> None:
    for name, tensor in good_tensors(type_).items():
        if name in ("weight_shape", "weight_global_scale") or (
            name == "weight_scale" and isinstance(type_, (Integer, Float8))
        ):
            continue
        for dtype in {torch.int8, torch.int64, BF16} - {tensor.dtype}:
            with pytest.raises(ValueError, match=f"{name} has dtype {dtype}, expected {tensor.dtype}"):
                type_.from_tensors({**good_tensors(type_), name: tensor.to(dtype)})


@pytest.mark.parametrize("name", NAMED_SCHEMES)
def test_every_named_scheme_round_trips(name: str) -> None:
    type_ = QuantScheme.parse(name).weights
    weight = quantize(plain(64, 256).to(BF16), type_)
    assert same(type_.from_tensors(type_.to_tensors(weight)), weight)


def test_formats_are_the_librarys() -> None:
    for type_ in ONE_GROUP_SIZE:
        assert compressor(type_).can_compress(torch.nn.Linear, QuantizationScheme(
            targets=["Linear"], weights=peer_args(type_),
            input_activations=QuantizationArgs(num_bits=8, type="float", dynamic=True, strategy="token")
            if isinstance(type_, Float8) else None,
        ))  # fmt: skip
    assert E2M1.highest * E4M3.highest == 2688
