"""FP8 scales of the KV cache, measured where the cache sees queries, keys and values: after RoPE."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from calibrate.chain import NonFiniteError

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_OBSERVER = "autoround_observer"


class AttentionRanges:
    """Largest magnitudes of q, k and v of each attention head, over everything it has seen."""

    def __init__(self) -> None:
        self._amax: dict[nn.Module, tuple[Tensor, ...]] = {}  # module -> q [heads], k and v [kv heads], float32
        self.real: Tensor | None = None  # [B, T] bool, the tokens of the next call that count; None: all

    def observe(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        """query [B, heads, T, D], key and value [B, kv heads, T, D]."""
        seen = tuple(self._counted(tensor).abs().amax((0, 2, 3)).float() for tensor in (query, key, value))
        self._amax[module] = tuple(map(torch.maximum, self._amax.get(module, seen), seen))

    def _counted(self, tensor: Tensor) -> Tensor:
        """[B, heads, T, D] with zeros where there is padding."""
        return tensor if self.real is None else torch.where(self.real[:, None, :, None], tensor, 0)

    def scales(self, block: nn.Module, block_name: str, *, per_head: bool) -> dict[str, Tensor]:
        """Tensors of the checkpoint: ``<attention>.{q,k,v}_scale``, float32 = amax / 448, rounded up.

        Each has shape [1], or [heads, 1, 1] with as many heads as q, k or v has.

        Raises:
            NonFiniteError: a range that is 0 or not finite.
            RuntimeError: the block's attention was not observed.
        """
        tensors: dict[str, Tensor] = {}
        for name, module in block.named_modules():
            if module not in self._amax:
                continue
            for letter, heads in zip("qkv", self._amax[module], strict=True):
                amax = heads.cpu() if per_head else heads.amax().cpu().reshape(1)
                if not ((amax > 0) & amax.isfinite()).all():
                    raise NonFiniteError(f"{name}: the largest {letter} is {amax.tolist()}; no FP8 scale covers that")
                scale = round_up_to_bfloat16(amax / FP8_MAX)
                tensors[f"{block_name}.{name}.{letter}_scale"] = scale[:, None, None] if per_head else scale
        if not tensors:
            raise RuntimeError(f"{block_name}: its attention does not call transformers' attention interface")
        return tensors


def round_up_to_bfloat16(values: Tensor) -> Tensor:
    """The least bfloat16 value not below each positive float32 value, as float32.

    Stock vLLM loads scales into parameters of the model's dtype. A value that survives that cast is the same scale in
    every engine, and rounding up means that the largest magnitude still fits.
    """
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


@contextmanager
def observed(block: nn.Module) -> Iterator[AttentionRanges]:
    """Measure every attention call of ``block`` inside the context; its results stay the same."""
    ranges = AttentionRanges()
    with_config: list[Any] = [module for module in block.modules() if hasattr(module, "config")]
    configs = {id(module.config): module.config for module in with_config}.values()
    originals = [config._attn_implementation for config in configs]

    def observe_and_attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Any:
        # OPT scales its queries itself and passes a scaling of 1; vLLM hands its attention unscaled queries.
        scaling = getattr(module, "scaling", None) or kw.get("scaling") or 1.0
        ranges.observe(module, query * (kw.get("scaling", scaling) / scaling), key, value)
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(originals[0], eager)
        return attend(module, query, key, value, *args, **kw)

    AttentionInterface.register(_OBSERVER, observe_and_attend)
    for config in configs:
        config._attn_implementation = _OBSERVER
    try:
        yield ranges
    finally:
        for config, original in zip(configs, originals, strict=True):
            config._attn_implementation = original
        del AttentionInterface._global_mapping[_OBSERVER]
