"""The AWQ dialect: AutoAWQ's gemm version, and auto-round's auto_awq export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_autoround.format.dialects import auto_round, gptq
from vllm_autoround.format.dialects.modules import (
    Shapes,
    group_size,
    kv_scales,
    left_alone,
    manifest_of,
    quantized,
    refuse_unknown,
    require,
    require_survival,
)
from vllm_autoround.format.errors import ManifestError, SchemeError
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

METHOD = "awq"
_BITS, _LAYOUT, _VERSION = 4, "awq", "gemm"
_UNDERSTOOD = {
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "sym", "data_type"
}  # fmt: skip
# Which layers are quantized is what their tensors say: readers match modules_to_not_convert in different ways.
# transformers writes the keys of its GPTQ config too, with their defaults; sym is one of them, zero_point decides.
_INFORMATIVE = gptq.INFORMATIVE | {
    "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert", "to_quant_block_names"
}  # fmt: skip
_KNOWN = _UNDERSTOOD | auto_round.KV_KEYS | _INFORMATIVE


def read_config(config: Mapping[str, Any], shapes: Shapes | None = None) -> Manifest:
    """Read a ``quantization_config``; see `vllm_autoround.format.dialects.read_manifest`.

    Raises:
        ManifestError: a key or value that is not understood, by name.
    """
    refuse_unknown(config, _KNOWN)
    modules = require(shapes, METHOD)
    assert shapes is not None
    for key in ("version", "format"):
        if (version := str(config.get(key) or _VERSION).lower()) != _VERSION:
            raise ManifestError(f"{key} {version!r} is not supported, only {_VERSION}: others order words otherwise")
    if config.get("data_type", "int") != "int":
        raise ManifestError(f"data_type {config['data_type']!r} is not supported, only int")
    try:
        scheme = QuantScheme(
            Integer(
                bits=config.get("bits", config.get("w_bit", _BITS)),
                group_size=group_size(config.get("group_size", config.get("q_group_size", 128))),
                symmetric=not config.get("zero_point", True),
            )
        )
    except SchemeError as error:
        raise ManifestError(f"quantization_config: {error}") from error
    layers = {layer: (scheme, _LAYOUT) for layer in quantized(modules)}
    cache = auto_round.kv_cache(config, {})
    return manifest_of(layers, ignore=left_alone(modules), kv_cache=cache, kv_scales=kv_scales(shapes))


def write_config(manifest: Manifest) -> dict[str, Any]:
    """A ``quantization_config`` that AWQ's readers understand.

    Raises:
        ManifestError: what the dialect cannot say, by name: one asymmetric 4-bit scheme in groups is all it has.
    """
    schemes = set(manifest.schemes.values())
    if len(schemes) != 1:
        listed = "; ".join(sorted(map(str, schemes)))
        raise ManifestError(f"an {METHOD} checkpoint has one scheme for every layer, not {listed or 'none'}")
    (scheme,) = schemes
    weights = scheme.weights
    fits = isinstance(weights, Integer) and weights.bits == _BITS and scheme.activations is None
    if not fits or not isinstance(weights, Integer) or weights.symmetric or weights.group_size is None:
        raise ManifestError(
            f"an {METHOD} config cannot say {scheme}; only 4 bits with zero points, in groups, with 16-bit activations "
            "(a symmetric weight is an asymmetric one whose zero points are all 8)"
        )
    if {manifest.layout_name(layer) for layer in manifest.schemes} != {_LAYOUT}:
        raise ManifestError(f"an {METHOD} checkpoint has awq tensors only")
    if manifest.kv_cache:
        raise ManifestError(f"an {METHOD} config cannot announce KV-cache scales; use compressed-tensors")
    for layer in manifest.schemes:
        if (ignored := next((name for name in manifest.ignore if name in layer), None)) is not None:
            raise ManifestError(
                f"{ignored} is left unquantized, but readers of {METHOD} would skip {layer} too, whose name contains it"
            )
    config = {
        "quant_method": METHOD,
        "bits": _BITS,
        "group_size": weights.group_size,
        "zero_point": True,
        "version": _VERSION,
        "modules_to_not_convert": list(manifest.ignore),
    }
    require_survival(manifest, lambda shapes: read_config(config, shapes), METHOD)
    return config
