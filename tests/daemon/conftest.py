# SPDX-License-Identifier: Apache-2.0
"""Scenes for the failure scenarios: an emulated host whose clients do what each test says."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "client"))
sys.path.insert(0, str(Path(__file__).parent))

from daemon_scene import NewScene, Scene
from luod_world import new_world


@pytest.fixture
def new_scene(disk_path: Path) -> Iterator[NewScene]:
    """Make hosts with settings of their own; what they run is ended after the test, and must then end well."""
    numbers = itertools.count(1)
    with contextlib.ExitStack() as stack:

        def make(settings: str = "", *, boot: bool = True) -> Scene:
            state = disk_path / f"state{next(numbers)}"
            world = stack.enter_context(new_world(state, settings, boot=boot))
            return stack.enter_context(Scene(world))

        yield make


@pytest.fixture
def scene(new_scene: NewScene) -> Scene:
    """A host with the default settings, booted."""
    return new_scene()
