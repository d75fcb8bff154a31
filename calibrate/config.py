"""CalibrationConfig: every setting of a run, frozen; and the recipes that give the defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from calibrate.formats import FORMATS
from vllm_autoround.format.errors import SchemeError

if TYPE_CHECKING:
    from vllm_autoround.format.scheme import QuantScheme

DEFAULT_DATASET = "NeelNanda/pile-10k"
IGNORE = "ignore"  # the scheme of a layer that stays as it is
FINE_BITS = 4  # of integers, from which on `Recipe.fine_lr` counts

Dataset = str | Sequence[str] | Sequence[Sequence[int]]
KVCache = Literal["fp8", "fp8_per_head"]
Optimizer = Literal["signsgd", "adamw"]
Precision = Literal["bf16", "fp8", "auto"]


class CalibrationError(ValueError):
    """Bad input: the message names the value, the limit and the way out. The command line exits with status 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How blocks are tuned, for how long and on how much data; and what follows them."""

    iters: int  # steps a block; 0: none
    batch_size: int  # samples a step
    seqlen: int = 2048  # tokens a sample
    nsamples: int = 128
    lr: float | None = None  # of the first step; None: 1 / iters
    fine_lr: float = 1.0  # of integers of FINE_BITS and more, relative to lr; with less, fewer weights move
    scale_lr: float = 1.0  # of the scales, relative to their weights' rate
    input_scale_lr: float = 0.0  # of static scales of inputs, relative to lr; 0: no step moves them
    momentum: float = 0.0  # share of the running mean of the gradients that a step keeps
    optimizer: Optimizer = "signsgd"  # adamw: with torch's betas, not ``momentum``
    tuning_precision: Precision = "bf16"  # of a step's matrix products
    scale_search: bool = False  # start from the best scales of a grid, of inputs too; else from the full range
    kl_last_block: bool = False  # tune the last block on the model's output distribution; else on its hidden states
    gptq: bool = False  # without steps: round by GPTQ and coordinate descent; else to nearest
    end_to_end_iters: int = 0  # steps of one sample, after all blocks, on the scales of integers of at most 3 bits
    end_to_end_lr: float = 2e-3  # of the first of these steps

    @property
    def beyond_nearest(self) -> bool:
        """Whether anything is done after rounding to nearest."""
        return bool(self.iters or self.gptq)

    @property
    def weighs_pairs(self) -> bool:
        """Whether scales or values are found by the second moments of the layers' inputs, and weights are made to suit
        quantized inputs where scales leave little to find: without steps."""
        return not self.iters and (self.scale_search or self.gptq)

    def learning_rate(self, step: int) -> float:
        """The rate of a step: linear from ``lr`` to 0."""
        return (self.lr or 1 / self.iters) * (1 - step / self.iters)


_OURS: dict[str, Any] = {
    "fine_lr": 0.75,
    "scale_lr": 0.5,
    "tuning_precision": "auto",
    "scale_search": True,
    "kl_last_block": True,
}
RECIPES = {
    "default": Recipe(iters=200, batch_size=2, momentum=0.5, **_OURS),
    "best": Recipe(iters=400, batch_size=2, momentum=0.9, nsamples=320, end_to_end_iters=400, **_OURS),
    "fast": Recipe(iters=200, batch_size=1, momentum=0.5, nsamples=80, **_OURS),
    "light": Recipe(iters=50, batch_size=2, momentum=0.5, **_OURS),
    "rtn": Recipe(iters=0, batch_size=1, scale_search=True),
    "gptq": Recipe(iters=0, batch_size=1, scale_search=True, gptq=True),
    "autoround": Recipe(iters=200, batch_size=8, input_scale_lr=1.0),
    "autoround-best": Recipe(iters=1000, batch_size=8, nsamples=512, input_scale_lr=1.0),
    "autoround-light": Recipe(iters=50, batch_size=8, lr=5e-3, input_scale_lr=1.0),
    "autoround-fast": Recipe(iters=200, batch_size=4, seqlen=512, input_scale_lr=1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Settings of one run. None stands for the recipe's value.

    Raises:
        CalibrationError: values outside their range, an unknown scheme or group size; all of them at once.
    """

    scheme: str = "W4A16"  # of every linear layer in the blocks; see vllm_autoround.format.scheme
    group_size: int | None = None  # of integer weights; -1: one scale per output row; None: the scheme's own
    # Pattern -> scheme or "ignore", for single layers; the first that matches wins. A pattern is a layer's full name,
    # a regular expression to be found in it, or re:PATTERN for one that must match from the beginning.
    layers: Mapping[str, str] | Iterable[tuple[str, str]] = ()
    ignore: Iterable[str] = ()  # patterns of layers to leave as they are
    stock_vllm: bool = False  # refuse what vLLM cannot serve without our plugin
    kv_cache: KVCache | None = None
    dataset: Dataset = DEFAULT_DATASET  # Hub id, local file, strings or lists of token ids
    pad: bool = False  # one text a sample, shorter ones padded; else joined
    recipe: str = "default"
    iters: int | None = None
    batch_size: int | None = None
    seqlen: int | None = None
    nsamples: int | None = None
    lr: float | None = None
    fine_lr: float | None = None
    scale_lr: float | None = None
    input_scale_lr: float | None = None
    momentum: float | None = None
    optimizer: Optimizer | None = None
    tuning_precision: Precision | None = None
    scale_search: bool | None = None
    kl_last_block: bool | None = None
    gptq: bool | None = None
    end_to_end_iters: int | None = None
    end_to_end_lr: float | None = None
    gradient_accumulate_steps: int = 1
    device: str = "auto"
    torch_compile: bool | None = None  # compile the blocks; None: on a GPU, where they are large enough to pay for it
    seed: int = 42
    format: str | Iterable[str] = "compressed-tensors"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        # Whatever Python callers hand over must be comparable and go into report.json.
        layers = self.layers.items() if isinstance(self.layers, Mapping) else self.layers
        object.__setattr__(self, "layers", tuple((pattern, scheme) for pattern, scheme in layers))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        formats = (self.format,) if isinstance(self.format, str) else tuple(self.format)
        object.__setattr__(self, "format", formats)
        if isinstance(self.dataset, os.PathLike):
            object.__setattr__(self, "dataset", os.fspath(self.dataset))
        problems = [*self._unknown_names(), *self._out_of_range()]
        if not problems and self.tuning.gptq and self.tuning.iters:
            problems.append("gptq rounds without steps, and steps after it gain nothing; drop it or set iters to 0")
        for scheme, group_size in [(self.scheme, self.group_size), *((scheme, None) for _, scheme in self.rules)]:
            try:
                _ = parse_scheme(scheme, group_size)
            except SchemeError as error:
                problems.append(str(error))
        if problems:
            raise CalibrationError("\n".join(problems))

    @property
    def rules(self) -> tuple[tuple[str, str], ...]:
        """`layers`, then `ignore`, as pattern -> scheme."""
        layers = cast(tuple[tuple[str, str], ...], self.layers)
        return (*layers, *((pattern, IGNORE) for pattern in self.ignore))

    @property
    def formats(self) -> tuple[str, ...]:
        """The layouts to write."""
        return tuple(self.format)

    @property
    def tuning(self) -> Recipe:
        """The recipe with this run's overrides."""
        names = [field.name for field in fields(Recipe)]
        overrides = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(RECIPES[self.recipe], **overrides)

    def _unknown_names(self) -> list[str]:
        known = [("recipe", self.recipe, RECIPES), *(("format", name, FORMATS) for name in self.formats)]
        if self.kv_cache is not None:
            known.append(("kv-cache", self.kv_cache, get_args(KVCache)))
        if self.tuning_precision is not None:
            known.append(("tuning-precision", self.tuning_precision, get_args(Precision)))
        if self.optimizer is not None:
            known.append(("optimizer", self.optimizer, get_args(Optimizer)))
        return [
            f"{setting} {value!r} is unknown; known are {', '.join(names)}"
            for setting, value, names in known
            if value not in names
        ]

    def _out_of_range(self) -> list[str]:
        problems = []
        least = {"iters": 0, "batch_size": 1, "seqlen": 2, "nsamples": 1, "gradient_accumulate_steps": 1}
        least |= {"end_to_end_iters": 0}
        for field, limit in least.items():
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < limit):
                problems.append(f"{field.replace('_', '-')} must be a whole number of at least {limit}, got {value!r}")
        for field in ("lr", "fine_lr", "scale_lr", "end_to_end_lr"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 1:
                problems.append(f"{field.replace('_', '-')} must be above 0 and at most 1, got {value}")
        if self.input_scale_lr is not None and not 0 <= self.input_scale_lr <= 1:
            problems.append(f"input-scale-lr must be at least 0 and at most 1, got {self.input_scale_lr}")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            problems.append(f"momentum must be at least 0 and below 1, got {self.momentum}")
        return problems


def parse_scheme(name: str, group_size: int | None = None) -> QuantScheme | None:
    """A scheme by name; None for ``"ignore"``.

    Raises:
        SchemeError: there is none of that name.
    """
    # Imported here because schemes need torch, and the command line's help must not wait for it.
    from vllm_autoround.format.scheme import QuantScheme  # noqa: PLC0415

    return None if name.lower() == IGNORE else QuantScheme.parse(name, group_size)
