"""The float32 reference against float64, and the identity probe."""

import pytest
import torch

from tests.numerics import bf16_budget, relative_error
from vllm_autoround.format.codec import QuantizedWeight
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.kernels.reference import quantized_linear


def random_weight(scheme: QuantScheme, rows: int, columns: int) -> QuantizedWeight:
    """Random codes and scales of both signs."""
    groups = scheme.groups(columns)
    zero = torch.full((rows, groups), scheme.zero_code) if scheme.symmetric else None
    return QuantizedWeight(
        scheme,
        codes=torch.randint(0, scheme.max_code + 1, (rows, columns), dtype=torch.uint8),
        scale=((torch.rand(rows, groups) + 0.5) * torch.randn(rows, groups).sign() * 0.02).bfloat16(),
        zero_point=(torch.randint(0, scheme.max_code + 1, (rows, groups)) if zero is None else zero).to(torch.uint8),
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 128, None])
def test_matches_float64_within_the_bf16_budget(bits: int, symmetric: bool, group_size: int | None) -> None:
    scheme = QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = random_weight(scheme, rows=64, columns=256)
    tensors = weight.tensors()
    x, bias = torch.randn(7, 256).bfloat16(), torch.randn(64).bfloat16()
    arguments = (tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point"), scheme, bias)
    out = quantized_linear(x, *arguments)
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) <= bf16_budget(x, weight.dequantize(), bias, exact)
    identity = quantized_linear(torch.eye(256), *arguments[:4])
    assert torch.equal(identity.T, weight.dequantize())
