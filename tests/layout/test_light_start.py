# SPDX-License-Identifier: Apache-2.0
"""What is started inside the blackout loads only what it needs there: each import is time in which guests stand still."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from luod.journal import sqlite
from luod.journal.writer import Journal

BOOT = "0d7c2a4e-2f0b-4c53-9f3c-3d1a4f0b7a11"
OPENS = """
import sys
from pathlib import Path
import luod.daemon.__main__, luod.qemu.command
from luod.adapters.kernel import open_kernel
from luod.journal.writer import Journal
open_kernel("device")
with Journal.open(Path(sys.argv[1]), boot_id=sys.argv[2], run_id="2", volatile=True):
    print(*sys.modules)
"""


@pytest.mark.parametrize("fresh", [True, False])
def test_a_start_with_a_journal_that_is_there_loads_no_migrations(disk_path: Path, fresh: bool) -> None:
    journal = disk_path / "journal.db"
    if not fresh:
        with Journal.open(journal, boot_id=BOOT, run_id="1", volatile=True):
            pass
    started = subprocess.run(
        [sys.executable, "-c", OPENS, str(journal), BOOT], capture_output=True, text=True, check=True
    )
    loaded = set(started.stdout.split())
    assert ("sqlite_utils" in loaded) == fresh
    assert not {name for name in loaded if name.startswith("luod.adapters.emulator")}
    if not fresh:
        assert not loaded & {"click", "rich", "dateutil", "multiprocessing"}


def test_there_is_one_sqlite() -> None:
    from sqlite_utils.utils import sqlite3

    assert sqlite.sqlite is sqlite3
