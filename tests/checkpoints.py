"""Checkpoints rounded to nearest, in any mixture of schemes: what the serving tests load, made in a second."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor

from vllm_autoround.format.dialects.compressed_tensors import write_config
from vllm_autoround.format.layouts import COMPRESSED_TENSORS
from vllm_autoround.format.manifest import FORMAT_VERSION, MARKER, KVCache, Manifest
from vllm_autoround.format.reader import read_tensors
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import QuantizedWeight, quantize

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM


def linear_layers(source: Path) -> list[str]:
    """The linear layers inside the blocks of an unquantized checkpoint, by full name."""
    names = sorted(name.removesuffix(".weight") for name, _ in read_tensors(source, ("_proj.weight",)))
    assert names
    return names


def write_rtn_checkpoint(
    source: Path,
    out: Path,
    schemes: Mapping[str, QuantScheme],
    layout: str = COMPRESSED_TENSORS,
    kv_cache: KVCache | None = None,
    quantization_config: Mapping[str, Any] | None = None,
) -> Path:
    """Round the layers of ``schemes`` (full name -> scheme) to nearest; static scales come from random tokens.

    lm_head and model.embed_tokens may be among them, also where the source ties them: then they are untied.

    Args:
        layout: of every layer, in `vllm_autoround.format.layouts.LAYOUTS`.
        quantization_config: of config.json; None: ours, in the compressed-tensors dialect.

    Returns:
        ``out``, with the source's tokenizer beside the weights.
    """
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and not path.match("*.safetensors*"):
            shutil.copyfile(path, out / path.name)
    state, config = dict(read_tensors(source)), json.loads((source / "config.json").read_text())
    if config["tie_word_embeddings"] and not {HEAD, EMBEDDING}.isdisjoint(schemes):
        config["tie_word_embeddings"] = False
        state[f"{HEAD}.weight"] = state[f"{EMBEDDING}.weight"].clone()

    manifest = Manifest(schemes=dict(schemes), kv_cache=kv_cache, layout=layout)
    for name, weight in rounded(state, schemes).items():
        del state[f"{name}.weight"]
        tensors = manifest.layout_of(name).to_tensors(weight)
        state |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    state |= _static_scales(source, schemes)
    if kv_cache:
        state |= _kv_scales(source, config, per_head=kv_cache == "fp8_per_head")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})

    config["quantization_config"] = dict(quantization_config or write_config(manifest))
    config[MARKER] = {"format_version": FORMAT_VERSION}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def rounded(state: Mapping[str, Tensor], schemes: Mapping[str, QuantScheme]) -> dict[str, QuantizedWeight]:
    """Every layer of ``schemes``, rounded to nearest; layers that vLLM fuses share their global scale."""
    amax = {layer: state[f"{layer}.weight"].float().abs().amax() for layer in schemes}
    weights = {}
    for layer, scheme in schemes.items():
        parent, _, name = layer.rpartition(".")
        shards = [f"{parent}.{shard}" for shards in FUSED if name in shards for shard in shards]
        same = [amax[shard] for shard in shards or [layer] if schemes.get(shard) == scheme]
        shared = scheme.weights.global_scale(torch.stack(same).amax())
        weights[layer] = quantize(state[f"{layer}.weight"], scheme.weights, shared)
    return weights


@torch.no_grad()
def _run(source: Path, watch: Callable[[str, Tensor, Tensor], None]) -> None:
    """Random tokens through the unquantized model; ``watch`` sees every linear layer's name, input and output."""
    model = tf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: watch(name, inputs[0], output)  # type: ignore[misc]
            )
    generator = torch.Generator().manual_seed(0)
    model(torch.randint(0, model.config.vocab_size, (4, 64), generator=generator))


def _static_scales(source: Path, schemes: Mapping[str, QuantScheme]) -> dict[str, Tensor]:
    """The checkpoint's scalar of every layer whose activations have one."""
    wanted = {layer: scheme.activations for layer, scheme in schemes.items() if scheme.activations is not None}
    scales: dict[str, Tensor] = {}

    def watch(layer: str, x: Tensor, _: Tensor) -> None:
        if layer in wanted and (scale := wanted[layer].calibrated(x.abs().amax())) is not None:
            scales[f"{layer}.{wanted[layer].static}"] = scale

    if any(activations.static for activations in wanted.values()):
        _run(source, watch)
    return scales


def _kv_scales(source: Path, config: Mapping[str, Any], *, per_head: bool) -> dict[str, Tensor]:
    """q, k and v scales [1], or [heads, 1, 1]; rotating a pair of features makes none larger than sqrt(2) times."""
    scales: dict[str, Tensor] = {}

    def watch(layer: str, _: Tensor, output: Tensor) -> None:
        attention, _, name = layer.rpartition(".")
        if name in ("q_proj", "k_proj", "v_proj"):
            heads = output.unflatten(-1, (-1, config["head_dim"])).abs().amax((0, 1, 3))
            scale = heads * (1 if name == "v_proj" else math.sqrt(2)) / 448
            scales[f"{attention}.{name[0]}_scale"] = scale.reshape(-1, 1, 1) if per_head else scale.amax().reshape(1)

    _run(source, watch)
    return scales
