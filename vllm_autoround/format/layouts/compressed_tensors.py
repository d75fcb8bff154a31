"""The layouts of compressed-tensors: our own, the padded words of older releases, and unpacked integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from vllm_autoround.format import packing
from vllm_autoround.format.layouts.base import LayerShapes, group_columns, integer, matrix
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer, QuantizedWeight, TensorSpec
from vllm_autoround.format.weights.base import require_shape

_ENOUGH_ZERO_POINTS = 16  # fewer may all be the midpoint by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensors:
    """Every weight type as `WeightType.specs` has it: integer codes along K, zero points along N."""

    padded: bool = False  # integer codes never straddle two words, as compressed-tensors wrote before 0.18

    def specs(self, scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        specs = scheme.specs(rows, columns, dtype)
        if self.padded and isinstance(scheme.weights, Integer):
            bits = scheme.weights.bits
            for suffix, dim, codes in (("weight_packed", 1, columns), ("weight_zero_point", 0, rows)):
                if spec := specs.get(suffix):
                    shape = list(spec.shape)
                    shape[dim] = packing.padded_words_per_row(codes, bits)
                    specs[suffix] = replace(spec, shape=tuple(shape), pack_factor=Fraction(32 // bits))
        return specs

    def size(self, shapes: LayerShapes, scheme: QuantScheme) -> tuple[int, int]:
        type_ = scheme.weights
        if not isinstance(type_, Integer):
            if type_.bits == 8:
                return matrix("weight", shapes)
            rows, pairs = matrix("weight_packed", shapes)
            return rows, 2 * pairs
        rows, words = matrix("weight_packed", shapes)
        most, least = self._codes(words, type_.bits), self._codes(words - 1, type_.bits) + 1
        return rows, group_columns(type_, matrix("weight_scale", shapes)[1], least, most)

    def _codes(self, words: int, bits: int) -> int:
        """The most codes that fit into so many words."""
        return words * (32 // bits) if self.padded else words * 32 // bits

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The type's own tensors; padded: weight_packed [N, ceil(K/(32//b))], weight_zero_point likewise along N."""
        tensors = weight.type.to_tensors(weight)
        if self.padded and isinstance(weight.type, Integer):
            bits = weight.type.bits
            tensors["weight_packed"] = _pack_padded(weight.codes, bits)
            if weight.zero_point is not None:
                tensors["weight_zero_point"] = _pack_padded(weight.zero_point.T, bits).T.contiguous()
        return tensors

    def from_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        if self.padded and isinstance(scheme.weights, Integer):
            weight = _unpack_padded(tensors, scheme.weights)
        else:
            weight = scheme.weights.from_tensors(tensors)
        _refuse_placeholders(weight)
        return weight


@dataclass(frozen=True, slots=True, kw_only=True)
class IntQuantized:
    """Integers as signed bytes, whatever their width."""

    def specs(self, scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        type_ = integer(scheme.weights)
        scale = type_.specs(rows, columns, dtype)["weight_scale"]
        specs = {
            "weight": TensorSpec(shape=(rows, columns), dtype=torch.int8, input_dim=1, output_dim=0),
            "weight_scale": scale,
        }
        return specs if type_.symmetric else {**specs, "weight_zero_point": replace(scale, dtype=torch.int8)}

    def size(self, shapes: LayerShapes, scheme: QuantScheme) -> tuple[int, int]:
        rows, columns = matrix("weight", shapes)
        group_columns(integer(scheme.weights), matrix("weight_scale", shapes)[1], columns, columns)
        return rows, columns

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """weight [N, K] int8, weight_scale [N, G] and, if asymmetric, weight_zero_point [N, G] int8."""
        half = int(integer(weight.type).zero)
        tensors = {"weight": weight.codes, "weight_zero_point": weight.zero_point}
        signed = {name: (t.short() - half).to(torch.int8).contiguous() for name, t in tensors.items() if t is not None}
        return {**signed, "weight_scale": weight.scale.contiguous()}

    def from_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        type_ = integer(scheme.weights)
        half, values = int(type_.zero), tensors["weight"]
        if values.dtype != torch.int8:
            raise ValueError(f"weight has dtype {values.dtype}, expected torch.int8")
        tiles = type_.tile(*values.shape).tiles(*values.shape)
        zero_point = None
        if not type_.symmetric:
            zeros = require_shape("weight_zero_point", tensors["weight_zero_point"], tiles)
            zero_point = (zeros.short() + half).to(torch.uint8)
        codes = values.short() + half
        if codes.min() < 0 or codes.max() > type_.max_code:
            raise ValueError(f"weight holds values that are not {type_.bits}-bit integers")
        weight = QuantizedWeight(
            type=type_,
            codes=codes.to(torch.uint8),
            scale=require_shape("weight_scale", tensors["weight_scale"], tiles),
            zero_point=zero_point,
        )
        _refuse_placeholders(weight)
        return weight


def _pack_padded(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] uint8 -> words [N, ceil(K/(32//b))] int32; the inverse of `packing.unpack_padded`."""
    each = 32 // bits
    rows, columns = codes.shape
    words = torch.zeros(rows, packing.padded_words_per_row(columns, bits), dtype=torch.int32, device=codes.device)
    for slot in range(each):
        column = codes[:, slot::each].int() << (slot * bits)
        words[:, : column.shape[1]] |= column
    return words


def _unpack_padded(tensors: Mapping[str, Tensor], type_: Integer) -> QuantizedWeight:
    rows, columns = tensors["weight_shape"].tolist()
    tiles = type_.tile(rows, columns).tiles(rows, columns)
    zero_point = None
    if not type_.symmetric:
        words = tensors["weight_zero_point"].T
        zero_point = packing.unpack_padded(words, type_.bits, rows).T.contiguous()
    return QuantizedWeight(
        type=type_,
        codes=packing.unpack_padded(tensors["weight_packed"], type_.bits, columns),
        scale=require_shape("weight_scale", tensors["weight_scale"], tiles),
        zero_point=zero_point,
    )


def _refuse_placeholders(weight: QuantizedWeight) -> None:
    """llm-compressor's AutoRoundModifier (0.14) tunes zero points but writes 0, stored as the midpoint, for all."""
    zeros = weight.zero_point
    if zeros is None or zeros.numel() < _ENOUGH_ZERO_POINTS:
        return
    if bool((zeros == 1 << (weight.type.bits - 1)).all()):
        raise ValueError(
            "the layer is asymmetric, but every zero point is the placeholder midpoint: the tool that made the "
            "checkpoint lost those it had tuned, as llm-compressor's AutoRoundModifier does, so its weights are not "
            "what was tuned; quantize again symmetrically, or with a tool that keeps them"
        )
