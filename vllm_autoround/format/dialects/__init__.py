"""Dialects: the ``quantization_config`` in which a tool says how its checkpoints are quantized, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_autoround.format.dialects import compressed_tensors
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import Manifest

Shapes = Mapping[str, tuple[int, ...]]  # of every tensor in the checkpoint, by its full name

_READERS: dict[str, Callable[[Mapping[str, Any], Shapes | None], Manifest]] = {
    "compressed-tensors": compressed_tensors.read_config,
}


def read_manifest(config: Mapping[str, Any], shapes: Shapes | None = None) -> Manifest:
    """The manifest of a checkpoint from its ``quantization_config``, in any dialect.

    Args:
        shapes: what the checkpoint holds; patterns and classes in a config are resolved against it. None: only a
            config that names every layer in full, as ours do, can be read.

    Raises:
        ManifestError: a dialect, key, value or tensor that is not understood, by name.
    """
    method = config.get("quant_method")
    if method not in _READERS:
        raise ManifestError(f"quant_method {method!r} is not understood; known are {', '.join(_READERS)}")
    return _READERS[method](config, shapes)
