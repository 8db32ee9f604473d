# SPDX-License-Identifier: Apache-2.0
"""The world of the contract suite: the emulator, or with LUOD_CONTRACT=device the kernel this machine runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from contract_deviations import deviation
from contract_world import World

from luod.adapters.emulator.process import Emulator

BACKEND = os.environ.get("LUOD_CONTRACT", "emulated")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "world" not in getattr(item, "fixturenames", ()):
            continue
        found = deviation(item.name, BACKEND)
        if found is not None and found.kind == "fails":
            item.add_marker(pytest.mark.xfail(reason=f"{BACKEND}: {found.reason}", strict=True))
        elif found is not None:
            item.add_marker(pytest.mark.skip(reason=f"{BACKEND}: {found.reason}"))


@pytest.fixture(scope="module")
def emulator_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    if BACKEND == "device":
        yield None
        return
    with Emulator.start(tmp_path_factory.mktemp("emulator")) as emulator:
        with emulator.control() as control:
            control.spare(os.getpid())
        yield emulator.directory


@pytest.fixture
def world(emulator_directory: Path | None) -> Iterator[World]:
    made = World(BACKEND, emulator_directory)
    yield made
    made.end()
