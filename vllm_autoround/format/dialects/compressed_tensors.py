"""The compressed-tensors dialect, in which our own checkpoints are written, and llm-compressor's.

What is written names layers in full, one config group per distinct scheme, without class names and regular
expressions: vLLM matches those against its own fused module names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from pydantic import ValidationError

from vllm_autoround.format.activations import ACTIVATION_TYPES, FP8_TENSOR, ActivationType
from vllm_autoround.format.dialects import dense, targets
from vllm_autoround.format.dialects.modules import Shapes, kv_scales, left_alone, modules_of, refuse_unknown
from vllm_autoround.format.errors import ManifestError, SchemeError
from vllm_autoround.format.layouts import COMPRESSED_TENSORS
from vllm_autoround.format.manifest import KV_SCALES, KVCache, Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, WeightType

METHOD = "compressed-tensors"
_MIXED = "mixed-precision"
# The release whose words ours are: from 0.18 on, codes of 3, 5, 6 and 7 bits are dense. The key is the library's own.
_VERSION = "0.19.0"
_UNDERSTOOD = {
    "quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme", "version"
}  # fmt: skip
# Say nothing about what the weights mean; the last two are added by vLLM.
_INFORMATIVE = {"global_compression_ratio", "provider", "run_compressed", "total_num_heads", "total_num_kv_heads"}
_ARGS_INFORMATIVE = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_ATTENTION = "attention_input_activations"  # auto-round's group of attention layers, which is not among the others
_KV_STRATEGIES: dict[KVCache, str] = {"fp8": "tensor", "fp8_per_head": "attn_head"}
_INT_QUANTIZED = "int-quantized"
_NAIVE = "naive-quantized"  # the same tensors, under the name that the library gives to what it has no other for
_ORDERED = ("weight", "static")  # activation ordering that is undone before the weights are written


def write_config(manifest: Manifest) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, validated by compressed-tensors' own classes.

    Only keys that every supported compressed-tensors release knows are written: its classes forbid unknown ones.

    Raises:
        ManifestError: layers in another layout than this dialect's.
    """
    layers_of: dict[QuantScheme, list[str]] = {}
    for layer, scheme in manifest.schemes.items():
        if manifest.layout_name(layer) != COMPRESSED_TENSORS:
            raise ManifestError(
                f"{layer} has {manifest.layout_name(layer)} tensors, which are written in no such config"
            )
        layers_of.setdefault(scheme, []).append(layer)
    formats = {scheme.weights.format for scheme in layers_of}
    config = {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": layers,
                "weights": scheme.weights.args(),
                "input_activations": None if scheme.activations is None else scheme.activations.args(),
                "output_activations": None,
                "format": scheme.weights.format,
            }
            for index, (scheme, layers) in enumerate(layers_of.items())
        },
        "ignore": list(manifest.ignore),
        "kv_cache_scheme": manifest.kv_cache and _kv_args(manifest.kv_cache),
        "version": _VERSION,
    }
    if read_config(config) != replace(manifest, kv_scales=KV_SCALES):
        raise ManifestError(f"{manifest} does not survive the way through compressed-tensors")
    return config


def read_config(config: Mapping[str, Any], shapes: Shapes | None = None) -> Manifest:
    """Read a ``quantization_config``; see `vllm_autoround.format.dialects.read_manifest`.

    Raises:
        ManifestError: a key or value that is not understood, by name; a layer whose words cannot be told.
    """
    parsed = _parse(config)
    kv_cache = _kv_cache(parsed.kv_cache_scheme)
    ignore = tuple(parsed.ignore or ())
    groups = {name: group for name, group in parsed.config_groups.items() if not _only_attention(name, group, kv_cache)}
    schemes = {name: _scheme(name, group) for name, group in groups.items()}
    layouts = {name: _layout(name, schemes[name], group.format or parsed.format) for name, group in groups.items()}
    group_of = _group_of(groups, ignore)
    modules = None if shapes is None else modules_of(shapes)
    if modules is None:
        targets.require_full_names([*group_of, *ignore])
    else:
        by_name = all(map(targets.is_full_name, [*group_of, *ignore]))
        group_of = targets.resolve(group_of, ignore, modules)
        ignore = ignore if by_name else left_alone(modules)
    found = {layer: schemes[group] for layer, group in group_of.items()}
    other = {layer: layouts[group] for layer, group in group_of.items() if layouts[group] != COMPRESSED_TENSORS}
    straddling = {layer: scheme for layer, scheme in found.items() if layer not in other and dense.straddles(scheme)}
    words = dense.layouts_of(straddling, modules, config.get("version"))
    other |= {layer: layout for layer, layout in words.items() if layout != COMPRESSED_TENSORS}
    return Manifest(
        schemes=found,
        ignore=ignore,
        kv_cache=kv_cache,
        kv_scales=KV_SCALES if shapes is None else kv_scales(shapes),
        other_layouts=other,
    )


def _parse(config: Mapping[str, Any]) -> QuantizationConfig:
    """Let compressed-tensors validate the config, and refuse what its classes would silently ignore."""
    refuse_unknown(config, _UNDERSTOOD | _INFORMATIVE | {_ATTENTION})
    if config.get("quantization_status", "compressed") != "compressed":
        raise ManifestError(f"quantization_status is {config['quantization_status']!r}: not a compressed checkpoint")
    attention = {_ATTENTION: config[_ATTENTION]} if config.get(_ATTENTION) else {}
    try:
        return QuantizationConfig.model_validate({**config, "config_groups": {**config["config_groups"], **attention}})
    except (ValidationError, NotImplementedError, KeyError, TypeError) as error:
        raise ManifestError(f"compressed-tensors rejects quantization_config: {error}") from error


def _group_of(groups: Mapping[str, Any], ignore: Iterable[str]) -> dict[str, str]:
    """Target -> config group; no target may be named twice."""
    group_of: dict[str, str] = {}
    for name, group in groups.items():
        for target in group.targets:
            if target in group_of or target in ignore:
                raise ManifestError(f"{target} is named twice, in {name} and in another group or in ignore")
            group_of[target] = name
    return group_of


def _only_attention(name: str, group: Any, kv_cache: KVCache | None) -> bool:
    """Whether a group quantizes the inputs of attention layers: queries, keys and values, as kv_cache_scheme does."""
    if group.weights is not None or group.output_activations or not group.input_activations:
        return False
    if kv_cache is None or not all(target.endswith("Attention") for target in group.targets):
        raise ManifestError(f"{name} quantizes activations without weights, and not as kv_cache_scheme does")
    _check_args(f"{name}.input_activations", group.input_activations, _kv_args(kv_cache))
    if name != _ATTENTION:
        raise ManifestError(
            f"{name} quantizes attention layers: llm-compressor (0.14), which writes such groups, never sets their "
            "q_scale, so that it is whatever was in memory; quantize again with kv_cache_scheme alone"
        )
    return True


def _scheme(group_name: str, group: Any) -> QuantScheme:
    """The scheme of a config group, every field of which must be understood."""
    if group.weights is None:
        raise ManifestError(f"{group_name} does not quantize weights")
    if group.output_activations:
        raise ManifestError(f"{group_name}: quantized output activations are not supported")
    try:
        weights = _weight_type(group.weights)
    except SchemeError as error:
        raise ManifestError(f"{group_name}: {error}") from error
    _check_args(f"{group_name}.weights", group.weights, weights.args())
    activations = None
    if group.input_activations is not None:
        activations = _activation_type(group_name, group.input_activations)
    return QuantScheme(weights, activations)


def _weight_type(args: QuantizationArgs) -> WeightType:
    if args.type == "int":
        group_size = args.group_size if args.strategy == "group" else None
        return Integer(bits=args.num_bits, group_size=group_size, symmetric=args.symmetric)
    if args.strategy == "tensor_group":
        return NvFp4()
    if args.strategy == "group" and args.num_bits in (4, 8):
        return Mx(bits=args.num_bits)
    if args.num_bits == 8 and args.strategy in ("channel", "tensor", "block"):
        return Float8(strategy=args.strategy)
    raise SchemeError(f"float weights of {args.num_bits} bits with strategy {args.strategy} are not supported")


def _activation_type(group_name: str, args: QuantizationArgs) -> ActivationType:
    for candidate in ACTIVATION_TYPES:
        try:
            _check_args(f"{group_name}.input_activations", args, candidate.args())
        except ManifestError:
            continue
        return candidate
    dumped = args.model_dump(mode="json")
    raise ManifestError(
        f"{group_name}: {args.num_bits}-bit {dumped['type']} input activations, "
        f"{'static' if args.dynamic is False else 'dynamic'} per {dumped['strategy']}, are not supported"
    )


def _layout(group_name: str, scheme: QuantScheme, format_: str) -> str:
    """The layout of a group's tensors by the format that it names."""
    if isinstance(scheme.weights, Integer) and format_ in (_INT_QUANTIZED, _NAIVE):
        return _INT_QUANTIZED
    if format_ != scheme.weights.format and not (isinstance(scheme.weights, Float8) and format_ == _NAIVE):
        raise ManifestError(f"{group_name}: format must be {scheme.weights.format!r}, got {format_!r}")
    return COMPRESSED_TENSORS


def _kv_args(kv_cache: KVCache) -> dict[str, Any]:
    return {**FP8_TENSOR.args(), "strategy": _KV_STRATEGIES[kv_cache]}


def _kv_cache(args: QuantizationArgs | None) -> KVCache | None:
    if args is None:
        return None
    kv_cache: KVCache = "fp8_per_head" if args.strategy == "attn_head" else "fp8"
    _check_args("kv_cache_scheme", args, _kv_args(kv_cache))
    return kv_cache


def _check_args(where: str, args: QuantizationArgs, supported: Mapping[str, Any]) -> None:
    """Every field of ``args`` must be informative or equal what we would have written (or the class's default)."""
    reference = QuantizationArgs.model_validate(dict(supported))
    for field in type(args).model_fields:
        value, expected = getattr(args, field), getattr(reference, field)
        same = value == expected or (field == "group_size" and value == -1 and expected is None)
        if field not in _ARGS_INFORMATIVE and not same and not (field == "actorder" and value in _ORDERED):
            raise ManifestError(f"{where}.{field} = {value!r} is not supported (expected {expected!r})")
