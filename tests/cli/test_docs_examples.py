# SPDX-License-Identifier: Apache-2.0
"""docs/luoctl.md shows every verb, and what it shows as JSON has the keys and types of what luoctl prints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from luoctl_examples import tour

from luod.cli.journal import journal
from luod.cli.program import VERBS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "luoctl.md"
BLOCK = re.compile(r"<!-- (example|shape): (.+?) -->\n```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = {"spans", "steps", "effects", "entered", "unknown", "args", "counts", "sessions"}
"""Objects whose keys are names rather than fields."""


def blocks(kind: str) -> dict[str, Any]:
    return {name: json.loads(text) for found, name, text in BLOCK.findall(PAGE.read_text()) if found == kind}


SHAPES = blocks("shape")


def differences(shown: Any, real: Any, place: str = "") -> Iterator[str]:
    """Yield where the documented example and a real answer have other keys or types."""
    if isinstance(shown, str) and shown.startswith("<"):
        if real is not None:
            yield from differences(SHAPES[shown.strip("<>")], real, place)
    elif isinstance(shown, dict) and isinstance(real, dict):
        name = place.rpartition(".")[2]
        if name in NAMED:
            for value in real.values() if shown else ():
                yield from differences(next(iter(shown.values())), value, f"{place}.*")
            return
        if name == "body":
            return
        if shown.keys() != real.keys():
            yield f"{place}: documented {sorted(shown)}, printed {sorted(real)}"
            return
        for key in shown:
            yield from differences(shown[key], real[key], f"{place}.{key}")
    elif isinstance(shown, list) and isinstance(real, list):
        if real and not shown:
            yield f"{place}: documented as empty"
        for value in real if shown else ():
            yield from differences(shown[0], value, f"{place}[]")
    elif (
        real is not None
        and shown is not None
        and type(shown) is not type(real)
        and {type(shown), type(real)} != {int, float}
    ):
        yield f"{place}: documented {shown!r}, printed {real!r}"


def test_every_example_has_the_shape_of_what_is_printed(disk_path: Path) -> None:
    printed = tour(disk_path / "state")
    examples = blocks("example")
    assert examples.keys() == printed.keys()
    found = [text for name, real in printed.items() for text in differences(examples[name], real, name)]
    assert found == []


def test_every_verb_has_its_place() -> None:
    headings = re.findall(r"^### ([a-z-]+(?: [a-z]+)?)", PAGE.read_text(), re.MULTILINE)
    mine = [name for name in VERBS if name not in ("journal", "demo", "lab")]
    wanted = [*mine, *(f"journal {name}" for name in journal.commands)]
    assert sorted(headings) == sorted(wanted)
    assert {f"luoctl {name}" in PAGE.read_text() for name in ("demo", "lab")} == {True}


@pytest.mark.parametrize(
    ("shown", "real", "count"),
    [
        ({"a": 1}, {"a": 2}, 0),
        ({"a": 1}, {"a": None}, 0),
        ({"a": 1}, {"b": 1}, 1),
        ({"a": 1}, {"a": "1"}, 1),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1}, {"c": 1}]}, 1),
        ({"a": []}, {"a": [1]}, 1),
        ({"effects": {"x": {"a": 1}}}, {"effects": {"y": {"b": 1}}}, 1),
        ("<Damage>", {"kind": "row"}, 1),
    ],
)
def test_differences_are_found(shown: Any, real: Any, count: int) -> None:
    assert len(list(differences(shown, real))) == count
