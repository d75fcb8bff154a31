"""The decoder blocks of a causal LM, found by structure, and what goes into them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from calibrate.config import CalibrationError

_PART_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block of the model as loaded (on the CPU, never modified)."""

    name: str  # as in the checkpoint, e.g. model.layers.0
    module: nn.Module

    def linears(self) -> dict[str, nn.Linear]:
        """Linear layers by name relative to the block."""
        return {name: layer for name, layer in self.module.named_modules() if isinstance(layer, nn.Linear)}

    def unowned_matrices(self) -> list[str]:
        """Full names of parameters of two or more dimensions that no linear layer owns."""
        owned = {id(layer.weight) for layer in self.linears().values()}
        return [
            f"{self.name}.{name}" for name, p in self.module.named_parameters() if p.ndim >= 2 and id(p) not in owned
        ]


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The ModuleList with one entry per hidden layer that holds the most parameters.

    Raises:
        CalibrationError: there is none.
    """
    layers = model.config.get_text_config().num_hidden_layers
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    }
    if not stacks:
        raise CalibrationError(f"{type(model).__name__} has no ModuleList of {layers} decoder blocks")
    name = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    return [Block(f"{name}.{index}", module) for index, module in enumerate(stacks[name])]


class BlockInputs(NamedTuple):
    """What the model hands to its blocks."""

    hidden: Tensor  # [S, T, H]: samples, tokens, features; input of the first block
    arguments: list[dict[str, Any]]  # of each block: what its forward takes beside the hidden states, for any sample


@torch.no_grad()
def capture_inputs(model: PreTrainedModel, blocks: list[Block], samples: Tensor, dtype: torch.dtype) -> BlockInputs:
    """Run embeddings, masks and position embeddings, but no block.

    Args:
        samples: [S, T] token ids; padding, if any, comes last.
        dtype: what hidden states, masks and position embeddings are converted to; the embedding runs in its own.

    Raises:
        CalibrationError: a block takes arguments that depend on the sample, or the model does something to the hidden
            states between blocks.
    """
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []
    embed = model.get_input_embeddings()
    for sample in samples:
        calls = _record_calls(model, blocks, embed(sample[None]))
        entering = calls[0][0]
        if any(states is not entering for states, _ in calls):
            raise CalibrationError(f"{type(model).__name__} changes hidden states between its blocks; not supported")
        hidden.append(entering.to(dtype))
        if not arguments:
            arguments = [kwargs for _, kwargs in calls]
        for block, first, (_, kwargs) in zip(blocks, arguments, calls, strict=True):
            if not _same(first, kwargs):
                raise CalibrationError(f"{block.name} takes arguments that differ between samples; not supported")
    return BlockInputs(torch.cat(hidden), pytree.tree_map_only(Tensor, lambda t: _in_dtype(t, dtype), arguments))


def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """hidden [B, T, H] -> [B, T, H]."""
    out = block(hidden, **arguments)
    if not isinstance(out, Tensor):
        raise TypeError(f"{type(block).__name__} returns {type(out).__name__}, expected one tensor of hidden states")
    return out


def token_parts(hidden: Tensor) -> tuple[Tensor, ...]:
    """Views of [S, T, H] of about _PART_TOKENS tokens each: what a forward without gradients takes at once."""
    return hidden.split(max(1, _PART_TOKENS // hidden.shape[1]))


def masked_parts(hidden: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`token_parts` of [S, T, H], each with its rows of ``real`` [S, T] bool, the tokens that count; None: all do."""
    parts = token_parts(hidden)
    return zip(parts, [None] * len(parts) if real is None else token_parts(real), strict=True)


def to_device(block: Block, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A working copy of a block: on ``device``, in ``dtype``, in inference mode."""
    return copy.deepcopy(block.module).to(device=device, dtype=dtype).eval()


def copy_arguments(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a block's arguments on ``device``, in memory of their own."""
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(device).clone(memory_format=torch.contiguous_format), arguments
    )


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _AllCaptured(Exception):
    """Raised by the last block's stand-in: nothing after it is needed."""


def _record_calls(model: PreTrainedModel, blocks: list[Block], embeds: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """Hidden states and keyword arguments of every block for one sample; each block passes its input on."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def stand_in(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise CalibrationError(f"{type(model).__name__} calls its blocks with positional arguments; not supported")
        calls.append((hidden_states, kwargs))
        if len(calls) == len(blocks):
            raise _AllCaptured
        return hidden_states

    with _forward_replaced([block.module for block in blocks], stand_in):
        try:
            model.base_model(inputs_embeds=embeds, use_cache=False)
        except _AllCaptured:
            return calls
    raise CalibrationError(f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks")


@contextmanager
def _forward_replaced(modules: list[nn.Module], forward: Any) -> Iterator[None]:
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # uncovers the method of the class


def _same(left: Any, right: Any) -> bool:
    left_leaves, left_spec = pytree.tree_flatten(left)
    right_leaves, right_spec = pytree.tree_flatten(right)
    return left_spec == right_spec and all(
        _same_values(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )


def _same_values(left: Tensor, right: Tensor) -> bool:
    """Of floats, up to rounding: one unit of bfloat16, and near 0 what float32 angles of 8,192 positions are off by."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.allclose(left, right, 2.0**-7, 2.0**-10) if left.is_floating_point() else torch.equal(left, right)
