"""The layouts of GPTQ and AWQ checkpoints, in which auto-round writes integer weights too."""

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

# float16 or bfloat16 on disk, whatever the model's dtype is; float32 holds either exactly.
_SCALES = torch.float32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight codes each slot of the stream holds
_AWQ_SLOTS = (0, 4, 1, 5, 2, 6, 3, 7)  # its inverse


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """AutoGPTQ's layout: compressed-tensors' words, transposed."""

    minus_one: bool  # zero points are stored minus one, so that 0 cannot be said
    g_idx: bool = False  # the group of each input feature is there too

    def specs(self, scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        type_ = integer(scheme.weights)
        specs = _specs(type_, rows, columns)
        specs["qweight"] = TensorSpec(
            shape=(packing.words_per_row(columns, type_.bits), rows),
            dtype=torch.int32,
            input_dim=0,
            output_dim=1,
            packed_dim=0,
            pack_factor=Fraction(32, type_.bits),
        )
        if self.g_idx:
            specs["g_idx"] = TensorSpec(shape=(columns,), dtype=torch.int32, input_dim=0)
        return specs

    def size(self, shapes: LayerShapes, scheme: QuantScheme) -> tuple[int, int]:
        type_ = integer(scheme.weights)
        words, rows = matrix("qweight", shapes)
        codes = _whole_codes(words, type_.bits)
        return rows, group_columns(type_, matrix("scales", shapes)[0], codes, codes)

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """qweight [K*b/32, N] and qzeros [G, N*b/32] int32, scales [G, N]; g_idx [K] int32."""
        type_ = integer(weight.type)
        _whole_words(weight.codes.shape[1], type_.bits)
        _whole_words(weight.codes.shape[0], type_.bits)
        stored = _zero_points(weight) - int(self.minus_one)
        if (stored < 0).any():
            raise ValueError("a zero point of 0 cannot be stored minus one; write gptq_v2, awq or compressed-tensors")
        tensors = {
            "qweight": packing.pack(weight.codes, type_.bits).T.contiguous(),
            "qzeros": packing.pack(stored.to(torch.uint8), type_.bits),
            "scales": weight.scale.T.contiguous(),
        }
        if self.g_idx:
            tensors["g_idx"] = _groups(weight.codes.shape[1], type_, weight.codes.device)
        return tensors

    def from_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        type_, words = integer(scheme.weights), tensors["qweight"]
        rows, columns = words.shape[1], _whole_codes(words.shape[0], type_.bits)
        if self.g_idx:
            _require_trivial(tensors["g_idx"], columns, type_)
        stored = packing.unpack(tensors["qzeros"], type_.bits, rows).short()
        if self.minus_one and not type_.symmetric and (stored == type_.max_code).any():
            raise ValueError(
                f"a zero point is stored as {type_.max_code}, minus one: some readers take it for "
                f"{type_.max_code + 1}, others for 0, so what was meant is unknown; export again as gptq_v2 or "
                "auto_round, which do not subtract one"
            )
        codes = packing.unpack(words.T.contiguous(), type_.bits, columns)
        return _assemble(type_, codes, tensors["scales"], stored + int(self.minus_one))


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """AutoAWQ's layout: codes packed along N, each eight of them in the order 0 2 4 6 1 3 5 7."""

    def specs(self, scheme: QuantScheme, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        specs = _specs(integer(scheme.weights), rows, columns)
        words = specs["qzeros"].shape[1]
        return {**specs, "qweight": replace(specs["qzeros"], shape=(columns, words), input_dim=0)}

    def size(self, shapes: LayerShapes, scheme: QuantScheme) -> tuple[int, int]:
        type_ = integer(scheme.weights)
        columns, words = matrix("qweight", shapes)
        group_columns(type_, matrix("scales", shapes)[0], columns, columns)
        return _whole_codes(words, type_.bits), columns

    def to_tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """qweight [K, N*b/32] and qzeros [G, N*b/32] int32, scales [G, N]."""
        type_, rows = integer(weight.type), weight.codes.shape[0]
        _whole_words(rows, type_.bits)
        if rows % 8:
            raise ValueError(f"{rows} output rows are not a multiple of 8, as AWQ's order needs")
        return {
            "qweight": packing.pack(_reorder(weight.codes.T, _AWQ_ORDER), type_.bits),
            "qzeros": packing.pack(_reorder(_zero_points(weight).to(torch.uint8), _AWQ_ORDER), type_.bits),
            "scales": weight.scale.T.contiguous(),
        }

    def from_tensors(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
        type_, words = integer(scheme.weights), tensors["qweight"]
        rows = _whole_codes(words.shape[1], type_.bits)
        codes = _reorder(packing.unpack(words, type_.bits, rows), _AWQ_SLOTS).T.contiguous()
        zeros = _reorder(packing.unpack(tensors["qzeros"], type_.bits, rows), _AWQ_SLOTS)
        return _assemble(type_, codes, tensors["scales"], zeros.short())


def _specs(type_: Integer, rows: int, columns: int) -> dict[str, TensorSpec]:
    """qzeros and scales, which both layouts shape alike."""
    groups = type_.tile(rows, columns).tiles(rows, columns)[1]
    along_k = None if type_.group_size is None else 0  # one group is whole on every rank
    zeros = TensorSpec(
        shape=(groups, packing.words_per_row(rows, type_.bits)),
        dtype=torch.int32,
        input_dim=along_k,
        output_dim=1,
        packed_dim=1,
        pack_factor=Fraction(32, type_.bits),
    )
    return {
        "qzeros": zeros,
        "scales": TensorSpec(shape=(groups, rows), dtype=_SCALES, input_dim=along_k, output_dim=1),
    }


def _whole_codes(words: int, bits: int) -> int:
    """How many codes fill so many words; these layouts do not say where a row ends, so all of them must count."""
    if words * 32 % bits:
        raise ValueError(f"{words} words are not a whole number of {bits}-bit codes")
    return words * 32 // bits


def _whole_words(codes: int, bits: int) -> None:
    if codes * bits % 32:
        raise ValueError(f"{codes} codes of {bits} bits do not fill whole words, as this layout needs")


def _zero_points(weight: QuantizedWeight) -> Tensor:
    """[G, N] int16, also of symmetric weights."""
    if weight.zero_point is not None:
        return weight.zero_point.T.short()
    return torch.full_like(weight.scale.T, weight.type.zero, dtype=torch.int16)


def _assemble(type_: Integer, codes: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedWeight:
    """Codes [N, K], scales and zero points [G, N] -> the weight; symmetric ones must have the midpoint only."""
    tiles = type_.tile(*codes.shape).tiles(*codes.shape)
    scale = require_shape("scales", scales.T, tiles).contiguous()
    require_shape("qzeros, unpacked,", zeros.T, tiles)
    if not type_.symmetric:
        zero_point = zeros.T.to(torch.uint8).contiguous()
        return QuantizedWeight(type=type_, codes=codes, scale=scale, zero_point=zero_point)
    if (wrong := zeros[zeros != int(type_.zero)]).numel():
        raise ValueError(
            f"the config says symmetric, so that every zero point is {int(type_.zero)}, but one is {int(wrong[0])}; "
            "correct sym in the config, or which convention of zero points it names"
        )
    return QuantizedWeight(type=type_, codes=codes, scale=scale)


def _groups(columns: int, type_: Integer, device: torch.device) -> Tensor:
    """The g_idx [K] of features in their own order."""
    index = torch.arange(columns, dtype=torch.int32, device=device)
    return index // (type_.group_size or columns)


def _require_trivial(g_idx: Tensor, columns: int, type_: Integer) -> None:
    """Refuse permuted groups; a part of K that starts at a group's beginning may count from there."""
    groups = require_shape("g_idx", g_idx, (columns,))
    if not torch.equal(groups - groups[:1], _groups(columns, type_, groups.device)):
        raise ValueError(
            "g_idx assigns input features to groups out of order (act-order, desc_act): not supported, because every "
            "group would have to be gathered; quantize again with desc_act=False, or serve it without this plugin"
        )


def _reorder(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Codes [A, N] with each eight neighbours along N in ``order``."""
    return codes.unflatten(1, (-1, 8))[..., list(order)].flatten(1)
