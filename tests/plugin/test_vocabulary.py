"""Quantized lm_head and embedding, whose vocabulary vLLM pads and splits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Float8
from vllm_autoround.plugin.config import AutoRoundConfig

from .conftest import TensorParallel
from .layers import COLUMNS, SCHEMES, Stored, config_of, identify, integer, load, rounding_bound, spoil, stored

VOCABULARY = 500  # not a multiple of 64, to which vLLM pads; nor do zero points of every width fill whole words
PADDED = 512
EMBEDDING = "model.embed_tokens"
BLOCKS = QuantScheme(Float8(strategy="block"))
WEIGHT_ONLY = [
    *(scheme for scheme in SCHEMES if scheme.activations is None),
    *(QuantScheme(scheme.weights) for scheme in SCHEMES if scheme.activations and scheme.weights.bits == 8),
]


def loaded_head(kept: Stored) -> torch.nn.Module:
    layer = ParallelLMHead(
        VOCABULARY, COLUMNS, params_dtype=torch.float32, quant_config=config_of({"lm_head": kept}), prefix="lm_head"
    )
    spoil(layer)
    load(layer, kept.tensors(), None)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def create_embedding(config: AutoRoundConfig, prefix: str = EMBEDDING, **common: Any) -> VocabParallelEmbedding:
    layer = VocabParallelEmbedding(
        VOCABULARY, COLUMNS, quant_config=config, prefix=prefix, **{"params_dtype": torch.float32, **common}
    )
    spoil(layer)
    return layer


def loaded_embedding(kept: Stored, prefix: str = EMBEDDING, **common: Any) -> VocabParallelEmbedding:
    layer = create_embedding(config_of({EMBEDDING: kept}), prefix, **common)
    load(layer, kept.tensors(), None)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def padded(weight: Tensor) -> Tensor:
    """A row of padding is a row of zeros."""
    return torch.nn.functional.pad(weight, (0, 0, 0, PADDED - VOCABULARY))


@pytest.mark.parametrize("scheme", SCHEMES, ids=identify)
def test_lm_head(scheme: QuantScheme, tensor_parallel: TensorParallel) -> None:
    kept = stored(scheme, VOCABULARY)
    x = torch.randn(3, COLUMNS)
    weight, values = padded(kept.dequantize()), kept.acts_on(x)
    exact, bound = values.double() @ weight.double().T, rounding_bound(values, weight, COLUMNS)
    head = loaded_head(kept)
    logits = head.quant_method.apply(head, x, bias=head.bias)
    assert ((logits.double() - exact).abs() <= bound).all()
    for rank in range(2):
        with tensor_parallel(rank, 2):
            head = loaded_head(kept)
            logits = head.quant_method.apply(head, x, bias=head.bias)
        assert ((logits.double() - exact.chunk(2, dim=1)[rank]).abs() <= bound.chunk(2, dim=1)[rank]).all()


def test_logits_through_vllms_own_processor() -> None:
    kept = stored(integer(6, 128), VOCABULARY)
    hidden = torch.randn(3, COLUMNS)
    logits = LogitsProcessor(VOCABULARY)(loaded_head(kept), hidden)
    weight = kept.dequantize()
    exact = hidden.double() @ weight.double().T
    assert logits.shape == exact.shape
    assert ((logits.double() - exact).abs() <= rounding_bound(hidden, weight, COLUMNS)).all()


def test_quantized_lm_head_cannot_be_tied_to_the_embedding() -> None:
    kept = stored(integer(4), VOCABULARY)
    head = ParallelLMHead(VOCABULARY, COLUMNS, quant_config=config_of({"lm_head": kept}), prefix="lm_head")
    with pytest.raises(ValueError, match=r"^lm_head: quantized, but config\.json ties it to the embedding"):
        head.tie_weights(VocabParallelEmbedding(VOCABULARY, COLUMNS))


@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=identify)
def test_embedding_looks_up_the_dequantized_rows(scheme: QuantScheme, tensor_parallel: TensorParallel) -> None:
    kept = stored(scheme, VOCABULARY)
    ids = torch.tensor([[0, 1, 255, 256], [257, 498, 499, 3]])
    expected = kept.dequantize()[ids]
    assert torch.equal(loaded_embedding(kept)(ids), expected)
    total = torch.zeros_like(expected)
    for rank in range(2):
        with tensor_parallel(rank, 2):
            layer = loaded_embedding(kept)
            start = layer.shard_indices.org_vocab_start_index
            own = (ids >= start) & (ids < layer.shard_indices.org_vocab_end_index)
            # What vLLM's forward does between its collective operations.
            rows = layer.quant_method.embedding(layer, torch.where(own, ids - start, 0))
        total += rows * own[..., None]
    assert torch.equal(total, expected)


@pytest.mark.parametrize("scheme", [integer(3, symmetric=False), NAMED_SCHEMES["NVFP4A16"]], ids=identify)
def test_looked_up_rows_are_rounded_once_to_the_models_type(scheme: QuantScheme) -> None:
    kept = stored(scheme, VOCABULARY, torch.bfloat16)
    ids = torch.arange(VOCABULARY)
    rows = loaded_embedding(kept, params_dtype=torch.bfloat16)(ids)
    assert torch.equal(rows, kept.dequantize().bfloat16())


@pytest.mark.parametrize("scheme", [integer(3, symmetric=False), NAMED_SCHEMES["MXFP4A16"], BLOCKS], ids=identify)
def test_a_lookup_can_be_compiled_as_a_whole(scheme: QuantScheme) -> None:
    kept = stored(scheme, VOCABULARY)
    layer = loaded_embedding(kept)
    compiled = torch.compile(lambda ids: layer.quant_method.embedding(layer, ids), fullgraph=True, backend="eager")
    ids = torch.tensor([7, 499])
    assert torch.equal(compiled(ids), kept.dequantize()[ids])


def test_a_packed_embedding_stays_packed() -> None:
    kept = stored(integer(2, 128), VOCABULARY)
    layer = loaded_embedding(kept)
    held = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert held < PADDED * COLUMNS / 2  # 4 bits a weight; 2 for the code, the rest for scales and what all rows share
    assert not list(layer.parameters())


def test_most_models_do_not_tell_the_embedding_its_name() -> None:
    kept = stored(integer(4), VOCABULARY)
    layer = loaded_embedding(kept, prefix="")
    assert torch.equal(layer(torch.tensor([5])), kept.dequantize()[[5]])


def test_an_embedding_without_a_name_may_be_only_one() -> None:
    config = config_of({"a.embed_tokens": integer(4), "b.wte": integer(4)})
    with pytest.raises(ValueError, match=r"does not say which of a\.embed_tokens, b\.wte it creates"):
        create_embedding(config, prefix="")


def test_an_embedding_has_no_activations() -> None:
    config = config_of({EMBEDDING: NAMED_SCHEMES["FP8_DYNAMIC"]})
    with pytest.raises(ValueError, match=r"^model\.embed_tokens: an embedding has no activations to quantize"):
        create_embedding(config)


def test_a_tied_embedding_is_refused() -> None:
    config = config_of({EMBEDDING: integer(4)})
    config.tied = True
    with pytest.raises(ValueError, match=r"^model\.embed_tokens: quantized, but config\.json ties lm_head to it"):
        create_embedding(config)


def test_added_tokens_are_refused() -> None:
    config = config_of({EMBEDDING: integer(4)})
    with pytest.raises(ValueError, match=r"^model\.embed_tokens: a quantized vocabulary cannot be extended"):
        VocabParallelEmbedding(520, COLUMNS, org_num_embeddings=500, quant_config=config, prefix=EMBEDDING)


def test_unlisted_lm_head_and_embedding_are_not_quantized() -> None:
    config = config_of({"model.layers.0.mlp.down_proj": integer(4)})
    head = ParallelLMHead(VOCABULARY, COLUMNS, quant_config=config, prefix="lm_head")
    assert "weight" in dict(head.named_parameters())
    for prefix in (EMBEDDING, ""):
        assert "weight" in dict(create_embedding(config, prefix).named_parameters())
