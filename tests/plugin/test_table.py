"""The README's table of what is served: made of the tests' results, and not older than the matrix."""

from __future__ import annotations

from pathlib import Path

from .matrix import CASES, Case
from .table import README, passed, render, with_table


def test_the_readme_has_the_whole_matrix() -> None:
    """Then it is right as long as the tests of the matrix pass; `make matrix-table` makes it so."""
    assert with_table(README.read_text(), render(CASES)) == README.read_text()


def test_what_did_not_pass_is_not_in_the_table() -> None:
    def row(cases: list[Case]) -> str:
        return next(line for line in render(cases).splitlines() if " W4A16_ASYM " in line)

    assert row(CASES).endswith("| all, TP 1 2 |")
    awq = [case for case in CASES if (case.family, case.dialect) == ("W4A16_ASYM", "awq")]
    others = [case for case in CASES if case not in awq]
    assert row(others).endswith("| all, TP 1 2 | - |")
    assert row([*others, *(case for case in awq if case.ranks == 1)]).endswith("| all, TP 1 |")
    assert row([case for case in CASES if case != awq[0]]).endswith("| all but replicated, TP 1, all, TP 2 |")


def test_results_are_read_from_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    properties = "".join(
        f'<property name="{name}" value="{value}"/>'
        for name, value in (("family", "FP8"), ("dialect", "auto-round"), ("label", "row"), ("ranks", 2))
    )
    report.write_text(
        "<testsuites><testsuite>"
        f"<testcase><properties>{properties}</properties></testcase>"
        f"<testcase><properties>{properties}</properties><failure>no</failure></testcase>"
        "<testcase/>"
        "</testsuite></testsuites>"
    )
    assert passed(report) == [Case("FP8", "auto-round", "row", 2)]
