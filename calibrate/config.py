"""CalibrationConfig: every setting of a run, frozen; and the recipes that give the defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from vllm_autoround.format.errors import SchemeError
from vllm_autoround.format.scheme import QuantScheme

DEFAULT_DATASET = "NeelNanda/pile-10k"
FORMATS = ("compressed-tensors",)

Dataset = str | Sequence[str] | Sequence[Sequence[int]]


class CalibrationError(ValueError):
    """Bad input: the message names the value, the limit and the way out. The command line exits with status 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and on how much data a block is tuned."""

    iters: int  # sign-gradient steps a block; 0: round to nearest
    batch_size: int  # samples a step
    seqlen: int  # tokens a sample
    nsamples: int
    lr: float | None  # of the first step; None: 1 / iters

    def learning_rate(self, step: int) -> float:
        """The rate of a step: linear from ``lr`` to 0."""
        return (self.lr or 1 / self.iters) * (1 - step / self.iters)


RECIPES = {
    "autoround": Recipe(iters=200, batch_size=8, seqlen=2048, nsamples=128, lr=None),
    "autoround-best": Recipe(iters=1000, batch_size=8, seqlen=2048, nsamples=512, lr=None),
    "autoround-light": Recipe(iters=50, batch_size=8, seqlen=2048, nsamples=128, lr=5e-3),
    "autoround-fast": Recipe(iters=200, batch_size=4, seqlen=512, nsamples=128, lr=None),
    "rtn": Recipe(iters=0, batch_size=8, seqlen=2048, nsamples=128, lr=None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Settings of one run. None stands for the recipe's value.

    Raises:
        CalibrationError: values outside their range, an unknown scheme or group size; all of them at once.
    """

    scheme: str = "W4A16"  # W2A16 to W8A16, each also with _ASYM
    group_size: int = 128  # -1: one scale per output row
    kv_cache: Literal["fp8"] | None = None
    dataset: Dataset = DEFAULT_DATASET  # Hub id, local file, strings or lists of token ids
    recipe: str = "autoround"
    iters: int | None = None
    batch_size: int | None = None
    seqlen: int | None = None
    nsamples: int | None = None
    lr: float | None = None
    gradient_accumulate_steps: int = 1
    ignore: Iterable[str] = ()  # full module names, or re:PATTERN
    device: str = "auto"
    seed: int = 42
    format: str = FORMATS[0]
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        # Whatever Python callers hand over must be comparable and go into report.json.
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if isinstance(self.dataset, os.PathLike):
            object.__setattr__(self, "dataset", os.fspath(self.dataset))
        problems = []
        if self.recipe not in RECIPES:
            problems.append(f"recipe {self.recipe!r} is unknown; known are {', '.join(RECIPES)}")
        if self.format not in FORMATS:
            problems.append(f"format {self.format!r} is unknown; known are {', '.join(FORMATS)}")
        if self.kv_cache not in (None, "fp8"):
            problems.append(f"kv-cache {self.kv_cache!r} is unknown; known is fp8")
        least = {"iters": 0, "batch_size": 1, "seqlen": 2, "nsamples": 1, "gradient_accumulate_steps": 1}
        for field, limit in least.items():
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < limit):
                problems.append(f"{field.replace('_', '-')} must be a whole number of at least {limit}, got {value!r}")
        if self.lr is not None and not 0 < self.lr <= 1:
            problems.append(f"lr must be above 0 and at most 1, got {self.lr}")
        try:
            _ = self.quant_scheme
        except SchemeError as error:
            problems.append(str(error))
        if problems:
            raise CalibrationError("\n".join(problems))

    @property
    def quant_scheme(self) -> QuantScheme:
        """The scheme of every quantized layer."""
        return QuantScheme.parse(self.scheme, self.group_size)

    @property
    def tuning(self) -> Recipe:
        """The recipe with this run's overrides."""
        names = [field.name for field in fields(Recipe)]
        overrides = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(RECIPES[self.recipe], **overrides)
