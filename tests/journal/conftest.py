# SPDX-License-Identifier: Apache-2.0
"""A place for journals, and journals in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luod.journal.writer import Journal


@pytest.fixture
def path(disk_path: Path) -> Path:
    return disk_path / "journal.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., Journal]]:
    """Open journals that are closed at the end; without a pre-grown log, for speed."""
    made: list[Journal] = []

    def opener(where: Path = path, **options: Any) -> Journal:
        made.append(Journal.open(where, **{"boot_id": "boot-1", "run_id": "run-1", "pregrow": 0, **options}))
        return made[-1]

    yield opener
    for journal in made:
        journal.close()
