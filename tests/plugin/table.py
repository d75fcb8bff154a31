"""``python -m tests.plugin.table``: runs the matrix and writes what passed into README.md, as the table of what is
served; nothing in it is typed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

from calibrate.exporters import EXPORTERS, Folder
from calibrate.origin import Origin
from tests.conftest import REPOSITORY
from vllm_autoround.format.manifest import Manifest
from vllm_autoround.format.weights.integer import GROUP_SIZES

from .matrix import DIALECTS, FAMILIES, Case, kinds

README = REPOSITORY / "README.md"
BEGIN, END = "<!-- what passed, by make matrix-table -->\n", "<!-- up to here -->\n"
TESTS = "tests/plugin/test_matrix.py"

_KINDS = kinds("compressed-tensors", FAMILIES["W4A16"][0])


def main() -> int:
    """Returns the exit status of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "logical", "--maxprocesses", "8"]
        run = subprocess.run([*command, f"--junitxml={report}", TESTS], cwd=REPOSITORY, check=False)
        cases = passed(report)
    README.write_text(with_table(README.read_text(), render(cases)))
    return run.returncode


def passed(report: Path) -> list[Case]:
    """The cases of a JUnit report whose test passed."""
    cases = []
    for test in ElementTree.parse(report).iter("testcase"):
        found = {entry.get("name"): entry.get("value") for entry in test.iter("property")}
        if found and all(test.find(bad) is None for bad in ("failure", "error", "skipped")):
            cases.append(Case(found["family"], found["dialect"], found["label"], int(found["ranks"])))
    return cases


def with_table(readme: str, table: str) -> str:
    """The README with another table between the two comments."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def render(cases: Collection[Case]) -> str:
    """The table of these cases; schemes that differ in no column share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        cells = tuple(
            _cell([case for case in cases if (case.family, case.dialect) == (family, dialect)]) for dialect in DIALECTS
        )
        rows.setdefault(cells, []).append(family)
    classes = dict.fromkeys(kind.layer.__name__ for kind in _KINDS)
    groups = ", ".join(map(str, GROUP_SIZES))
    lines = [
        f"all: {', '.join(classes)}. TP: tensor-parallel ranks. read: `--format` does not write it.",
        f"Integers have groups of {groups}, and one scale a row.",
        "",
        f"| scheme | {' | '.join(DIALECTS)} |",
        "|---" * (1 + len(DIALECTS)) + "|",
        *(f"| {' '.join(families)} | {' | '.join(cells)} |" for cells, families in rows.items()),
    ]
    return "\n".join(["", *lines, "", ""])


def _cell(cases: Collection[Case]) -> str:
    """The classes of layers and the ranks of one scheme in one dialect, and whether we only read it."""
    ranks_of: dict[str, list[str]] = {}
    for ranks in sorted({case.ranks for case in cases}):
        missing = {kind.label for kind in _KINDS} - {case.label for case in cases if case.ranks == ranks}
        classes = f"all but {', '.join(sorted(missing))}" if missing else "all"
        ranks_of.setdefault(classes, []).append(str(ranks))
    parts = [f"{classes}, TP {' '.join(ranks)}" for classes, ranks in ranks_of.items()]
    if cases and not any(_written(case) for case in cases):
        parts.append("read")
    return ", ".join(parts) or "-"


def _written(case: Case) -> bool:
    """Whether an exporter of ours writes some of the case's schemes in its dialect."""
    for _, scheme, kind in case.contents():
        manifest = Manifest(schemes=dict.fromkeys(kind.names.values(), scheme))
        for exporter in EXPORTERS.values():
            if not isinstance(exporter, Folder):
                continue
            shapes = dict.fromkeys(manifest.schemes, (512, 512))
            if exporter.problems(manifest, shapes, Origin(REPOSITORY, {})):
                continue
            if exporter.write_config(exporter.manifest(manifest))["quant_method"] == case.dialect:
                return True
    return False


if __name__ == "__main__":
    sys.exit(main())
