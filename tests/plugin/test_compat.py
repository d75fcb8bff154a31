"""The probes of compat.py agree with what each vLLM release itself does."""

import functools
import inspect
from typing import Any

import pytest
from vllm.model_executor.kernels import linear as vllm_kernels
from vllm.model_executor.kernels.linear.mixed_precision import humming
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

from vllm_autoround.plugin import compat


def test_zero_points_of_other_widths_are_used_where_vllm_itself_allows_them() -> None:
    allowed = compressed_tensors_wNa16.WNA16_ZP_SUPPORTED_TYPES_MAP
    assert compat.humming_takes_zero_points() is (3 in allowed)


def test_the_layer_config_has_the_fields_of_this_release() -> None:
    config = compat.mp_linear_layer_config(
        full_weight_shape=(64, 64),
        partition_weight_shape=(64, 64),
        weight_type=compressed_tensors_wNa16.WNA16_SUPPORTED_TYPES_MAP[4],
        act_type=None,
        group_size=32,
        zero_points=False,
    )
    assert getattr(config, "has_g_idx", False) is False
    assert config.group_size == 32
    assert "group_size" in inspect.signature(type(config)).parameters


def test_fp8_activations_go_to_humming_where_its_code_looks_at_their_type() -> None:
    looks = "act_type" in inspect.getsource(humming.HummingLinearKernel)
    assert compat.humming_quantizes_activations() is looks


def spy(name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace a selector of vLLM's by one that checks the arguments and keeps them."""
    real = getattr(vllm_kernels, name)
    calls: list[dict[str, Any]] = []

    @functools.wraps(real)
    def selector(*args: Any, **kwargs: Any) -> None:
        calls.append(inspect.signature(real).bind(*args, **kwargs).arguments)

    monkeypatch.setattr(vllm_kernels, name, selector)
    return calls


def test_the_mx_selectors_get_the_arguments_of_this_release(monkeypatch: pytest.MonkeyPatch) -> None:
    mxfp4, mxfp8 = (spy(f"init_{name}_linear_kernel", monkeypatch) for name in ("mxfp4", "mxfp8"))
    compat.init_mxfp4_linear_kernel(use_a16=False)
    compat.init_mxfp8_linear_kernel(64, 32, use_a16=False)
    assert "None" not in str(mxfp4[0].get("activation_quant_key", "quantized"))
    assert mxfp8[0].get("weight_shape", (64, 32)) == (64, 32)


def test_activations_in_16_bits_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marlin, or a selector that is told; a selector that is not would quantize them where the device can."""
    for kernel in (vllm_kernels.MarlinMxFp4LinearKernel, vllm_kernels.MarlinMxfp8LinearKernel):
        monkeypatch.setattr(kernel, "is_supported", classmethod(lambda cls, capability=None: (True, None)))
    mxfp4, mxfp8 = (spy(f"init_{name}_linear_kernel", monkeypatch) for name in ("mxfp4", "mxfp8"))
    chosen = compat.init_mxfp4_linear_kernel(use_a16=True)
    if mxfp4:
        assert mxfp4[0] == {"activation_quant_key": None}
    else:
        assert isinstance(chosen, vllm_kernels.MarlinMxFp4LinearKernel)
    assert isinstance(compat.init_mxfp8_linear_kernel(64, 32, use_a16=True), vllm_kernels.MarlinMxfp8LinearKernel)
    assert not mxfp8
