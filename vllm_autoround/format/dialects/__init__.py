"""Dialects: the ``quantization_config`` in which a tool says how its checkpoints are quantized, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_autoround.format.dialects import auto_round, awq, compressed_tensors, gptq
from vllm_autoround.format.dialects.modules import Shapes, check_shapes
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import Manifest

_READERS: dict[str, Callable[[Mapping[str, Any], Shapes | None], Manifest]] = {
    dialect.METHOD: dialect.read_config for dialect in (compressed_tensors, auto_round, gptq, awq)
}


def read_manifest(config: Mapping[str, Any], shapes: Shapes | None = None) -> Manifest:
    """The manifest of a checkpoint from its ``quantization_config``, in any dialect.

    Args:
        shapes: of every tensor in the checkpoint, by its full name. Patterns and classes in a config are resolved
            against them, and they are compared with what the config promises. None: only a config that names every
            layer in full, as ours do, can be read.

    Raises:
        ManifestError: a dialect, key, value or tensor that is not understood, by name.
    """
    method = config.get("quant_method")
    if method not in _READERS:
        raise ManifestError(f"quant_method {method!r} is not understood; known are {', '.join(_READERS)}")
    manifest = _READERS[method](config, shapes)
    if shapes is not None:
        check_shapes(manifest, shapes)
    return manifest
