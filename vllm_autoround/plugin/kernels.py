"""Which kernel multiplies with a weight: vLLM's own choice or ours on a GPU, the float32 reference elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight
from vllm_autoround.kernels.reference import quantized_linear

Weight = TypeVar("Weight", QuantizedWeight, Tensor)
logger = init_logger("vllm.plugins.autoround")  # below "vllm", whose handler shows INFO


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A weight [rows, columns] and the type of its activations."""

    prefix: str
    scheme: QuantScheme | None  # None: not quantized
    rows: int
    columns: int
    dtype: torch.dtype


class Part(torch.nn.Module):
    """The shards of a layer that one call multiplies with: their joint weight, under the names that its kernel uses.

    vLLM's kernels take it for a linear layer without bias, and read these attributes.
    """

    kernel: Kernel[Any]
    weight: Tensor
    words: Tensor
    affine: Tensor

    def __init__(self, problem: Problem, shards: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.shards = shards
        self.sizes = sizes  # output rows of each
        self.input_size = self.input_size_per_partition = problem.columns
        self.output_size = self.output_size_per_partition = problem.rows
        self.logical_widths = self.output_partition_sizes = [problem.rows]
        self.params_dtype = self.orig_dtype = problem.dtype
        self.has_bias = False
        self.register_parameter("bias", None)
        self.weight_block_size: list[int] | None = None
        self.processed_weight_dims = (1, 0)  # of `weight`: (K, N)
        self.input_scale: torch.nn.Parameter | None = None

    def set_tensor(self, name: str, tensor: Tensor) -> torch.nn.Parameter:
        """Register a tensor, as a parameter because that is what vLLM's kernels replace."""
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        if name in self.__dict__:
            delattr(self, name)
        self.register_parameter(name, parameter)
        return parameter


class Kernel(ABC, Generic[Weight]):
    """One way to multiply; `name` says which, for the log."""

    name: str

    @abstractmethod
    def prepare(self, part: Part, weight: Weight, input_scale: Tensor | None) -> None:
        """Put the weight into ``part``, in the kernel's own layout.

        Args:
            input_scale: [1] float32, the checkpoint's scalar of static activation types.
        """

    @abstractmethod
    def apply(self, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N] in the type of ``x``."""


class ReferenceKernel(Kernel[QuantizedWeight]):
    """float32 matmul over the dequantized weight, with the activations quantized as the scheme says: slow and exact."""

    name = "the float32 reference (slow; exact but for the order of sums)"

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme

    def prepare(self, part: Part, weight: QuantizedWeight, input_scale: Tensor | None) -> None:
        self.weight, self.input_scale = weight, input_scale

    def apply(self, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        return quantized_linear(x, self.weight, self.scheme, self.input_scale, bias)


class DenseKernel(Kernel[Tensor]):
    """Shards that are not quantized, beside others that are."""

    name = "a plain matmul"

    def prepare(self, part: Part, weight: Tensor, input_scale: Tensor | None) -> None:
        part.set_tensor("weight", weight)

    def apply(self, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, part.weight, bias)


class VllmKernel(Kernel[QuantizedWeight]):
    """A kernel of vLLM's, which gets no bias: some kernels permute the layer's own or ignore the one they are given."""

    def __init__(self, kernel: Any, note: str = "") -> None:
        self.kernel = kernel
        self.name = type(kernel).__name__ + (f", {note}" if note else "")

    def apply(self, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self.kernel.apply_weights(part, x, None)
        return out if bias is None else out + bias


def choose_kernel(problem: Problem) -> Kernel[Any]:
    """The kernel of this platform for a weight.

    Raises:
        ValueError: there is none; names the layer and a way out.
    """
    if problem.scheme is None:
        return DenseKernel()
    if not current_platform.is_cuda_alike():
        # vLLM's CPU kernels quantize bf16 activations to int8 by default and have no float32 path.
        return ReferenceKernel(problem.scheme)
    if problem.dtype == torch.float32:
        raise ValueError(f"{problem.prefix}: no kernel on a GPU takes float32 activations; use --dtype bfloat16")
    # Imported here because on other platforms vLLM's kernels need not be importable.
    from vllm_autoround.plugin import float8, fp4, integer  # noqa: PLC0415

    for family in (integer.choose, float8.choose, fp4.choose):
        try:
            if (kernel := family(problem)) is not None:
                return kernel
        except (ValueError, NotImplementedError) as error:  # what vLLM's selectors raise
            raise ValueError(f"{problem.prefix}: vLLM has no kernel for {problem.scheme}: {error}") from error
    raise ValueError(
        f"{problem.prefix}: no kernel on a GPU multiplies {problem.scheme}; calibrate the layer with another scheme"
    )


def announce(layer: torch.nn.Module, scheme: QuantScheme, kernel: Kernel[Any]) -> None:
    """Say once per kind of layer what was picked."""
    logger.info_once(f"{type(layer).__name__} of {scheme}: {kernel.name}")
