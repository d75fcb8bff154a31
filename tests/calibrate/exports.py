"""Exports without tuning: tiny models of random weights, rounded to nearest and written by the real writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as tf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from calibrate.blocks import find_blocks
from calibrate.checkpoint import CheckpointWriter
from calibrate.gguf_tokenizer import _SPLITS
from calibrate.source import Source, load_source
from tests.calibrate.conftest import make_model
from tests.conftest import DEMO_MODEL
from vllm_autoround.format.manifest import KVCache, Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight, quantize

SIZES: dict[str, Any] = {
    "vocab_size": 830,  # of the demo model's tokenizer
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


# With these and their doubles, a 1 survives the quantization of activations.
STATIC = {"input_scale": 0.125, "input_global_scale": 384.0}


class Exported(NamedTuple):
    """A checkpoint, and what it must mean."""

    out: Path
    source: Path
    weights: dict[str, QuantizedWeight]  # by full name

    def state(self) -> dict[str, Tensor]:
        """The unquantized model's state dict with the dequantized weights, float32."""
        model = tf.AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return state | {f"{layer}.weight": weight.dequantize() for layer, weight in self.weights.items()}

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V] of the dequantized model, float32."""
        config = tf.AutoConfig.from_pretrained(self.source, tie_word_embeddings=False)
        model = tf.AutoModelForCausalLM.from_config(config).float().eval()
        model.load_state_dict(self.state())
        with torch.no_grad():
            logits: Tensor = model(ids).logits
        return logits


def save_source(folder: Path, config: tf.PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model, its rows and columns of uneven size, with the demo model's tokenizer."""
    model = make_model(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                module.weight.copy_(uneven(rows, columns) * 0.3)
                if module.bias is not None:
                    module.bias.normal_(std=0.1)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.5)
            elif isinstance(weight := getattr(module, "weight", None), nn.Parameter):
                weight.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    (folder / "LICENSE.txt").write_text("yours\n")
    return folder


def uneven(rows: int, columns: int) -> Tensor:
    """Weights [rows, columns] whose groups differ in size and lie off zero, so that every zero point occurs."""
    spread = torch.exp(torch.randn(rows, 1)) * torch.exp(0.5 * torch.randn(1, columns))
    shift = torch.randn(rows, -(-columns // 16)).repeat_interleave(16, 1)[:, :columns]
    return (torch.randn(rows, columns) + 2 * shift) * spread * columns**-0.5


def llama(**changes: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(**{**SIZES, **changes})


def export(
    folder: Path,
    config: tf.PreTrainedConfig,
    scheme: str | Callable[[str], str | None],
    formats: Sequence[str],
    *,
    outside: Sequence[str] = (),
    kv_cache: KVCache | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Exported:
    """Write ``folder/out`` from a random ``folder/source``.

    Args:
        scheme: of the layers in the blocks; a function gives it by full name (None: unquantized).
        outside: layers outside the blocks that are quantized like the first of those inside.
    """
    source = load_source(str(save_source(folder / "source", config, dtype)), trust_remote_code=False)
    return write(folder / "out", source, scheme, formats, outside=outside, kv_cache=kv_cache)


def write(
    out: Path,
    source: Source,
    scheme: str | Callable[[str], str | None],
    formats: Sequence[str],
    *,
    outside: Sequence[str] = (),
    kv_cache: KVCache | None = None,
) -> Exported:
    blocks = find_blocks(source.model)
    schemes: dict[str, QuantScheme] = {}
    for block in blocks:
        for name in block.linears():
            chosen = scheme if isinstance(scheme, str) else scheme(f"{block.name}.{name}")
            if chosen is not None:
                schemes[f"{block.name}.{name}"] = QuantScheme.parse(chosen)
    first = next(iter(schemes.values()))
    schemes |= dict.fromkeys(outside, first)
    linears = [name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)]
    manifest = Manifest(
        schemes=schemes, ignore=tuple(name for name in linears if name not in schemes), kv_cache=kv_cache
    )
    weights = {name: _rounded(source, name, scheme) for name, scheme in schemes.items()}
    with CheckpointWriter(out, source, blocks, manifest, formats) as writer:
        for index, block in enumerate(blocks):
            prefix = f"{block.name}."
            inside = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
            scales = {
                f"{name}.{kind.activations.static}": torch.tensor([STATIC[kind.activations.static] * 2.0**index])
                for name, kind in schemes.items()
                if name in inside and kind.activations and kind.activations.static
            }
            if kv_cache:
                scales |= {f"{prefix}self_attn.{letter}_scale": torch.tensor([0.25 + index]) for letter in "kvq"}
            writer.write_block(index, {name.removeprefix(prefix): weight for name, weight in inside.items()}, scales)
        writer.write_outside({name: weights[name] for name in outside}, {})
        writer.complete({"made_by": "a test"})
        writer.publish({"seconds": 0})
    return Exported(out, source.folder, weights)


def _rounded(source: Source, name: str, scheme: QuantScheme) -> QuantizedWeight:
    return quantize(source.model.get_submodule(name).weight.detach(), scheme.weights)


def as_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def train_tokenizer(folder: Path, kind: str, texts: Sequence[str]) -> None:
    """A BPE tokenizer.json that splits text as ``kind``, llama.cpp's name, says; "default": text with byte fallback."""
    fallback = kind == "default"
    tokenizer = Tokenizer(
        models.BPE(byte_fallback=fallback, unk_token="<unk>" if fallback else None, fuse_unk=fallback)
    )
    special = ["<s>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if fallback:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # in training only
    else:
        splits = {name: regex for regex, name in _SPLITS.items()}
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt-2")]
        if kind in splits:
            steps.insert(0, pre_tokenizers.Split(Regex(splits[kind]), "isolated"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if fallback:
        tokenizer.pre_tokenizer = None
    content = json.loads(tokenizer.to_str())
    if fallback:  # as in Llama 2: pieces of the vocabulary, not tokens that are cut out of the text
        content["added_tokens"] = content["added_tokens"][:3]
    content["model"]["ignore_merges"] = kind == "llama-bpe"
    (folder / "tokenizer.json").write_text(json.dumps(content))
