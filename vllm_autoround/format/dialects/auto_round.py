"""The auto-round dialect: one default scheme for every layer of the blocks, and ``extra_config`` for the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm_autoround.format import activations
from vllm_autoround.format.activations import ActivationType
from vllm_autoround.format.dialects.modules import (
    Modules,
    Shapes,
    group_size,
    kv_cache_by_shape,
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
from vllm_autoround.format.layouts import COMPRESSED_TENSORS
from vllm_autoround.format.manifest import KVCache, Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, WeightType

METHOD = "auto-round"
# How the tool tuned; also in the gptq and awq configs that it writes.
INFORMATIVE = {
    "amp", "autoround_version", "batch_size", "dataset", "enable_minmax_tuning", "enable_norm_bias_tuning",
    "enable_quanted_input", "gradient_accumulate_steps", "iters", "low_cpu_mem_usage", "low_gpu_mem_usage", "lr",
    "minmax_lr", "nsamples", "provider", "scale_dtype", "seqlen", "supported_types",
}  # fmt: skip
KV_KEYS = {
    "static_kv_dtype", "static_kv_granularity", "static_attention_dtype", "static_attention_granularity"
}  # fmt: skip
_SCHEME = {
    "bits", "group_size", "sym", "data_type", "act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic"
}  # fmt: skip
_BLOCKS = ("block_name_to_quantize", "to_quant_block_names")
_UNDERSTOOD = {
    "quant_method",
    "packing_format",
    "extra_config",
    "fmt",
    "activation_scheme",
    "weight_block_size",
    *_SCHEME,
    *_BLOCKS,
}
_KNOWN = _UNDERSTOOD | KV_KEYS | INFORMATIVE

# packing_format -> the layout of integers: auto_gptq stores zero points minus one, "auto_round" and gptqmodel do not.
_PACKINGS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_awq": "awq",
}
_WRITTEN = {
    "gptq": "auto_round:auto_gptq",
    "gptq_v2": "auto_round",
    "gptq_v2+g_idx": "auto_round:gptqmodel",
    "awq": "auto_round:auto_awq",
    "fp8_static": "auto_round:fp8_static",
    "fp8_block": "auto_round:fp8",
    COMPRESSED_TENSORS: "auto_round:llm_compressor",
}
_UNQUANTIZED = {"bits": 16, "act_bits": 16}
# Of an activation type: act_data_type, act_bits, act_group_size, act_dynamic.
_ACTIVATIONS: dict[ActivationType, tuple[str, int, int, bool]] = {
    activations.FP8_TENSOR: ("fp", 8, 0, False),
    activations.FP8_TOKEN: ("fp", 8, -1, True),
    activations.FP8_GROUP: ("fp", 8, 128, True),
    activations.NVFP4: ("nv_fp4_with_static_gs", 4, 16, True),
    activations.MXFP4: ("mx_fp", 4, 32, True),
    activations.MXFP8: ("mx_fp", 8, 32, True),
}


def read_config(config: Mapping[str, Any], shapes: Shapes | None = None) -> Manifest:
    """Read a ``quantization_config``; see `vllm_autoround.format.dialects.read_manifest`.

    Raises:
        ManifestError: a key, value or rule that is not understood or contradicts the tensors, by name.
    """
    refuse_unknown(config, _KNOWN)
    require_keys(config, "bits", "group_size")
    modules = require(shapes, METHOD)
    assert shapes is not None
    if config.get("fmt", "e4m3") != "e4m3":
        raise ManifestError(f"fmt {config['fmt']!r} is not supported, only e4m3")
    if config.get("weight_block_size") not in (None, config["group_size"]):
        raise ManifestError(f"weight_block_size {config['weight_block_size']} is not group_size {config['group_size']}")
    blocks, extra = _blocks(config), config.get("extra_config") or {}
    for rule, entry in extra.items():
        refuse_unknown(entry, _SCHEME, f"extra_config[{rule!r}]")
    layers = {}
    for layer in quantized(modules):
        rule = _rule(layer, extra, blocks, modules)
        if rule is None and not layer.startswith(blocks):
            raise ManifestError(
                f"{layer} is quantized, but it is neither in block_name_to_quantize ({', '.join(blocks)}) nor in "
                "extra_config"
            )
        own = extra.get(rule, {})  # null leaves the weights' defaults, but says that activations are not quantized
        settings = {**config, **{key: v for key, v in own.items() if v is not None or key.startswith("act_")}}
        layers[layer] = _scheme(layer, settings), _layout(layer, settings, modules)
    return manifest_of(
        layers, ignore=left_alone(modules), kv_cache=kv_cache(config, shapes), kv_scales=kv_scales(shapes)
    )


def write_config(manifest: Manifest) -> dict[str, Any]:
    """A ``quantization_config`` that auto-round reads.

    Raises:
        ManifestError: what the dialect cannot say, by name; layers whose tensors need two packing formats.
    """
    packings = {_WRITTEN.get(manifest.layout_name(layer), "") for layer in manifest.schemes}
    if len(packings) != 1 or "" in packings:
        layouts = sorted({manifest.layout_name(layer) for layer in manifest.schemes})
        raise ManifestError(f"a {METHOD} checkpoint has one packing_format, which cannot be of {', '.join(layouts)}")
    blocks = sorted({match[1] for layer in manifest.schemes if (match := re.match(r"(.*?)\.\d+\.", layer))})
    written = {layer: _settings(layer, scheme) for layer, scheme in manifest.schemes.items()}
    inside = [layer for layer in written if layer.startswith(tuple(blocks))] if blocks else []
    common = Counter(manifest.schemes[layer] for layer in inside or written).most_common(1)[0][0]
    default = _settings("the default", common)
    extra = {layer: settings for layer, settings in written.items() if layer not in inside or settings != default}
    extra |= {layer: dict(_UNQUANTIZED) for layer in manifest.ignore if blocks and layer.startswith(tuple(blocks))}
    config = {"quant_method": METHOD, "packing_format": packings.pop(), **default}
    config["block_name_to_quantize"] = ",".join(blocks)
    if extra:
        config["extra_config"] = extra
    if manifest.kv_cache:
        kind = "attention" if "q_scale" in manifest.kv_scales else "kv"
        config[f"static_{kind}_dtype"] = "fp8"
        config[f"static_{kind}_granularity"] = "tensor" if manifest.kv_cache == "fp8" else "head"
    if isinstance(common.weights, Float8):
        static = common.activations is activations.FP8_TENSOR
        config |= {"fmt": "e4m3", "activation_scheme": "static" if static else "dynamic"}
    require_survival(manifest, lambda shapes: read_config(config, shapes), METHOD)
    return config


def kv_cache(config: Mapping[str, Any], shapes: Shapes) -> KVCache | None:
    """The KV cache of the tool's `static_kv_dtype` and `static_attention_dtype`; without them, of the scales alone,
    which the tool's older releases left unannounced."""
    for kind in ("attention", "kv"):
        if (dtype := config.get(f"static_{kind}_dtype")) is not None:
            if dtype not in ("fp8", "float8_e4m3fn", "torch.float8_e4m3fn"):
                raise ManifestError(f"static_{kind}_dtype {dtype!r} is not supported, only fp8")
            granularity = config.get(f"static_{kind}_granularity", "tensor")
            if granularity not in ("tensor", "head"):
                raise ManifestError(f"static_{kind}_granularity {granularity!r} is not supported")
            return "fp8" if granularity == "tensor" else "fp8_per_head"
    return kv_cache_by_shape(shapes)


def _blocks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of the layers that the default scheme is for."""
    named = next((config[key] for key in _BLOCKS if config.get(key)), "")
    lists = named.split(",") if isinstance(named, str) else named
    flat = [name for entry in lists for name in ([entry] if isinstance(entry, str) else entry)]
    return tuple(name.strip() for name in flat) or ("",)


def _rule(layer: str, extra: Mapping[str, Any], blocks: tuple[str, ...], modules: Modules) -> str | None:
    """The key of extra_config that is about a layer: its name, else the first pattern that is found in it.

    A pattern that is found in some layer of the blocks is not about the layers outside of them.
    """
    if layer in extra:
        return layer
    for rule in extra:
        if rule in modules:
            continue
        try:
            if not re.search(rule, layer):
                continue
        except re.error as error:
            raise ManifestError(f"extra_config[{rule!r}] is not a regular expression: {error}") from error
        inside = layer.startswith(blocks)
        if inside or not any(re.search(rule, other) for other in modules if other.startswith(blocks)):
            return rule
    return None


def _scheme(layer: str, settings: Mapping[str, Any]) -> QuantScheme:
    """The scheme of one layer from its settings, defaults and own ones together."""
    try:
        weights = _weight_type(layer, settings)
    except SchemeError as error:
        raise ManifestError(f"{layer}: {error}") from error
    bits = settings.get("act_bits") or 16
    if bits >= 16:
        return QuantScheme(weights)
    for activation, values in _ACTIVATIONS.items():
        wanted = dict(zip(("act_data_type", "act_bits", "act_group_size", "act_dynamic"), values, strict=True))
        if all(settings.get(key) == value for key, value in wanted.items()) and settings.get("act_sym") is not False:
            return QuantScheme(weights, activation)
    described = {key: settings.get(key) for key in sorted(_SCHEME) if key.startswith("act_")}
    raise ManifestError(f"{layer}: quantized activations of this kind are not supported: {described}")


def _weight_type(layer: str, settings: Mapping[str, Any]) -> WeightType:
    kind, bits, size = settings.get("data_type", "int"), settings["bits"], settings["group_size"]
    if bits >= 16:
        raise ManifestError(f"{layer} has 16 bits in the config, but its tensors are quantized")
    if kind == "int":
        return Integer(bits=bits, group_size=group_size(size), symmetric=settings.get("sym", True))
    if settings.get("sym") is False:
        raise ManifestError(f"{layer}: asymmetric {kind} weights are not supported")
    if kind in ("fp", "fp8", "fp8_e4m3") and bits == 8:
        if isinstance(size, (list, tuple)) and list(size) == [128, 128]:
            return Float8(strategy="block")
        if size in (-1, 0):
            return Float8(strategy="channel" if size == -1 else "tensor")
    if kind in ("mx_fp", "mx_fp_rceil") and bits in (4, 8) and size == 32:  # rceil: how the exponents were chosen
        return Mx(bits=bits)
    if kind == "nv_fp" and bits == 4 and size == 16:
        return NvFp4()
    raise ManifestError(f"{layer}: data_type {kind!r} of {bits} bits with group_size {size} is not supported")


def _layout(layer: str, settings: Mapping[str, Any], modules: Modules) -> str:
    """The layout of a layer's tensors: integers by packing_format, the others by what they are."""
    tensors, packing = modules[layer], settings.get("packing_format")
    if settings.get("data_type", "int") == "int":
        if packing not in _PACKINGS:
            raise ManifestError(f"packing_format {packing!r} is not understood; known are {', '.join(_PACKINGS)}")
        with_groups = "g_idx" in tensors and packing != "auto_round:auto_awq"
        return _PACKINGS[packing] + ("+g_idx" if with_groups else "")
    if "weight_scale_inv" in tensors:
        return "fp8_block"
    one_dimensional = len(tensors.get("weight_scale", ())) < 2
    return "fp8_static" if one_dimensional else COMPRESSED_TENSORS


def _settings(layer: str, scheme: QuantScheme) -> dict[str, Any]:
    """The inverse of `_scheme`."""
    settings: dict[str, Any]
    match scheme.weights:
        case Integer(bits=bits, group_size=size, symmetric=symmetric):
            if scheme.activations is not None:
                raise ManifestError(f"{layer}: a {METHOD} config cannot say {scheme}")
            return {"bits": bits, "group_size": size or -1, "sym": symmetric, "data_type": "int"}
        case Float8(strategy=strategy):
            sizes: dict[str, Any] = {"channel": -1, "tensor": 0, "block": [128, 128]}
            settings = {"bits": 8, "group_size": sizes[strategy], "sym": True, "data_type": "fp"}
        case Mx(bits=bits):
            settings = {"bits": bits, "group_size": 32, "sym": True, "data_type": "mx_fp"}
        case _:
            settings = {"bits": 4, "group_size": 16, "sym": True, "data_type": "nv_fp"}
    if scheme.activations is None:
        return {**settings, "act_bits": 16}
    kind, act_bits, act_size, dynamic = _ACTIVATIONS[scheme.activations]
    return settings | {
        "act_bits": act_bits,
        "act_data_type": kind,
        "act_group_size": act_size,
        "act_sym": True,
        "act_dynamic": dynamic,
    }
