# SPDX-License-Identifier: Apache-2.0
"""Worlds for the tests of clients: one for a test, or one for a whole module."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from luod_world import World, new_world


@pytest.fixture
def world(disk_path: Path) -> Iterator[World]:
    with new_world(disk_path / "state") as made:
        yield made


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    """One world for tests that leave it as they found it; its journal may forget, so it needs no real disk."""
    state = Path(tempfile.mkdtemp(prefix="luod-state-"))
    try:
        with new_world(state, "volatile = true") as made:
            yield made
    finally:
        shutil.rmtree(state)
