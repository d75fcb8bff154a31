"""LinearMethod of integer weights: wNa16 in column-, row-parallel, merged and QKV layers, and in lm_head."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import choose_mp_linear_kernel
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.scalar_type import ScalarType

from vllm_autoround.format.packing import words_per_row
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.kernels.reference import quantized_linear
from vllm_autoround.plugin import compat

logger = init_logger("vllm.plugins.autoround")


class LinearKernel(Protocol):
    """What vLLM's MPLinearKernel and our reference have in common."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...
    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class ReferenceKernel:
    """float32 matmul over the dequantized weight: slow, exact, and it leaves the activations alone."""

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing to repack: the kernel reads the layout of the checkpoint."""

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        zero_point = None if self.scheme.symmetric else layer.weight_zero_point
        return quantized_linear(x, layer.weight_packed, layer.weight_scale, zero_point, self.scheme, bias)


@register_weight_loader_v2_supported_method
class AutoRoundLinearMethod(LinearMethodBase):
    """Integer weights in the pack-quantized layout (`format.codec.QuantizedWeight.tensors`)."""

    def __init__(self, scheme: QuantScheme, prefix: str) -> None:
        self.scheme = scheme
        self.prefix = prefix
        self.kernel: LinearKernel

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters of this rank's part [N, K] of the weight and pick the kernel.

        Raises:
            ValueError: tensor parallelism cuts through a group or a packed word.
        """
        scheme, columns, rows = self.scheme, input_size_per_partition, sum(output_partition_sizes)
        row_parallel = input_size != input_size_per_partition
        # Rows at whose ends a loader cuts zero points; lm_head's are its vocabulary, not the padded size given here.
        cut_rows = output_partition_sizes if len(output_partition_sizes) > 1 or rows != output_size else []
        if isinstance(layer, ParallelLMHead):
            cut_rows = [layer.org_vocab_size]
        self._check_partition(columns, cut_rows, input_size, row_parallel)

        # The kernels of vLLM read these attributes of the layer.
        layer.input_size_per_partition = columns
        layer.output_size_per_partition = rows
        layer.output_partition_sizes = output_partition_sizes
        layer.params_dtype = params_dtype

        loader = extra_weight_attrs["weight_loader"]
        factor = Fraction(32, scheme.bits)
        # A row-parallel layer splits groups over the ranks, but a scale per channel is needed on every rank.
        replicated = scheme.group_size is None
        groups = scheme.groups(columns)
        packed = torch.empty(rows, words_per_row(columns, scheme.bits), dtype=torch.int32)
        layer.register_parameter(
            "weight_packed",
            PackedvLLMParameter(
                data=packed, input_dim=1, output_dim=0, packed_dim=1, packed_factor=factor, weight_loader=loader
            ),
        )
        scale = torch.empty(rows, groups, dtype=params_dtype)
        layer.register_parameter(
            "weight_scale",
            ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=loader)
            if replicated
            else GroupQuantScaleParameter(data=scale, input_dim=1, output_dim=0, weight_loader=loader),
        )
        layer.register_parameter(
            "weight_shape", BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=loader)
        )
        if not scheme.symmetric:
            zeros = torch.zeros(words_per_row(rows, scheme.bits), groups, dtype=torch.int32)
            layer.register_parameter(
                "weight_zero_point",
                PackedColumnParameter(
                    data=zeros, output_dim=0, packed_dim=0, packed_factor=factor, weight_loader=loader
                )
                if replicated
                else PackedvLLMParameter(
                    data=zeros, input_dim=1, output_dim=0, packed_dim=0, packed_factor=factor, weight_loader=loader
                ),
            )
        self.kernel = self._choose_kernel(layer, (input_size, output_size), (columns, rows), params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of x."""
        return self.kernel.apply_weights(layer, x, bias)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """vLLM ties lm_head to the embedding and skips its tensors: a quantized head would stay uninitialized."""
        raise ValueError(
            f"{self.prefix}: quantized, but config.json ties it to the embedding, so it would never be loaded; "
            "set tie_word_embeddings to false"
        )

    def _check_partition(self, columns: int, cut_rows: list[int], input_size: int, row_parallel: bool) -> None:
        scheme = self.scheme
        if row_parallel and columns % (scheme.group_size or 1):
            raise ValueError(
                f"{self.prefix}: tensor parallelism leaves {columns} of {input_size} input features to a rank, which "
                f"cuts through a group of {scheme.group_size}; use fewer ranks or calibrate with a smaller group size"
            )
        if row_parallel and columns * scheme.bits % 32:
            raise ValueError(
                f"{self.prefix}: tensor parallelism leaves {columns} input features of {scheme.bits} bits to a rank, "
                "which is not a whole number of 32-bit words; use fewer ranks"
            )
        if not scheme.symmetric and (uneven := [part for part in cut_rows if part * scheme.bits % 32]):
            raise ValueError(
                f"{self.prefix}: {uneven[0]} output rows with zero points of {scheme.bits} bits are not a whole "
                "number of 32-bit words; use fewer ranks or a symmetric scheme"
            )

    def _choose_kernel(
        self,
        layer: torch.nn.Module,
        full_shape: tuple[int, int],
        partition_shape: tuple[int, int],
        params_dtype: torch.dtype,
    ) -> LinearKernel:
        """vLLM's own choice on a GPU, the reference elsewhere; shapes are (K, N).

        Raises:
            ValueError: the kernel that this vLLM selects is not to be trusted with the scheme.
        """
        scheme = self.scheme
        if not current_platform.is_cuda_alike():
            # vLLM's CPU kernel quantizes bf16 activations to int8 by default and has no float32 path.
            self._announce(layer, "the float32 reference (exact and slow; activations are not quantized)")
            return ReferenceKernel(scheme)
        config = compat.mp_linear_layer_config(
            full_weight_shape=full_shape,
            partition_weight_shape=partition_shape,
            weight_type=ScalarType.uint(scheme.bits, scheme.zero_code if scheme.symmetric else None),
            act_type=params_dtype,
            group_size=scheme.group_size or -1,
            zero_points=not scheme.symmetric,
        )
        kernel = choose_mp_linear_kernel(config)
        if not scheme.symmetric and "Humming" in kernel.__name__ and not compat.humming_takes_zero_points():
            raise ValueError(
                f"{self.prefix}: for {scheme} this vLLM selects Humming, whose results deviate from the weights "
                "where there are zero points; use vLLM 0.33 or a symmetric scheme"
            )
        self._announce(layer, f"{kernel.__name__}, vLLM's choice for this shape and device")
        return kernel(
            config,
            w_q_param_name="weight_packed",
            w_s_param_name="weight_scale",
            w_zp_param_name="weight_zero_point",
        )

    def _announce(self, layer: torch.nn.Module, kernel: str) -> None:
        logger.info_once(f"{type(layer).__name__} of {self.scheme}: {kernel}")
