"""KV-cache scales in vLLM's own Attention layer, loaded and processed as vLLM's loader does it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import vllm.model_executor.utils as vllm_utils
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from vllm_autoround.format.manifest import KV_SCALES, KVCache
from vllm_autoround.plugin.config import AutoRoundConfig
from vllm_autoround.plugin.kv_cache import AutoRoundKVCacheMethod, PerHeadKVCacheMethod

from .conftest import TensorParallel
from .layers import config_of as config_of_layers

PREFIX = "model.layers.0.self_attn.attn"
# Each has more significant bits than bfloat16 or float16 hold.
EXACT = {"k_scale": 0.123456789, "v_scale": 1.0009765, "q_scale": 0.0031415926}


class PerHeadBackend(TritonAttentionBackend):
    """Stands for FlashAttention 3, which only a GPU has."""

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True


def config_of(kv_cache: KVCache | None) -> AutoRoundConfig:
    return config_of_layers({}, kv_cache)


def create(
    kv_cache: KVCache | None = "fp8",
    heads: int = 4,
    kv_heads: int = 2,
    backend: type[TritonAttentionBackend] = TritonAttentionBackend,
) -> Attention:
    """The layer of a bfloat16 model; with this backend it can be created without a GPU."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Attention(
            heads,
            64,
            0.125,
            num_kv_heads=kv_heads,
            quant_config=config_of(kv_cache),
            prefix=PREFIX,
            attn_backend=backend,
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
    config, layer = config_of("fp8"), create()
    for _ in range(2):
        assert isinstance(config.get_quant_method(layer, PREFIX), AutoRoundKVCacheMethod)


def test_without_a_kv_scheme_vllm_keeps_its_default() -> None:
    layer = create(None)
    assert config_of(None).get_quant_method(layer, PREFIX) is None
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


# --- scales per head ------------------------------------------------------------------------------------------------

PER_HEAD = {
    "k_scale": torch.tensor([0.5, 0.123456789]),
    "v_scale": torch.tensor([1.0009765, 3.0]),
    "q_scale": torch.tensor([0.1, 0.7, 0.0031415926, 0.2]),  # two for each key-value head
}


def load_heads(layer: Attention, **changed: torch.Tensor) -> None:
    for name, scale in {**PER_HEAD, **changed}.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, scale.reshape(-1, 1, 1))


def held(layer: Attention) -> dict[str, list[float]]:
    assert all(getattr(layer, f"_{name}").dtype is torch.float32 for name in KV_SCALES)
    return {name: getattr(layer, f"_{name}").tolist() for name in KV_SCALES}


def test_scales_per_head_arrive_exactly() -> None:
    layer = create("fp8_per_head", backend=PerHeadBackend)
    assert isinstance(layer.quant_method, PerHeadKVCacheMethod)
    assert layer.kv_cache_dtype == "fp8"
    load_heads(layer)
    process(layer)
    queries = torch.tensor([0.7, 0.2]).tolist()  # the largest of each group
    expected = {"k_scale": PER_HEAD["k_scale"].tolist(), "v_scale": PER_HEAD["v_scale"].tolist(), "q_scale": queries}
    assert held(layer) == expected
    assert layer._k_scale_float == max(expected["k_scale"])
    assert layer._k_scale_cpu.item() == max(expected["k_scale"])
    assert not set(dict(layer.named_parameters())) & set(KV_SCALES)
    process(layer)  # a second time is harmless
    assert held(layer) == expected


@pytest.mark.parametrize("rank", range(2))
def test_each_rank_has_the_scales_of_its_heads(rank: int, tensor_parallel: TensorParallel) -> None:
    with tensor_parallel(rank, 2):
        layer = create("fp8_per_head", heads=2, kv_heads=1, backend=PerHeadBackend)
        load_heads(layer)
        process(layer)
    assert held(layer) == {
        "k_scale": PER_HEAD["k_scale"][[rank]].tolist(),
        "v_scale": PER_HEAD["v_scale"][[rank]].tolist(),
        "q_scale": PER_HEAD["q_scale"][2 * rank : 2 * rank + 2].amax(0, keepdim=True).tolist(),
    }


@pytest.mark.parametrize("rank", range(4))
def test_ranks_that_share_a_key_value_head(rank: int, tensor_parallel: TensorParallel) -> None:
    with tensor_parallel(rank, 4):
        layer = create("fp8_per_head", heads=1, kv_heads=1, backend=PerHeadBackend)
        load_heads(layer)
        process(layer)
    assert held(layer) == {
        "k_scale": PER_HEAD["k_scale"][[rank // 2]].tolist(),
        "v_scale": PER_HEAD["v_scale"][[rank // 2]].tolist(),
        "q_scale": PER_HEAD["q_scale"][[rank]].tolist(),
    }


@pytest.mark.parametrize("missing", KV_SCALES)
def test_missing_scales_per_head_are_named(missing: str) -> None:
    layer = create("fp8_per_head", backend=PerHeadBackend)
    for name in set(KV_SCALES) - {missing}:
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, PER_HEAD[name].reshape(-1, 1, 1))
    with pytest.raises(ValueError, match=rf"^{PREFIX}: .* no usable {missing}; .* --kv-cache fp8_per_head$"):
        process(layer)


@pytest.mark.parametrize("name", KV_SCALES)
def test_one_unusable_scale_among_the_heads_is_named(name: str) -> None:
    layer = create("fp8_per_head", backend=PerHeadBackend)
    load_heads(layer, **{name: torch.tensor([0.5] * (len(PER_HEAD[name]) - 2) + [float("inf"), 0.5])})
    with pytest.raises(ValueError, match=rf"^{PREFIX}: .* no usable {name}; "):
        process(layer)


@pytest.mark.parametrize(("name", "heads"), [("k_scale", 1), ("k_scale", 4), ("v_scale", 3), ("q_scale", 2)])
def test_scales_of_another_number_of_heads_do_not_load(name: str, heads: int) -> None:
    layer = create("fp8_per_head", backend=PerHeadBackend)
    expected = len(PER_HEAD[name])
    with pytest.raises(ValueError, match=rf"^{PREFIX}: {name} is for {heads} heads, expected {expected}; "):
        load_heads(layer, **{name: torch.ones(heads)})


def test_backends_without_scales_per_head_are_named() -> None:
    with pytest.raises(ValueError, match=rf"^{PREFIX}: the attention backend TRITON_ATTN has no .* --kv-cache fp8$"):
        create("fp8_per_head")


def test_scales_per_head_leave_another_cache_alone() -> None:
    """Who asks for a 16-bit cache gets one."""
    layer = create("fp8_per_head", backend=PerHeadBackend)
    layer.kv_cache_dtype = "auto"
    load_heads(layer)
    process(layer)
    assert used_scales(layer) == dict.fromkeys(KV_SCALES, (1.0, 1.0))


@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_per_head"])
def test_other_tools_store_no_scale_of_queries(kv_cache: KVCache) -> None:
    """Then it is 1.0, as in vLLM; the others arrive."""
    config = config_of(kv_cache)
    assert config.manifest is not None
    config.manifest = replace(config.manifest, kv_scales=("k_scale", "v_scale"))
    layer = create(kv_cache, backend=PerHeadBackend)
    layer.quant_method = config.get_quant_method(layer, PREFIX)
    scales = PER_HEAD if kv_cache == "fp8_per_head" else {name: torch.tensor([0.5]) for name in KV_SCALES}
    for name in ("k_scale", "v_scale"):
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, scales[name])
    layer.quant_method.process_weights_after_loading(layer)
    assert layer._k_scale.flatten().tolist() == scales["k_scale"].tolist()
    assert set(layer._q_scale.flatten().tolist()) == {1.0}
