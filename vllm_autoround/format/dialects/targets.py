"""Targets of a compressed-tensors config -> the layers of a checkpoint, by that library's rules.

A target is a module's full name, ``re:`` and a pattern that must match from the name's beginning, or a class. The
first that matches decides: the full name, then patterns in alphabetical order, then the class
(compressed_tensors.utils.match.match_targets, releases 0.17 to 0.20). What `ignore` matches is not quantized.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from vllm_autoround.format.dialects.modules import Modules, is_embedding, quantized
from vllm_autoround.format.errors import ManifestError

_PATTERN = "re:"


def is_full_name(target: str) -> bool:
    """Whether a target is neither a pattern nor a class."""
    return not target.startswith(_PATTERN) and not target[:1].isupper()


def require_full_names(targets: Collection[str]) -> None:
    """Raise ManifestError for a target that needs the checkpoint's tensors to be resolved."""
    for target in targets:
        if not is_full_name(target):
            raise ManifestError(
                f"target {target!r} is a pattern or a class, which only the checkpoint's tensors can resolve; without "
                "them, only full module names are understood"
            )


def resolve(targets: Mapping[str, str], ignore: Collection[str], modules: Modules) -> dict[str, str]:
    """Layer -> config group.

    Args:
        targets: target -> config group.

    Raises:
        ManifestError: a quantized layer that is ignored, or that no target matches.
    """
    named = [target for target in targets if is_full_name(target) and _match(target, ignore) is None]
    layers = {layer: targets[layer] for layer in named}
    for layer in quantized(modules):
        if (target := _match(layer, ignore)) is not None:
            raise ManifestError(f"{layer} is in ignore ({target!r}), but its tensors are quantized")
        target = _match(layer, targets)
        if target is None:
            raise ManifestError(
                f"{layer} is quantized, but no target of the config matches it: {', '.join(map(repr, targets))}"
            )
        layers[layer] = targets[target]
    return layers


def _match(layer: str, targets: Collection[str]) -> str | None:
    """The target that decides about a layer."""
    if layer in targets:
        return layer
    for target in sorted(target for target in targets if target.startswith(_PATTERN)):
        try:
            if re.match(target.removeprefix(_PATTERN), layer):
                return target
        except re.error as error:
            raise ManifestError(f"target {target!r} is not a regular expression: {error}") from error
    class_ = "Embedding" if is_embedding(layer) else "Linear"
    return class_ if class_ in targets else None
