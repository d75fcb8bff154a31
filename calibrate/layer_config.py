"""The file behind ``--layer-config``: layer patterns and their schemes, as YAML or JSON (which YAML contains)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from calibrate.config import CalibrationError


def read_layer_config(path: Path) -> list[tuple[str, str]]:
    """Pattern -> scheme in the order of the file.

    A value is a scheme's name, ``ignore``, or a mapping with ``scheme`` and ``group_size``.

    Raises:
        CalibrationError: the file cannot be read, or says something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CalibrationError(f"layer-config {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content:
        raise CalibrationError(f"layer-config {path} must map layer patterns to schemes, e.g. '.*down_proj: W8A16'")
    return [(str(pattern), _scheme(path, str(pattern), value)) for pattern, value in content.items()]


def parse_layer_rule(rule: str) -> tuple[str, str]:
    """``"PATTERN=SCHEME"`` -> both.

    Raises:
        CalibrationError: there is no ``=``, or nothing on one side of it.
    """
    pattern, _, scheme = rule.rpartition("=")
    if not pattern or not scheme:
        raise CalibrationError(f"layer {rule!r} must be PATTERN=SCHEME, e.g. 're:.*down_proj=W8A16'")
    return pattern, scheme.strip()


def _scheme(path: Path, pattern: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and set(value) <= {"scheme", "group_size"} and "scheme" in value:
        size = value.get("group_size")
        return str(value["scheme"]) if size is None else f"{value['scheme']}_G{size}"
    raise CalibrationError(
        f"layer-config {path}: {pattern!r} must have a scheme, 'ignore', or a mapping of scheme and group_size, "
        f"got {value!r}"
    )
