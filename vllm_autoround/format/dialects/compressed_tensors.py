"""The compressed-tensors dialect, in which our own checkpoints are written.

What is written names layers in full, one config group per distinct scheme, without class names and regular
expressions: vLLM matches those against its own fused module names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from pydantic import ValidationError

from vllm_autoround.format.activations import ACTIVATION_TYPES, ActivationType
from vllm_autoround.format.errors import ManifestError, SchemeError
from vllm_autoround.format.manifest import KVCache, Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Float8, Integer, Mx, NvFp4, WeightType

_MIXED = "mixed-precision"
_UNDERSTOOD = {"quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme"}
# Say nothing about what the weights mean; the last two are added by vLLM.
_INFORMATIVE = {"global_compression_ratio", "version", "run_compressed", "total_num_heads", "total_num_kv_heads"}
_ARGS_INFORMATIVE = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_KV_STRATEGIES: dict[KVCache, str] = {"fp8": "tensor", "fp8_per_head": "attn_head"}


def write_config(manifest: Manifest) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, validated by compressed-tensors' own classes.

    Only keys that every supported compressed-tensors release knows are written: its classes forbid unknown ones.
    """
    layers_of: dict[QuantScheme, list[str]] = {}
    for layer, scheme in manifest.schemes.items():
        layers_of.setdefault(scheme, []).append(layer)
    formats = {scheme.weights.format for scheme in layers_of}
    config = {
        "quant_method": "compressed-tensors",
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
    }
    if read_config(config) != manifest:
        raise ManifestError(f"{manifest} does not survive the way through compressed-tensors")
    return config


def read_config(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Manifest:
    """Read a ``quantization_config``; see `vllm_autoround.format.dialects.read_manifest`.

    Raises:
        ManifestError: a key or value that is not understood, by name.
    """
    parsed = _parse(config)
    ignore = tuple(parsed.ignore or ())
    schemes: dict[str, QuantScheme] = {}
    for group_name, group in parsed.config_groups.items():
        _check_targets([*group.targets, *ignore])
        scheme = _scheme(group_name, group)
        if (group.format or parsed.format) != scheme.weights.format:
            raise ManifestError(
                f"{group_name}: format must be {scheme.weights.format!r}, got {group.format or parsed.format!r}"
            )
        for layer in group.targets:
            if layer in schemes or layer in ignore:
                raise ManifestError(f"{layer} is named twice, in {group_name} and in another group or in ignore")
            schemes[layer] = scheme
    return Manifest(schemes=schemes, ignore=ignore, kv_cache=_kv_cache(parsed.kv_cache_scheme))


def _parse(config: Mapping[str, Any]) -> QuantizationConfig:
    """Let compressed-tensors validate the config, and refuse what its classes would silently ignore."""
    for key in config.keys() - _UNDERSTOOD - _INFORMATIVE:
        if config[key]:  # an empty or null extension changes nothing
            raise ManifestError(f"quantization_config has the unknown key {key!r}; refusing to guess what it changes")
    if config.get("quant_method") != "compressed-tensors":
        raise ManifestError(f"quant_method must be 'compressed-tensors', got {config.get('quant_method')!r}")
    if config.get("quantization_status", "compressed") != "compressed":
        raise ManifestError(f"quantization_status is {config['quantization_status']!r}: not a compressed checkpoint")
    try:
        return QuantizationConfig.model_validate(dict(config))
    except (ValidationError, NotImplementedError) as error:
        raise ManifestError(f"compressed-tensors rejects quantization_config: {error}") from error


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
    raise ManifestError(
        f"{group_name}.input_activations are not supported: {args.model_dump(exclude_none=True, exclude_defaults=True)}"
    )


def _kv_args(kv_cache: KVCache) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "strategy": _KV_STRATEGIES[kv_cache],
        "symmetric": True,
        "dynamic": False,
    }


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
        if field not in _ARGS_INFORMATIVE and getattr(args, field) != getattr(reference, field):
            raise ManifestError(
                f"{where}.{field} = {getattr(args, field)!r} is not supported (expected {getattr(reference, field)!r})"
            )


def _check_targets(targets: Collection[str]) -> None:
    for target in targets:
        if target.startswith("re:") or target[:1].isupper():
            raise ManifestError(f"target {target!r} is a pattern or a class; only full module names are understood")
