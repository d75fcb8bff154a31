"""Recipes with changes, as a benchmark's command line has them: ``default:batch_size=4,momentum=0.7``."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from typing import Any

from calibrate.config import RECIPES, CalibrationConfig, CalibrationError, Recipe

HELP = "recipes, as they are or changed, e.g. fast:iters=400"
_SETTABLE = {field.name for field in fields(Recipe)} - {"seqlen", "optimizer"}


def variant(text: str) -> str:
    """``text``, if it names a recipe and fields with values in JSON; for argparse.

    Raises:
        argparse.ArgumentTypeError: it does not.
    """
    name, _, changes = text.partition(":")
    for pair in changes.split(",") if changes else []:
        field, _, value = pair.partition("=")
        if field not in _SETTABLE:
            raise argparse.ArgumentTypeError(f"{field} is unknown; known are {', '.join(sorted(_SETTABLE))}")
        try:
            json.loads(value)
        except json.JSONDecodeError:
            raise argparse.ArgumentTypeError(f'{pair}: write a number, true, false or "text" behind =') from None
    if name not in RECIPES:
        raise argparse.ArgumentTypeError(f"{name} is unknown; known are {', '.join(RECIPES)}")
    try:
        CalibrationConfig(recipe=name, **_changes(text))
    except (CalibrationError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return text


def base_of(text: str) -> Recipe:
    """The recipe before its changes."""
    return RECIPES[text.partition(":")[0]]


def recipe_of(text: str, **defaults: Any) -> Recipe:
    """The recipe with ``defaults``, those that are not None, and over them what the text says itself."""
    given = {field: value for field, value in defaults.items() if value is not None}
    return replace(base_of(text), **given | _changes(text))


def _changes(text: str) -> dict[str, Any]:
    pairs = (pair.partition("=") for pair in text.partition(":")[2].split(",") if pair)
    return {field: json.loads(value) for field, _, value in pairs}
