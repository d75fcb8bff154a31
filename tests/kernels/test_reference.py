"""The float32 reference against float64, and the identity probe."""

import pytest
import torch

from tests.numerics import bf16_budget, relative_error
from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Integer, quantize
from vllm_autoround.kernels.reference import quantized_linear

INTEGERS = [
    QuantScheme(Integer(bits=bits, group_size=group, symmetric=symmetric))
    for bits in range(2, 9)
    for group in (16, 128, None)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("scheme", [*INTEGERS, *NAMED_SCHEMES.values()], ids=str)
def test_matches_float64_within_the_bf16_budget(scheme: QuantScheme) -> None:
    weight = quantize(torch.randn(64, 256).bfloat16(), scheme.weights)
    x, bias = torch.randn(7, 256).bfloat16(), torch.randn(64).bfloat16()
    acting = scheme.activations
    scale = acting and acting.calibrated(x.abs().amax())
    out = quantized_linear(x, weight, scheme, scale, bias)
    values = x.float() if acting is None else acting.fake_quantize(x, scale)
    exact = values.double() @ weight.dequantize().double().T + bias.double()
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) <= bf16_budget(values, weight.dequantize(), bias, exact)


@pytest.mark.parametrize("scheme", [*INTEGERS, *NAMED_SCHEMES.values()], ids=str)
def test_identity_probe_returns_the_dequantized_weight(scheme: QuantScheme) -> None:
    weight = quantize(torch.randn(64, 256), scheme.weights)
    identity = quantized_linear(torch.eye(256), weight, QuantScheme(scheme.weights))
    assert torch.equal(identity.T, weight.dequantize())


@pytest.mark.parametrize("name", [name for name, scheme in NAMED_SCHEMES.items() if scheme.activations])
def test_activations_are_quantized(name: str) -> None:
    """Not a second statement of the formula: the error of rounding them is there, and of the expected size."""
    scheme = NAMED_SCHEMES[name]
    assert scheme.activations is not None
    weight, x = quantize(torch.randn(64, 256), scheme.weights), torch.randn(7, 256)
    scale = scheme.activations.calibrated(x.abs().amax())
    out = quantized_linear(x, weight, scheme, scale)
    error = relative_error(out, x.double() @ weight.dequantize().double().T)
    half_step = 2.0**-2 if "FP4" in name else 2.0**-4  # of E2M1 and E4M3, relative
    assert half_step / 10 < error < half_step


def test_a_static_scale_that_is_missing() -> None:
    scheme = NAMED_SCHEMES["FP8_STATIC"]
    weight = quantize(torch.randn(16, 32), scheme.weights)
    with pytest.raises(ValueError, match="needs input_scale"):
        quantized_linear(torch.randn(2, 32), weight, scheme)
