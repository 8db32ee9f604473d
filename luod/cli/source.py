# SPDX-License-Identifier: Apache-2.0
"""Where the journal verbs take their records from: a file, a copy of one, an exported text, or the running luod."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..journal.audit import Report
from ..journal.record import Record
from ..states.errors import LuodError
from .link import luod

Json = dict[str, Any]


class Choice(NamedTuple):
    """Which records are wanted: of one stream, with `after` < id <= `until`, at most `limit` of them (0: all)."""

    stream: str = ""
    after: int = 0
    until: int = 0
    limit: int = 0

    def of(self, records: Iterator[Record]) -> Iterator[Record]:
        """Pass the records that are wanted."""
        passed = (
            one
            for one in records
            if one.id > self.after
            and (not self.until or one.id <= self.until)
            and self.stream in ("", one.stream)
        )
        return islice(passed, self.limit) if self.limit else passed


class Records:
    """Records to iterate over once; `report()` afterwards says what was wrong with them, where that can be known."""

    def __init__(self, records: Iterator[Record], audited: Any = None) -> None:
        self._records = records
        self._audited = audited

    def __iter__(self) -> Iterator[Record]:
        return self._records

    def report(self) -> Report | None:
        """Read to the end, and tell what was found; None for records that came from luod, which has checked them."""
        if self._audited is None:
            return None
        for _ in self._records:
            pass
        report: Report = self._audited.report()
        return report


@contextmanager
def records(journal: Path | None, *, deep: bool = False) -> Iterator[Records]:
    """Open a journal: the file at `journal` (a database or an exported text), else the running luod's, through luod."""
    if journal is None:
        with luod() as link:
            yield Records(from_json(one) for one in link.records())
        return
    from ..journal import export
    from ..journal.replay import Replay

    if export.looks_like(journal):
        text = export.Import(journal)
        yield Records(iter(text), text)
        return
    with Replay(journal, deep=deep) as replay:
        yield Records(iter(replay), replay)


def path_of(journal: Path | None) -> Path:
    """Return the file to look at: `journal`, else the running luod's. Raises `LuodError` when it cannot be read."""
    if journal is not None:
        return journal
    with luod() as link:
        path = Path(link.status()["journal"]["path"])
    try:
        path.open("rb").close()
    except OSError as error:
        raise LuodError(
            f"luod's journal {path} cannot be read: {error.strerror}",
            hint="run this as luod's user, or copy the journal and give --journal COPY",
        ) from None
    return path


def from_json(row: Json) -> Record:
    """Turn a record as luod sends it into a record as it is stored; its chain value is not sent."""
    return Record(
        row["id"], row["stream"], row["seq"], row["type"], row["wall_ns"], row["boot_ns"], row["boot_id"], row["run_id"],
        row["cause"], msgspec.json.encode(row["body"]), b"",
    )  # fmt: skip
