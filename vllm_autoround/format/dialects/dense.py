"""Dense or padded: how compressed-tensors packed integers of 3, 5, 6 and 7 bits.

Release 0.18 changed the words in place, without a new name: 0.17 padded them so that no code straddles two words, 0.18
and later pack them densely. What tells them apart, in this order: the words a row of a known length takes, the other
layers of the same checkpoint, the release that the config names, and the feature counts of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vllm_autoround.format.dialects.modules import Modules, check_layer, known_sizes
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.layouts import COMPRESSED_TENSORS
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

PADDED = "padded"
_STRADDLING = (3, 5, 6, 7)
_LAYOUTS = (COMPRESSED_TENSORS, PADDED)


def straddles(scheme: QuantScheme) -> bool:
    """Whether the two ways of packing differ."""
    return isinstance(scheme.weights, Integer) and scheme.weights.bits in _STRADDLING


def layout_by_version(version: object) -> str | None:
    """How a release of compressed-tensors packs; None if its version does not tell."""
    match = re.match(r"(\d+)\.(\d+)(\.\d+)*", version) if isinstance(version, str) else None
    if match is None:
        return None
    number = int(match[1]), int(match[2])
    if match[0] != version and number in ((0, 17), (0, 18)):
        return None  # a build between the two releases, on either side of the change
    return COMPRESSED_TENSORS if number >= (0, 18) else PADDED


def layouts_of(schemes: Mapping[str, QuantScheme], modules: Modules | None, version: object) -> dict[str, str]:
    """The layout of each of some integer layers whose codes straddle words.

    Args:
        modules: what the checkpoint holds; None: only the version tells.

    Raises:
        ManifestError: a layer that fits neither, or of which it cannot be told.
    """
    fitting = {layer: _fitting(layer, scheme, modules) for layer, scheme in schemes.items()}
    certain = {layouts[0] for layouts in fitting.values() if len(layouts) == 1}
    elsewhere = certain.pop() if len(certain) == 1 else layout_by_version(version)
    layouts = {}
    for layer, choices in fitting.items():
        layout = choices[0] if len(choices) == 1 else elsewhere
        if layout is None and modules is not None:
            layout = _by_sizes(layer, schemes[layer], modules)
        if layout is None:
            raise ManifestError(
                f"{layer}: it cannot be told whether its {schemes[layer].weights.bits}-bit codes are packed densely "
                "(compressed-tensors 0.18 and later) or padded (before): neither the shapes nor a `version` in "
                "quantization_config say; add the version of compressed-tensors that wrote them"
            )
        layouts[layer] = layout
    return layouts


def _fitting(layer: str, scheme: QuantScheme, modules: Modules | None) -> tuple[str, ...]:
    """The layouts that a layer's shapes allow."""
    if modules is None:
        return _LAYOUTS
    if layer not in modules:
        return (COMPRESSED_TENSORS,)  # its tensors are missing, which is said elsewhere
    fitting, errors = [], []
    for layout in _LAYOUTS:
        try:
            check_layer(layer, scheme, layout, modules[layer])
            fitting.append(layout)
        except ManifestError as error:
            errors.append(error)
    if not fitting:
        raise errors[0]
    return tuple(fitting)


def _by_sizes(layer: str, scheme: QuantScheme, modules: Modules) -> str | None:
    """The layout in which a row has a length that the model is known to have, if there is only one."""
    words, bits, sizes = modules[layer]["weight_packed"][1], scheme.weights.bits, known_sizes(modules)
    dense = range((words - 1) * 32 // bits + 1, words * 32 // bits + 1)
    padded = range((words - 1) * (32 // bits) + 1, words * (32 // bits) + 1)
    found = [layout for layout, lengths in zip(_LAYOUTS, (dense, padded), strict=True) if sizes & set(lengths)]
    return found[0] if len(found) == 1 else None
