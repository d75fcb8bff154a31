"""The GPTQ dialect: AutoGPTQ, GPTQModel, and auto-round's auto_gptq export."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm_autoround.format.dialects import auto_round
from vllm_autoround.format.dialects.modules import (
    Shapes,
    group_size,
    kv_scales,
    left_alone,
    manifest_of,
    quantized,
    refuse_unknown,
    require,
    require_keys,
    require_survival,
)
from vllm_autoround.format.errors import ManifestError, SchemeError
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

METHOD = "gptq"
_FORMATS = ("gptq", "gptq_v2")  # v1 stores zero points minus one
_BITS = (2, 3, 4, 8)
_RULE = {"bits", "group_size", "sym", "desc_act"}  # what a rule of `dynamic` may change
_UNDERSTOOD = {
    *_RULE, "quant_method", "checkpoint_format", "format", "dynamic", "static_groups", "data_type", "pack_dtype"
}  # fmt: skip
# Which layers are quantized is what their tensors say; the rest is how the tools work.
INFORMATIVE = auto_round.INFORMATIVE | {
    "act_group_aware", "backend", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment",
    "damp_percent", "disable_exllama", "exllama_config", "lm_head", "max_input_length", "meta",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "mse", "pad_token_id", "tokenizer", "true_sequential", "use_cuda_fp16",
    "use_exllama",
}  # fmt: skip
_KNOWN = _UNDERSTOOD | auto_round.KV_KEYS | INFORMATIVE


def read_config(config: Mapping[str, Any], shapes: Shapes | None = None) -> Manifest:
    """Read a ``quantization_config``; see `vllm_autoround.format.dialects.read_manifest`.

    Raises:
        ManifestError: a key, value or rule that is not understood or contradicts the tensors, by name.
    """
    refuse_unknown(config, _KNOWN)
    require_keys(config, "bits", "group_size", "sym")
    modules = require(shapes, METHOD)
    assert shapes is not None
    for key, expected in (("data_type", "int"), ("pack_dtype", "int32")):
        if config.get(key, expected) != expected:
            raise ManifestError(f"{key} {config[key]!r} is not supported, only {expected}")
    format_, dynamic = _format(config), config.get("dynamic") or {}
    layers = {}
    for layer in quantized(modules):
        settings = {**config, **_override(layer, dynamic)}
        layout = format_ + ("+g_idx" if "g_idx" in modules[layer] else "")
        layers[layer] = _scheme(layer, settings), layout
    cache = auto_round.kv_cache(config, {})
    return manifest_of(layers, ignore=left_alone(modules), kv_cache=cache, kv_scales=kv_scales(shapes))


def write_config(manifest: Manifest) -> dict[str, Any]:
    """A ``quantization_config`` that GPTQ's readers understand.

    Raises:
        ManifestError: what the dialect cannot say, by name.
    """
    formats = {manifest.layout_name(layer).removesuffix("+g_idx") for layer in manifest.schemes}
    if len(formats) != 1 or not formats <= set(_FORMATS):
        raise ManifestError(f"a {METHOD} checkpoint has gptq or gptq_v2 tensors, not {', '.join(sorted(formats))}")
    if manifest.kv_cache:
        raise ManifestError(f"a {METHOD} config cannot announce KV-cache scales; use compressed-tensors")
    settings = {layer: _settings(layer, scheme) for layer, scheme in manifest.schemes.items()}
    common = Counter(manifest.schemes.values()).most_common(1)[0][0]
    default = _settings("the default", common)
    dynamic = {f"+:^{re.escape(layer)}$": own for layer, own in settings.items() if own != default}
    dynamic |= {f"-:^{re.escape(layer)}$": {} for layer in manifest.ignore if _in_block(layer)}
    config = {
        "quant_method": METHOD,
        "checkpoint_format": formats.pop(),
        **default,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": "lm_head" in manifest.schemes,
    }
    if dynamic:
        config["dynamic"] = dynamic
    require_survival(manifest, lambda shapes: read_config(config, shapes), METHOD)
    return config


def _format(config: Mapping[str, Any]) -> str:
    """gptq or gptq_v2; a config without it is older than v2."""
    named = {config[key] for key in ("checkpoint_format", "format") if config.get(key)}
    if len(named) > 1:
        raise ManifestError(f"checkpoint_format and format disagree: {', '.join(map(repr, sorted(named)))}")
    format_ = named.pop() if named else "gptq"
    if format_ not in _FORMATS:
        raise ManifestError(f"checkpoint_format {format_!r} is not understood; known are {', '.join(_FORMATS)}")
    return format_


def _override(layer: str, dynamic: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the first rule that matches a layer changes."""
    for pattern, changes in dynamic.items():
        try:
            matches = re.match(pattern.removeprefix("+:").removeprefix("-:"), layer)
        except re.error as error:
            raise ManifestError(f"dynamic[{pattern!r}] is not a regular expression: {error}") from error
        if matches and pattern.startswith("-:"):
            raise ManifestError(f"dynamic[{pattern!r}] leaves {layer} unquantized, but its tensors are quantized")
        if matches:
            refuse_unknown(changes, _RULE, f"dynamic[{pattern!r}]")
            return changes
    return {}


def _scheme(layer: str, settings: Mapping[str, Any]) -> QuantScheme:
    size = group_size(settings["group_size"])
    if settings.get("desc_act") and size is not None and not settings.get("static_groups"):
        raise ManifestError(
            f"{layer}: desc_act is true, so that input features are assigned to groups out of order (act-order), which "
            "is not supported: every group would have to be gathered; quantize again with desc_act=False (or "
            "static_groups=True), or serve the checkpoint without this plugin"
        )
    try:
        return QuantScheme(Integer(bits=settings["bits"], group_size=size, symmetric=settings["sym"]))
    except SchemeError as error:
        raise ManifestError(f"{layer}: {error}") from error


def _settings(layer: str, scheme: QuantScheme) -> dict[str, Any]:
    """The inverse of `_scheme`."""
    weights = scheme.weights
    if not isinstance(weights, Integer) or scheme.activations is not None or weights.bits not in _BITS:
        bits = ", ".join(map(str, _BITS))
        raise ManifestError(f"{layer}: a {METHOD} config cannot say {scheme}; only {bits} bits with 16-bit activations")
    return {"bits": weights.bits, "group_size": weights.group_size or -1, "sym": weights.symmetric}


def _in_block(layer: str) -> bool:
    """Whether readers take a layer for quantized unless told otherwise."""
    return re.search(r"\.\d+\.", layer) is not None
