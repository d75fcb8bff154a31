"""Weight types, one file each: what the weights of a layer are on disk and what they stand for."""

from vllm_autoround.format.weights.base import (
    Bounds,
    QuantizedWeight,
    TensorSpec,
    Tile,
    WeightType,
    quantize,
    store,
)
from vllm_autoround.format.weights.float8 import Float8
from vllm_autoround.format.weights.integer import Integer
from vllm_autoround.format.weights.mx import Mx
from vllm_autoround.format.weights.nvfp4 import NvFp4

__all__ = [
    "Bounds",
    "Float8",
    "Integer",
    "Mx",
    "NvFp4",
    "QuantizedWeight",
    "TensorSpec",
    "Tile",
    "WeightType",
    "quantize",
    "store",
]
