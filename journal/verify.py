# SPDX-License-Identifier: Apache-2.0
"""Says whether a journal is whole, and where it is not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from . import export
from .audit import Audit, Report
from .record import COLUMNS, Record
from .replay import Replay


def verify(source: Path | str | Iterable[Record], *, start: bytes | None = None) -> Report:
    """Check a journal, a copy of one, an exported file, or records in memory.

    Checks every chain value, that ids and the numbers of each stream run on, that known events decode, that the index agrees with
    the rows, what SQLite thinks of its file, and whether the log ends where it should. `start` is the chain value before the first of
    the given records. Raises `JournalMissing`, `NotAJournal` and `NewerSchema`; everything else is in the report.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if export.looks_like(path):
            return export.verify_file(path)
        with Replay(path, deep=True) as replay:
            for _ in replay:
                pass
            return replay.report()
    audit = Audit("records", "", start)
    for _ in audit.run(tuple(getattr(record, name) for name in COLUMNS) for record in source):
        pass
    return audit.report()
