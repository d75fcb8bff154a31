"""Kernels go to the kind that their names say."""

from __future__ import annotations

import pytest

from benchmarks.profiling import _kind


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_cga1x1x1", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("_step", "update"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused__unsafe_view_mul_silu_4", "all else"),
    ],
)
def test_kinds(kernel: str, kind: str) -> None:
    assert _kind(kernel) == kind
