"""Every case of the matrix: the layer as vLLM makes, loads and calls it equals the float reference on its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from .conftest import TensorParallel
from .layers import COLUMNS, Kind, Shard, Stored, adopting, all_of, assembled, loaded, rounding_bound
from .matrix import CASES, DIALECTS, FAMILIES, Case, held, manifest_of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_served(case: Case, tensor_parallel: TensorParallel, record_property: Callable[[str, object], None]) -> None:
    for layout, scheme, kind in case.contents():
        shards = all_of(kind, scheme, layout=layout)
        manifest = manifest_of(case.dialect, {kind.names[shard]: layer for shard, layer in shards.items()})
        ranks = []
        for rank in range(case.ranks):
            with tensor_parallel(rank, case.ranks):
                ranks.append(loaded(kind, shards, config=adopting(manifest)))
        check = check_lookup if kind.layer is VocabParallelEmbedding else check_product
        assert check(kind, shards, ranks), f"{scheme} as {layout}"
    for name, value in asdict(case).items():  # for tests.plugin.table
        record_property(name, value)


def check_product(kind: Kind, shards: Mapping[Shard, Stored], ranks: Sequence[torch.nn.Module]) -> bool:
    """Whether a random x is multiplied as exactly as float32 can, and x = I, which adds zeros to each weight, exactly.

    The ranks of a layer that splits its input quantize their parts of the activations each for itself.
    """
    x = torch.randn(5, COLUMNS)
    products, weights = (outputs(kind, ranks, values) for values in (x, torch.eye(COLUMNS)))
    for shard, layer in shards.items():
        weight = layer.dequantize()
        rows = len(weight)  # what follows is the padding of a vocabulary
        acting = torch.cat([layer.acts_on(part) for part in parts(kind, x, len(ranks))], dim=1)
        error = rounding_bound(acting, weight, COLUMNS)
        for product, held_weight in zip(products[shard], weights[shard], strict=True):
            if ((product[:, :rows] - acting.double() @ weight.double().T).abs() > error).any():
                return False
            if layer.scheme and not layer.scheme.activations and not torch.equal(held_weight[:, :rows].T, weight):
                return False
            if product[:, rows:].any():
                return False
    return True


def parts(kind: Kind, x: Tensor, ranks: int) -> Sequence[Tensor]:
    """What each rank sees of x [..., K], together all of it once."""
    return x.chunk(ranks if kind.splits_input else 1, dim=-1)


def outputs(kind: Kind, ranks: Sequence[torch.nn.Module], x: Tensor) -> dict[Shard, list[Tensor]]:
    """The layer's output for x [..., K], by shard."""
    seen = parts(kind, x, len(ranks)) if kind.splits_input else [x] * len(ranks)
    if kind.layer is ParallelLMHead:  # not called by vLLM either
        return assembled(kind, [layer.quant_method.apply(layer, x) for layer in ranks])
    return assembled(kind, [layer(part)[0].double() for layer, part in zip(ranks, seen, strict=True)])


def check_lookup(kind: Kind, shards: Mapping[Shard, Stored], ranks: Sequence[torch.nn.Module]) -> bool:
    """Whether every row of the embedding is found."""
    expected = shards[None].dequantize()
    ids = torch.arange(len(expected))
    total = torch.zeros_like(expected)
    for layer in ranks:  # what vLLM's forward does between its collective operations
        start = layer.shard_indices.org_vocab_start_index
        own = (ids >= start) & (ids < layer.shard_indices.org_vocab_end_index)
        total += layer.quant_method.embedding(layer, torch.where(own, ids - start, 0)) * own[:, None]
    return torch.equal(total, expected)


def test_every_group_size_meets_every_layout_and_every_class_of_layer() -> None:
    contents = [(case, *content) for case in CASES for content in case.contents()]
    layouts = {(case.family, case.dialect, layout, scheme) for case, layout, scheme, _ in contents}
    assert layouts == {
        (family, dialect, layout, scheme)
        for family in FAMILIES
        for dialect in DIALECTS
        for layout, schemes in held(family, dialect).items()
        for scheme in schemes
    }
    classes = {(scheme, case.label) for case, _, scheme, _ in contents}
    assert classes == {(scheme, case.label) for case in CASES for scheme in FAMILIES[case.family]}


def test_what_the_dialects_hold() -> None:
    """A few facts that the generator must find by itself."""
    assert all(held(family, "compressed-tensors") for family in FAMILIES)
    assert set(held("W3A16", "compressed-tensors")) == {"compressed-tensors", "padded", "int-quantized"}
    assert set(held("W4A16", "compressed-tensors")) == {"compressed-tensors", "int-quantized"}
    assert set(held("W5A16_ASYM", "auto-round")) == {"gptq", "gptq_v2", "gptq_v2+g_idx", "awq"}
    assert not held("W5A16", "gptq")
    assert [family for family in FAMILIES if held(family, "awq")] == ["W4A16_ASYM"]
    assert not held("W4A8_FP8", "auto-round")
    assert set(held("FP8_BLOCK", "auto-round")) == {"compressed-tensors", "fp8_block"}
