# SPDX-License-Identifier: Apache-2.0
"""The bindings on real devices behind a real IOMMU (QEMU's): one machine, one boot, every statement a case of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from luod.lab.outcome import LabRun
from luod.lab.passthrough import ARGUMENTS
from luod.lab.script import Boot, run

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
SOURCE = Path(__file__).parent / "programs" / "device_facts.py"


def cases() -> list[str]:
    """Read the names of the cases out of the program, so that one that never reports is a failure here."""
    tree = ast.parse(SOURCE.read_text("utf-8"))
    return [
        one.name for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith("case_")
    ]


@pytest.fixture(scope="module")
def facts(pair, run_devices, program) -> LabRun:
    boot = Boot([run("facts", program("device_facts.py"), timeout_s=300)], arguments=ARGUMENTS)
    return run_devices("device-facts", pair[1], [boot], 180)


@pytest.mark.parametrize("name", cases())
def test_case(facts, name) -> None:
    found = [event for event in facts.of("case") if event["name"] == name]
    if not found:
        facts.check()
        pytest.fail(f"the case never reported; see {facts.directory}")
    if not found[0]["ok"]:
        pytest.fail(found[0]["message"])
