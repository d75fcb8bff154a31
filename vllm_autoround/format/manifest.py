"""Manifest: which layer is quantized how. Read from and written to a compressed-tensors ``quantization_config``.

Layers are named in full, one config group per distinct scheme. Class names and regular expressions are not used in
what is written, because vLLM matches them against its own fused module names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from pydantic import ValidationError

from vllm_autoround.format.errors import ManifestError, SchemeError
from vllm_autoround.format.scheme import QuantScheme

MARKER = "vllm_autoround"  # our key at the top level of config.json
FORMAT_VERSION = 1
KV_SCALES = ("k_scale", "v_scale", "q_scale")

_PACKED = "pack-quantized"
_UNDERSTOOD = {"quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme"}
# Say nothing about what the weights mean; the last two are added by vLLM.
_INFORMATIVE = {"global_compression_ratio", "version", "run_compressed", "total_num_heads", "total_num_kv_heads"}
_ARGS_INFORMATIVE = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Layer -> scheme, and the scheme of the KV cache."""

    schemes: Mapping[str, QuantScheme]  # full module name -> scheme
    ignore: tuple[str, ...] = ()  # linear layers left as they were
    kv_cache: Literal["fp8"] | None = None  # fp8: e4m3, one static scale per tensor

    def layer_tensors(self) -> set[str]:
        """Names of every tensor that the quantized layers need."""
        return {
            f"{layer}.{suffix}"
            for layer, scheme in self.schemes.items()
            for suffix in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
            if suffix != "weight_zero_point" or not scheme.symmetric
        }


def to_compressed_tensors(manifest: Manifest) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, validated by compressed-tensors' own classes.

    Only keys that every supported compressed-tensors release knows are written: its classes forbid unknown ones.
    """
    layers_of: dict[QuantScheme, list[str]] = {}
    for layer, scheme in manifest.schemes.items():
        layers_of.setdefault(scheme, []).append(layer)
    config = {
        "quant_method": "compressed-tensors",
        "format": _PACKED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": layers,
                "weights": _weight_args(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": _PACKED,
            }
            for index, (scheme, layers) in enumerate(layers_of.items())
        },
        "ignore": list(manifest.ignore),
        "kv_cache_scheme": _KV_FP8 if manifest.kv_cache else None,
    }
    if from_compressed_tensors(config) != manifest:
        raise ManifestError(f"{manifest} does not survive the way through compressed-tensors")
    return config


def from_compressed_tensors(config: Mapping[str, Any]) -> Manifest:
    """Read a ``quantization_config``.

    Raises:
        ManifestError: a key or value that is not understood, by name.
    """
    parsed = _parse(config)
    ignore = tuple(parsed.ignore or ())
    schemes: dict[str, QuantScheme] = {}
    for group_name, group in parsed.config_groups.items():
        _check_targets([*group.targets, *ignore])
        if group.input_activations or group.output_activations:
            raise ManifestError(f"{group_name}: quantized activations are not supported")
        if (group.format or parsed.format) != _PACKED:
            raise ManifestError(f"{group_name}: format must be {_PACKED!r}, got {group.format or parsed.format!r}")
        scheme = _weight_scheme(group_name, group.weights)
        for layer in group.targets:
            if layer in schemes or layer in ignore:
                raise ManifestError(f"{layer} is named twice, in {group_name} and in another group or in ignore")
            schemes[layer] = scheme
    return Manifest(schemes=schemes, ignore=ignore, kv_cache=_kv_cache(parsed.kv_cache_scheme))


def verify_tensors(manifest: Manifest, names: Collection[str]) -> None:
    """Compare the tensors of a checkpoint with what its manifest promises, by name.

    Raises:
        ManifestError: a promised tensor that is missing, a quantized one that no layer claims, an attention layer
            with only some of its scales, or KV-cache scales without a KV-cache scheme.
    """
    needed, found = manifest.layer_tensors(), set(names)
    if missing := sorted(needed - found):
        raise ManifestError(f"{len(missing)} promised tensors are missing, the first is {missing[0]}")
    suffixes = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")
    if unclaimed := sorted(name for name in found - needed if name.endswith(suffixes)):
        raise ManifestError(f"{len(unclaimed)} tensors belong to no quantized layer, the first is {unclaimed[0]}")

    scales = {name for name in found if name.rpartition(".")[2] in KV_SCALES}
    if scales and not manifest.kv_cache:
        raise ManifestError(f"{min(scales)} is there but kv_cache_scheme is not: the scales would find no home")
    if manifest.kv_cache and not scales:
        raise ManifestError("kv_cache_scheme promises KV-cache scales, but there are none")
    for attention in sorted({name.rpartition(".")[0] for name in scales}):
        if missing := [scale for scale in KV_SCALES if f"{attention}.{scale}" not in scales]:
            raise ManifestError(f"{attention} has KV-cache scales but lacks {' and '.join(missing)}")


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


_KV_FP8: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}


def _weight_args(scheme: QuantScheme) -> dict[str, Any]:
    grouping = (
        {"strategy": "channel"} if scheme.group_size is None else {"strategy": "group", "group_size": scheme.group_size}
    )
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False, **grouping}


def _weight_scheme(group_name: str, args: QuantizationArgs | None) -> QuantScheme:
    if args is None:
        raise ManifestError(f"{group_name} does not quantize weights")
    try:
        group_size = args.group_size if args.strategy == "group" else None
        scheme = QuantScheme(bits=args.num_bits, group_size=group_size, symmetric=args.symmetric)
    except SchemeError as error:
        raise ManifestError(f"{group_name}: {error}") from error
    _check_args(f"{group_name}.weights", args, _weight_args(scheme))
    return scheme


def _kv_cache(args: QuantizationArgs | None) -> Literal["fp8"] | None:
    if args is None:
        return None
    _check_args("kv_cache_scheme", args, _KV_FP8)
    return "fp8"


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
