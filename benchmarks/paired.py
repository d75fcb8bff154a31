"""Are answers as good as others to the same problems? A test of non-inferiority, problem by problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

RIGHT, WRONG = "+", "-"  # an answer
_QUANTILE = 1.645  # of the normal distribution, 95 %


@dataclass(frozen=True, slots=True)
class Difference:
    """Of accuracies."""

    mean: float
    lower: float  # it is above this with 95 % confidence, one-sided


def difference(ours: Sequence[str], theirs: Sequence[str]) -> Difference:
    """Of our accuracy from theirs, in the mean over the seeds.

    Problems are what is drawn from many; on each, ours and theirs differ by the mean over the seeds. Their share of all
    is taken as normally distributed around the true one.

    Args:
        ours: of each seed `RIGHT` or `WRONG` for each of at least two problems.
        theirs: likewise, of the same seeds and problems.
    """
    mine, other = (
        [mean(answer == RIGHT for answer in answers) for answers in zip(*seeds, strict=True)]
        for seeds in (ours, theirs)
    )
    found = [left - right for left, right in zip(mine, other, strict=True)]
    return Difference(mean(found), mean(found) - _QUANTILE * stdev(found) / sqrt(len(found)))
