"""Single rows of a packed weight, against the whole weight dequantized."""

import pytest
import torch

from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, WeightType, quantize
from vllm_autoround.kernels.lookup import PackedRows

INTEGERS = [
    Integer(bits=bits, group_size=group, symmetric=symmetric)
    for bits in range(2, 9)
    for group in (16, 128, None)
    for symmetric in (True, False)
]
OTHERS = [
    Float8(strategy="channel"),
    Float8(strategy="tensor"),
    Float8(strategy="block"),
    NvFp4(),
    Mx(bits=4),
    Mx(bits=8),
]


@pytest.mark.parametrize("type_", [*INTEGERS, *OTHERS], ids=str)
def test_rows_equal_those_of_the_dequantized_weight(type_: WeightType) -> None:
    weight = quantize(torch.randn(300, 384), type_)
    ids = torch.tensor([[0, 299, 127], [128, 5, 5]])
    assert torch.equal(PackedRows(weight)(ids), weight.dequantize()[ids])
