"""Blocks are found by structure, and run on captured inputs as the model runs them."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers as tf

from calibrate.blocks import capture_inputs, find_blocks, run_block
from calibrate.config import CalibrationError
from calibrate.kv_cache import observed
from calibrate.source import load_source
from tests.calibrate.conftest import COMMON, FAMILIES, make_model
from tests.conftest import DEMO_MODEL

SAMPLES = torch.randint(2, 128, (3, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_chain_of_blocks_equals_the_model(family_model: tf.PreTrainedModel) -> None:
    blocks = find_blocks(family_model)
    assert len(blocks) == 3
    assert not [name for block in blocks for name in block.unowned_matrices()]
    captured = capture_inputs(family_model, blocks, SAMPLES, torch.float32)
    hidden = captured.hidden
    expected = family_model(input_ids=SAMPLES, output_hidden_states=True, use_cache=False).hidden_states
    for index, block in enumerate(blocks):
        torch.testing.assert_close(hidden, expected[index])  # the input of each block
        hidden = run_block(block.module, hidden, captured.arguments[index])
    assert all("forward" not in vars(block.module) for block in blocks)  # the stand-ins are gone


def captured_kv_heads(model: tf.PreTrainedModel) -> int:
    return getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)


@torch.no_grad()
def test_kv_ranges_are_those_of_the_cache(family_model: tf.PreTrainedModel) -> None:
    """The oracle is transformers' own KV cache, which holds keys and values after RoPE."""
    blocks = find_blocks(family_model)
    captured = capture_inputs(family_model, blocks, SAMPLES, torch.float32)
    cache = tf.DynamicCache(config=family_model.config)
    # Sliding layers keep only their window: the cache is filled token by token and its maximum kept.
    peak = {index: {"k": 0.0, "v": 0.0} for index in range(3)}
    for token in range(SAMPLES.shape[1]):
        family_model(input_ids=SAMPLES[:, token : token + 1], past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            peak[index]["k"] = max(peak[index]["k"], layer.keys.abs().max().item())
            peak[index]["v"] = max(peak[index]["v"], layer.values.abs().max().item())
    hidden = captured.hidden
    for index, block in enumerate(blocks):
        plain = run_block(block.module, hidden, captured.arguments[index])
        queries: list[torch.Tensor] = []
        hook = block.module.self_attn.q_proj.register_forward_hook(lambda _m, _a, out, q=queries: q.append(out))
        with observed(block.module) as ranges:
            parts = [run_block(block.module, part, captured.arguments[index]) for part in hidden.split(1)]
        hook.remove()
        torch.testing.assert_close(torch.cat(parts), plain)
        if not hasattr(block.module.self_attn, "q_norm"):
            # What vLLM's attention gets: the unscaled projection. RoPE turns pairs: a factor of sqrt(2) at most.
            peak[index]["q"] = torch.cat(queries).abs().max().item()
            ratio = ranges.scales(block.module, block.name, per_head=False)[f"{block.name}.self_attn.q_scale"].item()
            ratio /= peak[index]["q"] / 448
            assert 0.7 < ratio < 1.42 if family_model.config.model_type != "opt" else 1 - 1e-5 <= ratio <= 1 + 2**-7
        hidden = plain
        scales = ranges.scales(block.module, block.name, per_head=False)
        assert set(scales) == {f"{block.name}.self_attn.{letter}_scale" for letter in "qkv"}
        for letter in "kv":
            scale = scales[f"{block.name}.self_attn.{letter}_scale"].item()
            exact = peak[index][letter] / 448
            assert exact * (1 - 1e-5) <= scale <= exact * (1 + 2**-7)  # rounded up to bfloat16: 8 significant bits
        heads = ranges.scales(block.module, block.name, per_head=True)
        for letter, count in zip("qkv", (4, *2 * (captured_kv_heads(family_model),)), strict=True):
            name = f"{block.name}.self_attn.{letter}_scale"
            assert heads[name].shape == (count, 1, 1)
            assert heads[name].amax() == scales[name]
            assert len(heads[name].unique()) > 1


def test_fused_experts_are_named() -> None:
    config = tf.MixtralConfig(**COMMON, num_local_experts=2)
    blocks = find_blocks(make_model(config))
    assert any("experts" in name for name in blocks[0].unowned_matrices())


def test_arguments_that_depend_on_the_sample_are_refused() -> None:
    model = make_model(tf.LlamaConfig(**COMMON))
    blocks = find_blocks(model)
    calls = iter(range(100))
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *args, **kw: tuple(t + next(calls) for t in rotary(*args, **kw))
    with pytest.raises(CalibrationError, match=r"model.layers.0 takes arguments that differ between samples"):
        capture_inputs(model, blocks, SAMPLES, torch.float32)


@pytest.mark.parametrize(("off", "refused"), [(2.0**-9, False), (2.0**-5, True)])
def test_arguments_may_differ_by_rounding_and_no_more(off: float, refused: bool) -> None:
    model = make_model(tf.LlamaConfig(**COMMON))
    calls = iter(range(100))
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *args, **kw: tuple(
        t * (1 + off * (next(calls) > 1)) for t in rotary(*args, **kw)
    )
    with pytest.raises(CalibrationError, match="differ between samples") if refused else nullcontext():
        capture_inputs(model, find_blocks(model), SAMPLES, torch.float32)


def test_a_model_without_blocks_is_refused() -> None:
    model = make_model(tf.LlamaConfig(**COMMON))
    model.config.num_hidden_layers = 7
    with pytest.raises(CalibrationError, match="no ModuleList of 7 decoder blocks"):
        find_blocks(model)


def test_gemma2_is_loaded_with_its_softcap(tmp_path: Path) -> None:
    """transformers' default attention leaves the cap out; the oracle is the eager one."""
    model = make_model(FAMILIES["gemma2"]())
    for block in find_blocks(model):
        block.module.self_attn.q_proj.weight.data *= 60
        block.module.self_attn.k_proj.weight.data *= 60
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO_MODEL / name).read_bytes())
    source = load_source(str(tmp_path), trust_remote_code=False)
    eager, plain = (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(SAMPLES).logits
        for name in ("eager", "sdpa")
    )
    assert not torch.allclose(eager, plain, atol=1e-3)  # the cap matters here
    torch.testing.assert_close(source.model(SAMPLES).logits, eager)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused() -> None:
    model = make_model(tf.LlamaConfig(**COMMON))
    original = model.model.forward

    def altered(*args: object, **kw: object) -> object:
        stand_in = model.model.layers[1].forward
        model.model.layers[1].forward = lambda hidden_states, **k: stand_in(hidden_states * 2, **k)
        return original(*args, **kw)

    model.model.forward = altered
    with pytest.raises(CalibrationError, match="LlamaForCausalLM changes hidden states between its blocks"):
        capture_inputs(model, find_blocks(model), SAMPLES, torch.float32)
