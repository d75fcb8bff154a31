"""Cutting, padding and joining quantized weights without changing what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vllm_autoround.format.weights import Float8, QuantizedWeight


def crop(weight: QuantizedWeight, rows: slice, columns: slice) -> QuantizedWeight:
    """A part of a weight that starts, along either dimension, at the border of a group."""
    tile = weight.type.tile(*weight.codes.shape)
    scales = (_groups(rows, tile.rows, weight.scale.shape[0]), _groups(columns, tile.columns, weight.scale.shape[1]))
    return replace(
        weight,
        codes=weight.codes[rows, columns],
        scale=weight.scale[scales],
        zero_point=None if weight.zero_point is None else weight.zero_point[scales],
    )


def _groups(features: slice, size: int, count: int) -> slice:
    """The groups of ``size`` features that cover ``features``; a single one covers everything."""
    if count == 1:
        return slice(0, 1)
    assert features.start % size == 0
    return slice(features.start // size, -(-features.stop // size))


def pad_rows(weight: QuantizedWeight, rows: int) -> QuantizedWeight:
    """Add rows that stand for zeros at the end."""
    columns = weight.codes.shape[1]
    groups, _ = weight.type.tile(rows, columns).tiles(rows, columns)
    return replace(
        weight,
        codes=_with_zeros(weight.codes, rows),
        scale=_with_zeros(weight.scale, groups),
        zero_point=None if weight.zero_point is None else _with_zeros(weight.zero_point, groups),
    )


def _with_zeros(tensor: Tensor, rows: int) -> Tensor:
    if tensor.shape[0] == rows:
        return tensor
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    return padded


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight of the rows of all, in order; None if they have no common form.

    All are of one type, with one global scale.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first.type, Float8) and first.type.strategy == "tensor":
        if all(torch.equal(first.scale, weight.scale) for weight in weights[1:]):
            return replace(first, codes=torch.cat([weight.codes for weight in weights]))
        weights = [per_channel(weight) for weight in weights]
    rows = weights[0].type.tile(*first.codes.shape).rows
    if any(weight.codes.shape[0] % rows for weight in weights[:-1]):
        return None  # a block of the joint weight would cover rows of two
    zero_points = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return replace(
        weights[0],
        codes=torch.cat([weight.codes for weight in weights]),
        scale=torch.cat([weight.scale for weight in weights]),
        zero_point=torch.cat(zero_points) if zero_points else None,
    )


def per_channel(weight: QuantizedWeight) -> QuantizedWeight:
    """The same FP8 weight with the layer's scale repeated for every row."""
    return replace(weight, type=Float8(strategy="channel"), scale=weight.scale.expand(weight.codes.shape[0], 1))
