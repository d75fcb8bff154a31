"""What a checkpoint means."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as peer_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as peer_quantize

from vllm_autoround.format.codec import QuantizedWeight, dequantize, group_bounds, quantize, scale_and_zero_point
from vllm_autoround.format.errors import SchemeError
from vllm_autoround.format.scheme import QuantScheme

SCHEMES = [
    QuantScheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits in range(2, 9)
    for group in (16, 128, None)
    for symmetric in (True, False)
]


def quantized(weight: torch.Tensor, scheme: QuantScheme, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    """Round to nearest over the full range."""
    scale, zero = scale_and_zero_point(*group_bounds(weight, scheme), scheme, dtype)
    return QuantizedWeight(scheme, quantize(weight, scale, zero, scheme), scale.to(dtype), zero.to(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_tensors_round_trip(scheme: QuantScheme) -> None:
    weight = quantized(torch.randn(96, 256), scheme)
    back = QuantizedWeight.from_tensors(weight.tensors(), scheme)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.zero_point, weight.zero_point)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert ("weight_zero_point" in weight.tensors()) is not scheme.symmetric


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nearest_error_is_at_most_half_a_scale_inside_the_range(scheme: QuantScheme) -> None:
    weight = torch.randn(32, 256)
    result = quantized(weight, scheme, torch.float32)
    error = (result.dequantize() - weight).abs().unflatten(1, (-1, scheme.group_length(256)))
    codes = result.codes.unflatten(1, (-1, scheme.group_length(256)))
    inside = (codes > 0) & (codes < scheme.max_code)  # the end codes also take what is clipped
    # 1e-5 relative: float32 division and multiplication round a few units of 2^-24.
    limit = 0.5 * (1 + 1e-5) * result.scale.abs()[..., None].expand_as(error)
    assert (error[inside] <= limit[inside]).all()


@pytest.mark.parametrize("extreme", [-3.0, 3.0])
def test_the_larger_extreme_of_a_symmetric_group_is_exact_whatever_its_sign(extreme: float) -> None:
    scheme = QuantScheme(bits=4, group_size=16)
    weight = torch.linspace(-1, 1, 16)[None].clone()
    weight[0, 5] = extreme
    result = quantized(weight, scheme, torch.float32)
    assert result.codes[0, 5] == 0
    assert result.dequantize()[0, 5] == pytest.approx(extreme, rel=1e-6)
    assert (result.scale[0, 0] < 0) == (extreme > 0)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.symmetric], ids=str)
def test_zero_is_exact_and_zero_points_stay_in_range(scheme: QuantScheme) -> None:
    for sign in (-1, 1):  # all-negative groups put the zero point at the last code; bfloat16 must not push it past
        weight = sign * torch.rand(64, 256) * torch.logspace(-4, 2, 64)[:, None]
        weight[:, ::16] = 0
        result = quantized(weight, scheme)
        assert result.zero_point.max() <= scheme.max_code
        assert (result.dequantize()[:, ::16] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_degenerate_groups_are_finite(scheme: QuantScheme) -> None:
    weight = torch.zeros(4, 256)
    weight[1, 3] = 1e-30
    weight[2] = 1e-8
    weight[3, 0] = 1e4
    result = quantized(weight, scheme).dequantize()
    assert result.isfinite().all()
    assert (result[0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_and_dequantize_agree_with_compressed_tensors(bits: int, symmetric: bool) -> None:
    scheme = QuantScheme(bits=bits, group_size=32, symmetric=symmetric)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    weight = torch.randn(16, 128)
    scale = torch.rand(16, 4) * 0.1 + 0.05
    zero = torch.full((16, 4), float(scheme.zero_code)) if symmetric else torch.randint(0, 1 << bits, (16, 4)).float()
    # compressed-tensors codes are signed: shifted by 2^(bits-1), zero points too.
    peer_zero = zero - scheme.zero_code
    peer_codes = peer_quantize(weight, scale, peer_zero, args)
    codes = quantize(weight, scale, zero, scheme)
    assert torch.equal(codes.float() - scheme.zero_code, peer_codes)
    peer = peer_dequantize(peer_codes, scale, peer_zero, args)
    assert torch.equal(dequantize(codes, scale, zero.to(torch.uint8), scheme), peer)


def test_zero_points_are_packed_along_the_rows() -> None:
    scheme = QuantScheme(bits=4, group_size=16, symmetric=False)
    weight = QuantizedWeight(
        scheme,
        codes=torch.zeros(8, 16, dtype=torch.uint8),
        scale=torch.ones(8, 1),
        zero_point=torch.arange(8, dtype=torch.uint8)[:, None],
    )
    assert weight.tensors()["weight_zero_point"].tolist() == [[0x76543210]]  # row 0 in the lowest bits, no minus one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1, "group_size": 128}, "weight bits must be 2 to 8, got 1"),
        ({"bits": 4, "group_size": 100}, "group size must be one of 16, 32, 64, 128, 256 or -1"),
    ],
)
def test_bad_schemes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        QuantScheme(**arguments)


def test_parse_and_shape_check() -> None:
    assert QuantScheme.parse("w3a16_asym", -1) == QuantScheme(bits=3, group_size=None, symmetric=False)
    with pytest.raises(SchemeError, match="unknown scheme 'W4A8'"):
        QuantScheme.parse("W4A8", 128)
    with pytest.raises(SchemeError, match=r"mlp: in_features 704 is not a multiple of the group size 128; use a group"):
        QuantScheme.parse("W4A16", 128).check_layer("mlp", 704)
