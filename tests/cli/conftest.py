# SPDX-License-Identifier: Apache-2.0
"""Hosts for luoctl to look at, and journals for it to read."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from luoctl_process import Luoctl, refused_update, whole_update
from luod_world import World, new_world


@pytest.fixture
def offline() -> Luoctl:
    return Luoctl()


@pytest.fixture
def world(disk_path: Path) -> Iterator[World]:
    with new_world(disk_path / "state") as made:
        yield made


@pytest.fixture
def luoctl(world: World) -> Luoctl:
    return Luoctl(world.socket)


@pytest.fixture(scope="session")
def journals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a journal that holds an aborted and a whole update: `journal.db`, closed, nobody writes to it."""
    state = tmp_path_factory.mktemp("journal")
    with new_world(state, "volatile = true") as world:
        luoctl = Luoctl(world.socket)
        refused_update(world, luoctl)
        whole_update(world, luoctl)
        world.wait_record("update.done.")
    return state


@pytest.fixture
def copy(journals: Path, tmp_path: Path) -> Path:
    """A journal of its own for a test to spoil."""
    place = tmp_path / "journal.db"
    shutil.copyfile(journals / "journal.db", place)
    return place
