"""Recipes with changes are what they say."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from benchmarks.variants import recipe_of, variant
from calibrate.config import RECIPES


def test_variants() -> None:
    assert recipe_of("default", seqlen=1024) == replace(RECIPES["default"], seqlen=1024)
    changed = recipe_of("fast:iters=400,scale_search=false", seqlen=1024)
    assert changed == replace(RECIPES["fast"], iters=400, scale_search=False, seqlen=1024)
    assert recipe_of('light:tuning_precision="fp8"').tuning_precision == "fp8"
    # What a variant names counts more than what all get.
    assert recipe_of("fast:iters=400", iters=4, nsamples=8, seqlen=64).iters == 400
    assert recipe_of("fast", nsamples=None) == RECIPES["fast"]
    assert recipe_of("fast", nsamples=8).nsamples == 8


@pytest.mark.parametrize(
    "wrong", ["slow", "fast:steps=4", "fast:iters=many", "fast:seqlen=3", 'fast:iters="4"', "fast:momentum=2"]
)
def test_variants_that_there_are_not(wrong: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        variant(wrong)
