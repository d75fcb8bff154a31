"""What the shapes of a checkpoint's tensors say before their data is read: its modules, which of them are quantized,
and whether their tensors are those of the schemes that a config gives them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.layouts import COMPRESSED_TENSORS, LAYOUTS, LayerShapes
from vllm_autoround.format.manifest import KV_SCALES, KVCache, Manifest, verify_tensors
from vllm_autoround.format.scheme import QuantScheme

Shapes = Mapping[str, tuple[int, ...]]  # of every tensor in the checkpoint, by its full name
Modules = Mapping[str, LayerShapes]  # the same by module, then by suffix

_ROWS, _COLUMNS = 256, 768  # of an example layer that every group size and word divides
_MARKS = {"qweight", "weight_packed", "weight_scale", "weight_scale_inv"}  # each type has one of them


def modules_of(shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors' shapes by module and suffix."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = tuple(shape)
    return modules


def quantized(modules: Modules) -> list[str]:
    """The modules that have quantized tensors."""
    return [module for module, tensors in modules.items() if not _MARKS.isdisjoint(tensors)]


def left_alone(modules: Modules) -> tuple[str, ...]:
    """The linear layers that are not quantized: whatever else has a matrix for a weight, embeddings aside."""
    return tuple(
        sorted(
            module
            for module, tensors in modules.items()
            if _MARKS.isdisjoint(tensors) and len(tensors.get("weight", ())) == 2 and not is_embedding(module)
        )
    )


def is_embedding(module: str) -> bool:
    """Whether a module is an embedding rather than a linear layer, by its name, for want of anything better."""
    return re.search(r"embed|wte|wpe", module.rpartition(".")[2]) is not None


def known_sizes(modules: Modules) -> set[int]:
    """Feature counts of the model: of the unquantized tensors, and the outputs of the quantized layers."""
    sizes: set[int] = set()
    for tensors in modules.values():
        if _MARKS.isdisjoint(tensors):
            sizes.update(*tensors.values())
        elif "weight_packed" in tensors:
            sizes.add(tensors["weight_packed"][0])
    return sizes


def check_layer(layer: str, scheme: QuantScheme, layout: str, tensors: LayerShapes) -> None:
    """Compare the shapes of a layer's tensors with those of its scheme.

    Raises:
        ManifestError: one is missing or has another shape; a ragged last group.
    """
    try:
        rows, columns = LAYOUTS[layout].size(tensors, scheme)
        specs = LAYOUTS[layout].specs(scheme, rows, columns, torch.bfloat16)
    except KeyError as error:
        raise ManifestError(f"{layer}.{error.args[0]} is missing: the config promises {scheme}") from error
    except ValueError as error:
        raise ManifestError(f"{layer} ({layout} tensors): {error}") from error
    for suffix, spec in specs.items():
        if suffix not in tensors:
            raise ManifestError(f"{layer}.{suffix} is missing: the config promises {scheme}")
        if _squeezed(tensors[suffix]) != _squeezed(spec.shape):
            raise ManifestError(
                f"{layer}.{suffix} has shape {list(tensors[suffix])}, expected {list(spec.shape)} for {scheme} "
                f"({layout} tensors)"
            )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[], [1], [N] and [N, 1] are all in use for the same scales."""
    return tuple(size for size in shape if size != 1)


def check_shapes(manifest: Manifest, shapes: Shapes) -> None:
    """Compare a checkpoint's tensors with what its manifest promises, by name and by shape.

    Raises:
        ManifestError: as `verify_tensors`, and for a shape that the scheme does not have.
    """
    modules = modules_of(shapes)
    verify_tensors(manifest, shapes)
    for layer, scheme in manifest.schemes.items():
        check_layer(layer, scheme, manifest.layout_name(layer), modules[layer])
    for module, tensors in modules.items():
        for suffix in tensors.keys() & set(KV_SCALES):
            if manifest.kv_cache == "fp8" and math.prod(tensors[suffix]) != 1:
                raise ManifestError(
                    f"{module}.{suffix} has shape {list(tensors[suffix])}, but the KV cache has one scale per tensor"
                )


def kv_scales(shapes: Shapes) -> tuple[str, ...]:
    """The scales of the KV cache that a checkpoint has: all of them, or those without the queries'."""
    has_queries = any(name.rpartition(".")[2] == "q_scale" for name in shapes)
    return KV_SCALES if has_queries else tuple(scale for scale in KV_SCALES if scale != "q_scale")


def kv_cache_by_shape(shapes: Shapes) -> KVCache | None:
    """The scheme of a KV cache whose scales are all that is known of it."""
    sizes = {math.prod(shape) for name, shape in shapes.items() if name.rpartition(".")[2] in KV_SCALES}
    if not sizes:
        return None
    return "fp8" if sizes == {1} else "fp8_per_head"


def refuse_unknown(config: Mapping[str, Any], known: set[str], where: str = "quantization_config") -> None:
    """Raise ManifestError for a key outside ``known`` with a value that says something."""
    for key in sorted(config.keys() - known):
        if config[key]:
            raise ManifestError(f"{where} has the unknown key {key!r}; refusing to guess what it changes")


def require_keys(config: Mapping[str, Any], *keys: str) -> None:
    """Raise ManifestError for a key that a config must have."""
    for key in keys:
        if config.get(key) is None:
            raise ManifestError(f"quantization_config lacks {key!r}")


def group_size(value: Any) -> int | None:
    """An integer type's group size: -1, which is what GPTQ, AWQ and auto-round call a whole row, is None."""
    return None if value == -1 else value


def require(shapes: Shapes | None, method: str) -> Modules:
    """The modules of a checkpoint whose config does not name its layers."""
    if shapes is None:
        raise ManifestError(
            f"a {method} config does not name the layers that are quantized; only the checkpoint's tensors do, and "
            "their names are not known here"
        )
    return modules_of(shapes)


def manifest_of(layers: Mapping[str, tuple[QuantScheme, str]], **rest: Any) -> Manifest:
    """A manifest from the scheme and layout of each layer."""
    counts = Counter(layout for _, layout in layers.values())
    common = counts.most_common(1)[0][0] if counts else COMPRESSED_TENSORS
    return Manifest(
        schemes={layer: scheme for layer, (scheme, _) in layers.items()},
        layout=common,
        other_layouts={layer: layout for layer, (_, layout) in layers.items() if layout != common},
        **rest,
    )


def require_survival(manifest: Manifest, read: Callable[[Shapes], Manifest], method: str) -> None:
    """Raise ManifestError unless ``read`` finds the same manifest in the checkpoint that it promises."""
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.weight": (_ROWS, _COLUMNS) for layer in manifest.ignore}
    for layer, scheme in manifest.schemes.items():
        specs = manifest.layout_of(layer).specs(scheme, _ROWS, _COLUMNS, torch.bfloat16)
        shapes |= {f"{layer}.{suffix}": spec.shape for suffix, spec in specs.items()}
    if manifest.kv_cache:
        scale = (1,) if manifest.kv_cache == "fp8" else (2, 1, 1)
        shapes |= {f"attention.{suffix}": scale for suffix in manifest.kv_scales}
    back = read(shapes)
    check_shapes(back, shapes)
    if _plain(back) != _plain(manifest):
        raise ManifestError(f"{manifest} does not survive the way through a {method} config")


def _plain(manifest: Manifest) -> tuple[Any, ...]:
    """What of a manifest a reader must find again."""
    layouts = {layer: manifest.layout_name(layer) for layer in manifest.schemes}
    ignore = {layer for layer in manifest.ignore if not is_embedding(layer)}
    scales = manifest.kv_scales if manifest.kv_cache else ()
    return dict(manifest.schemes), layouts, ignore, manifest.kv_cache, scales
