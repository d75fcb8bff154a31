"""KV-cache scales in vLLM's own Attention layer, loaded and processed as vLLM's loader does it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vllm.model_executor.utils as vllm_utils
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from vllm_autoround.format.manifest import KV_SCALES, Manifest
from vllm_autoround.plugin.config import AutoRoundConfig
from vllm_autoround.plugin.kv_cache import AutoRoundKVCacheMethod

PREFIX = "model.layers.0.self_attn.attn"
# Each has more significant bits than bfloat16 or float16 hold.
EXACT = {"k_scale": 0.123456789, "v_scale": 1.0009765, "q_scale": 0.0031415926}


def config_of(kv_cache: bool) -> AutoRoundConfig:
    return AutoRoundConfig(Manifest(schemes={}, kv_cache="fp8" if kv_cache else None))


def create(kv_cache: bool = True) -> Attention:
    """The layer of a bfloat16 model; with this backend it can be created without a GPU."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Attention(
            4,
            64,
            0.125,
            num_kv_heads=2,
            quant_config=config_of(kv_cache),
            prefix=PREFIX,
            attn_backend=TritonAttentionBackend,
        )
    finally:
        torch.set_default_dtype(torch.float32)


def load(layer: Attention, scales: dict[str, float], shape: tuple[int, ...] = (1,)) -> None:
    for name, scale in scales.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, torch.full(shape, scale, dtype=torch.float32))


def process(layer: Attention) -> None:
    """What vLLM's loader does with a whole model: the methods first, then each Attention, which asks for its method."""
    model = torch.nn.Module()
    model.attention = layer
    settings = SimpleNamespace(
        dtype=torch.bfloat16, quantization="autoround", word_embeddings_untied_by_checkpoint=False
    )
    process_weights_after_loading(model, settings, torch.device("cpu"))


def used_scales(layer: Attention) -> dict[str, tuple[float, float]]:
    """What the kernels read: the tensor and the number, of each scale."""
    return {
        "k_scale": (layer._k_scale.item(), layer._k_scale_float),
        "v_scale": (layer._v_scale.item(), layer._v_scale_float),
        "q_scale": (layer._q_scale.item(), layer._q_scale_float),
    }


def expected_scales() -> dict[str, tuple[float, float]]:
    in_float32 = {name: torch.tensor(scale, dtype=torch.float32).item() for name, scale in EXACT.items()}
    return {name: (scale, scale) for name, scale in in_float32.items()}


def test_the_scales_of_this_module_need_float32() -> None:
    for scale in EXACT.values():
        exact = torch.tensor(scale, dtype=torch.float32)
        assert exact != exact.bfloat16()
        assert exact != exact.half()


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_scales_arrive_exactly(shape: tuple[int, ...]) -> None:
    layer = create()
    assert isinstance(layer.quant_method, AutoRoundKVCacheMethod)
    assert layer.kv_cache_dtype == "fp8"  # from "auto"
    load(layer, EXACT, shape)
    process(layer)
    assert used_scales(layer) == expected_scales()
    for buffer in (layer._k_scale, layer._v_scale, layer._q_scale):
        assert buffer.dtype is torch.float32
    assert not set(dict(layer.named_parameters())) & {*KV_SCALES, "prob_scale"}


@pytest.mark.parametrize("missing", [("q_scale",), ("k_scale",), ("v_scale",), ("k_scale", "q_scale"), KV_SCALES])
def test_missing_scales_are_named(missing: tuple[str, ...]) -> None:
    layer = create()
    load(layer, {name: scale for name, scale in EXACT.items() if name not in missing})
    with pytest.raises(
        ValueError,
        match=rf"^{PREFIX}: the checkpoint promises an FP8 KV cache but has no usable {', '.join(missing)}; "
        "calibrate it again with --kv-cache fp8$",
    ):
        process(layer)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", KV_SCALES)
def test_unusable_scales_are_named(name: str, value: float) -> None:
    layer = create()
    load(layer, EXACT | {name: value})
    with pytest.raises(ValueError, match=f"^{PREFIX}: .* has no usable {name}; "):
        process(layer)


def test_more_than_one_scale_is_refused() -> None:
    """vLLM's scalar parameter does it; scales per head must not be cut down to the first one."""
    with pytest.raises(ValueError, match="expects a scalar weight"):
        load(create(), EXACT, shape=(2, 1, 1))


def test_processing_twice_is_harmless() -> None:
    layer = create()
    load(layer, EXACT)
    process(layer)
    layer.quant_method.process_weights_after_loading(layer)
    process(layer)
    assert used_scales(layer) == expected_scales()


def test_both_calls_return_a_method() -> None:
    """vLLM asks at creation and after loading; an answer of None the second time resets the scales to 1.0."""
    config, layer = config_of(kv_cache=True), create()
    for _ in range(2):
        assert isinstance(config.get_quant_method(layer, PREFIX), AutoRoundKVCacheMethod)


def test_without_a_kv_scheme_vllm_keeps_its_default() -> None:
    layer = create(kv_cache=False)
    assert config_of(kv_cache=False).get_quant_method(layer, PREFIX) is None
    assert layer.kv_cache_dtype == "auto"
    assert not hasattr(layer, "k_scale")
    process(layer)
    assert used_scales(layer) == dict.fromkeys(KV_SCALES, (1.0, 1.0))


@pytest.mark.skipif(not hasattr(vllm_utils, "weights_already_processed"), reason="vLLM before 0.30 has no such mode")
def test_scales_of_an_earlier_engine_are_kept() -> None:
    """Its weights are exported after processing: the buffers hold the scales and the parameters were never loaded."""
    layer = create()
    for name, scale in EXACT.items():
        getattr(layer, f"_{name}").fill_(scale)
    with vllm_utils.weights_already_processed():
        process(layer)
    assert used_scales(layer) == expected_scales()
