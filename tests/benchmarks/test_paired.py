"""The test of non-inferiority, and what the quality benchmark makes of it."""

from __future__ import annotations

from math import sqrt

import pytest

from benchmarks.paired import RIGHT, WRONG, difference
from benchmarks.quality import Row, _comparisons, _inferior


def answers(right: int, of: int = 400, *, skip: int = 0) -> str:
    """So many right ones after the first ``skip``."""
    return WRONG * skip + RIGHT * right + WRONG * (of - skip - right)


def test_it_is_the_pairs_that_count() -> None:
    same = difference([answers(300)], [answers(300)])
    assert same.mean == same.lower == 0
    # As many right, but others: a hundred problems differ either way.
    other = difference([answers(300)], [answers(300, skip=100)])
    assert other.mean == 0
    assert other.lower == pytest.approx(-1.645 * sqrt(200 / 399) / sqrt(400))


def test_what_we_get_right_more_often_counts_for_us() -> None:
    better = difference([answers(320)], [answers(300)])
    assert better.mean == pytest.approx(0.05)
    assert 0.03 < better.lower < 0.05
    assert difference([answers(300)], [answers(320)]).mean == pytest.approx(-0.05)


def test_seeds_are_averaged_problem_by_problem() -> None:
    # Each seed differs in a hundred problems; together they do not.
    ours, theirs = [answers(300), answers(300, skip=100)], [answers(300, skip=100), answers(300)]
    assert difference(ours, theirs).lower == 0


def row(weights: str, seed: int, right: int, scheme: str = "W4A16") -> Row:
    return Row(scheme=scheme, weights=weights, seed=seed, ppl=1.0, kl=0.0, accuracy=right / 400, answers=answers(right))


def test_each_recipe_is_compared_with_the_last_of_the_peers_on_common_seeds() -> None:
    rows = [
        row("ours, rtn", 42, 300),
        row("ours, default", 42, 380),
        row("ours, default", 43, 390),
        row("auto-round, 0", 42, 300),
        row("auto-round, 200", 42, 384),
        row("auto-round, 200", 44, 400),
        row("ours, default", 42, 1, scheme="W2A16"),  # no peer
    ]
    rtn, default = _comparisons(rows)
    assert (rtn.weights, default.weights) == ("ours, rtn", "ours, default")
    assert (default.peer, default.seeds) == ("auto-round, 200", [42])
    assert default.difference.mean == pytest.approx(-0.01)
    assert -0.02 < default.difference.lower < -0.01
    compared = rows[:-1]
    assert not list(_inferior(compared, [rtn, default], 0.02))  # `rtn` is, but was not the last
    [miss] = _inferior(compared, [rtn, default], 0.015)
    assert miss.startswith("W4A16, ours, default beside auto-round, 200: accuracy -0.0100, above -0.0182")
    [miss] = _inferior(rows, [rtn, default], 0.02)
    assert miss.startswith("W2A16, ours, default: no row of auto-round's")
