"""Quantized lm_head and embedding, whose vocabulary vLLM pads and splits."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_autoround.format.scheme import NAMED_SCHEMES, QuantScheme
from vllm_autoround.format.weights import Float8
from vllm_autoround.plugin.config import AutoRoundConfig

from .layers import (
    COLUMNS,
    VOCABULARY,
    Stored,
    config_of,
    head,
    identify,
    integer,
    load,
    loaded,
    rounding_bound,
    spoil,
    stored,
)

PADDED = 512  # as vLLM pads it
EMBEDDING = "model.embed_tokens"
BLOCKS = QuantScheme(Float8(strategy="block"))


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


def test_logits_through_vllms_own_processor() -> None:
    kept = stored(integer(6, 128), VOCABULARY)
    hidden = torch.randn(3, COLUMNS)
    logits = LogitsProcessor(VOCABULARY)(loaded(head(), {None: kept}), hidden)
    weight = kept.dequantize()
    exact = hidden.double() @ weight.double().T
    assert logits.shape == exact.shape
    assert ((logits.double() - exact).abs() <= rounding_bound(hidden, weight, COLUMNS)).all()


def test_quantized_lm_head_cannot_be_tied_to_the_embedding() -> None:
    kept = stored(integer(4), VOCABULARY)
    lm_head = ParallelLMHead(VOCABULARY, COLUMNS, quant_config=config_of({"lm_head": kept}), prefix="lm_head")
    with pytest.raises(ValueError, match=r"^lm_head: quantized, but config\.json ties it to the embedding"):
        lm_head.tie_weights(VocabParallelEmbedding(VOCABULARY, COLUMNS))


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_embedding_in_fp8(strategy: Literal["tensor", "channel", "block"]) -> None:
    """Other tools' weight-only FP8, which no named scheme is."""
    kept = stored(QuantScheme(Float8(strategy=strategy)), VOCABULARY)
    ids = torch.tensor([[0, 1, 127, 128], [257, 498, 499, 3]])
    assert torch.equal(loaded_embedding(kept)(ids), kept.dequantize()[ids])


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
    lm_head = ParallelLMHead(VOCABULARY, COLUMNS, quant_config=config, prefix="lm_head")
    assert "weight" in dict(lm_head.named_parameters())
    for prefix in (EMBEDDING, ""):
        assert "weight" in dict(create_embedding(config, prefix).named_parameters())
