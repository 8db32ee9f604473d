# SPDX-License-Identifier: Apache-2.0
"""docs/failures.md and the tests agree: every number once, every test named there exists, every numbered test is named there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "failures.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def rows() -> dict[str, str]:
    found: dict[str, str] = {}
    for line in PAGE.splitlines():
        if match := re.match(r"\| (F\d\d) \|", line):
            assert match[1] not in found, f"{match[1]} is there twice"
            found[match[1]] = line
    return found


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_number_is_there_once_and_proven() -> None:
    found = rows()
    assert sorted(found) == [f"F{number:02}" for number in range(1, 36)]
    for number, row in found.items():
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 6, f"{number} has {len(cells)} cells"
        assert all(cells), f"{number} has an empty cell"
        assert NAMED.search(cells[-1].rstrip("| ")), f"{number} names no test"


def test_every_test_named_exists() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) > 50
    assert [f"{path}::{name}" for path, name in named if name not in functions(TESTS / path)] == []


def test_every_numbered_test_is_named_in_its_row() -> None:
    found = rows()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name in functions(path):
            for number in re.findall(r"(?<=_)f(\d\d)(?=_)", name):
                assert f"::{name}`" in found[f"F{number}"], f"{name} is missing in the row of F{number}"
