"""Planted outliers change what layers see, and nothing that the model says."""

from __future__ import annotations

import torch
import transformers as tf

from benchmarks.outliers import plant
from tests.calibrate.conftest import COMMON, make_model


def test_outliers_are_seen_and_change_nothing() -> None:
    model = make_model(tf.LlamaConfig(**COMMON | {"hidden_size": 128, "head_dim": 16})).bfloat16()
    tokens, seen = torch.arange(2, 34)[None], []
    for reader in ("self_attn.v_proj", "mlp.up_proj"):
        layer = model.get_submodule("model.layers.1").get_submodule(reader)
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax((0, 1))))
    with torch.no_grad():
        before = model(tokens).logits
        plant(model, 256)
        assert torch.equal(model(tokens).logits, before)
    for plain, planted in zip(seen[:2], seen[2:], strict=True):
        assert (planted / plain)[[3, 100]].tolist() == [256, 256]
        assert (planted / plain).sum() == 2 * 256 + 126
