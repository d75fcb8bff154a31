"""Layouts: the tensors in which a dialect keeps one quantized layer. Each is read into, and written from, the same
`QuantizedWeight`, so that what a checkpoint means does not depend on its dialect.

N output rows, K input features, G groups along K (1 where a scale covers a whole row), b bits a code; words are int32.
Packed codes are dense (`vllm_autoround.format.packing`) but for one layout.

    layout              weight                        scales                       zero points
    compressed-tensors  weight_packed [N, K*b/32]     weight_scale [N, G]          weight_zero_point [N*b/32, G]
                        and the float types' own
    padded              weight_packed [N, K/(32//b)]  weight_scale [N, G]          weight_zero_point [N/(32//b), G]
    int-quantized       weight [N, K] int8            weight_scale [N, G]          weight_zero_point [N, G] int8
    gptq                qweight [K*b/32, N]           scales [G, N]                qzeros [G, N*b/32], minus one
    gptq_v2             qweight [K*b/32, N]           scales [G, N]                qzeros [G, N*b/32]
    awq                 qweight [K, N*b/32]           scales [G, N]                qzeros [G, N*b/32], in AWQ's order
    fp8_static          weight [N, K] float8          weight_scale [N] or [1]
    fp8_block           weight [N, K] float8          weight_scale_inv [N/128, K/128]: a factor, despite its name

``gptq+g_idx`` and ``gptq_v2+g_idx`` have g_idx [K] too, which must be trivial: feature // group size.
"""

from vllm_autoround.format.layouts.base import LayerShapes, Layout
from vllm_autoround.format.layouts.compressed_tensors import CompressedTensors, IntQuantized
from vllm_autoround.format.layouts.float8 import Fp8
from vllm_autoround.format.layouts.gptq import Awq, Gptq

COMPRESSED_TENSORS = "compressed-tensors"
LAYOUTS: dict[str, Layout] = {
    COMPRESSED_TENSORS: CompressedTensors(),
    "padded": CompressedTensors(padded=True),
    "int-quantized": IntQuantized(),
    "gptq": Gptq(minus_one=True),
    "gptq+g_idx": Gptq(minus_one=True, g_idx=True),
    "gptq_v2": Gptq(minus_one=False),
    "gptq_v2+g_idx": Gptq(minus_one=False, g_idx=True),
    "awq": Awq(),
    "fp8_static": Fp8(),
    "fp8_block": Fp8(scale="weight_scale_inv"),
}

__all__ = ["COMPRESSED_TENSORS", "LAYOUTS", "LayerShapes", "Layout"]
