"""What a model does after its blocks, and the loss of the last block that it makes possible: KL on the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from calibrate.blocks import Block

_LOGITS = 1 << 26  # logits that exist at once


class ModelTail:
    """The model from the hidden states that leave its last block to the logits.

    Norm, head, a soft cap on the logits: all of it is the model's own code, in a copy without the blocks.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[Block], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._entry = _PassThrough()
        stand_ins: dict[int, object] = {id(block.module): self._entry for block in blocks}
        # Nothing is left that needs position embeddings, and making them may ask the device for the longest position.
        stand_ins |= {id(module): _NoPositions() for module in model.modules() if _makes_position_embeddings(module)}
        self.model = cast(PreTrainedModel, copy.deepcopy(model, stand_ins)).to(device=device, dtype=dtype).eval()
        self.model.requires_grad_(False)
        self._tokens = max(1, _LOGITS // model.config.get_text_config().vocab_size)

    def divergence(self, output: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
        """Mean over tokens of KL(original || quantized): hidden states [B, T, H] of both -> scalar float32.

        Args:
            real: [B, T] bool, the tokens that count; None: all.
        """
        counted = torch.ones(output.shape[:-1], device=output.device) if real is None else real.float()
        parts = list(zip(*map(self._slices, (output, target, counted[..., None])), strict=True))
        divergence: Callable[..., Tensor] = self._divergence
        if len(parts) > 1:  # only one part's logits are to exist, forward and backward
            divergence = partial(checkpoint, divergence, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([divergence(*part) for part in parts]).sum() / counted.sum()

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, T, H] -> [T, V] float32."""
        self._entry.hidden = hidden
        try:
            # The ids are never looked at: the first stand-in replaces what they were embedded to.
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            # Of four dimensions, it counts as made already: nothing makes one for blocks that are not there.
            mask = torch.zeros(1, 1, 1, 1, device=hidden.device)
            return cast(Tensor, self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits)[0].float()
        finally:
            self._entry.hidden = None

    def _slices(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden.flatten(0, 1)[None].split(self._tokens, dim=1)

    def _divergence(self, output: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        with torch.no_grad():
            expected = F.log_softmax(self.logits(target), dim=-1)
        found = F.log_softmax(self.logits(output), dim=-1)
        tokens = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
        return torch.where(counted[0, :, 0] > 0, tokens, 0.0).sum()


def _makes_position_embeddings(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


class _NoPositions(nn.Module):
    """Stands for a rotary embedding."""

    def forward(self, *args: object, **kwargs: object) -> None:
        return None


class _PassThrough(nn.Module):
    """Stands for every block, and returns the hidden states that are to leave the last one."""

    hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        assert self.hidden is not None
        return self.hidden
