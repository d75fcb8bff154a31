"""The probes of compat.py agree with what each vLLM release itself does."""

import inspect

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
