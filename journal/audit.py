# SPDX-License-Identifier: Apache-2.0
"""Reads every row once, checks it, and goes on past damage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ..states import codec
from ..states.errors import BadEvent, UnknownEvent
from .damage import Damage, Torn
from .diagnose import explain
from .record import CHAIN_SIZE, COLUMNS, Record, follows, genesis
from .sqlite import Connection, sqlite

SELECT = f"SELECT {', '.join(COLUMNS)} FROM events"
INDEX = "sqlite_autoindex_events_1"
_TYPES: tuple[type, ...] = (int, str, int, str, int, int, str, str, int, bytes, bytes)
_PROBES = 4096  # how many ids behind an unreadable one are tried when the file does not say where it ends


class Report(msgspec.Struct, frozen=True):
    """What was found in a journal.

    `rows` could be read, the last good one has id `head` and chain value `chain` (hex). `ok` is False when there is damage; an
    unfinished end (`torn`) is none. `unknown` counts event types that this version cannot decode.
    """

    source: str
    journal: str
    rows: int
    head: int
    chain: str
    ok: bool
    damage: tuple[Damage, ...]
    torn: Torn | None
    unknown: dict[str, int]
    sqlite: str


class Gap(msgspec.Struct, frozen=True):
    """Ids that cannot be read."""

    first: int
    last: int
    why: str


class Audit:
    """Checks a run of rows as they pass. Iterate to get the rows that are sound; then ask for `report()`."""

    def __init__(self, source: str, journal: str, start: bytes | None, *, decode: bool = True) -> None:
        self.source = source
        self.journal = journal
        self.damage: list[Damage] = []
        self.unknown: dict[str, int] = {}
        self.seqs: dict[str, int] = {}
        self.torn: Torn | None = None
        self.head = 0
        self.chain = start or bytes(CHAIN_SIZE)
        self.rows = 0
        self.places = 0
        self._previous = start
        self._expected = 1
        self._holes = start is None
        self._decode = decode

    def run(self, rows: Iterable[Any]) -> Iterator[Record]:
        """Check `rows` (column tuples or `Gap`s) and yield the records that are sound."""
        for row in rows:
            if isinstance(row, Gap):
                self._gap(row.first, row.last, "unreadable", row.why)
                continue
            record = self._check(row)
            if record is not None:
                self.rows += 1
                yield record

    def _gap(self, first: int, last: int, kind: Any, what: str) -> None:
        self.damage.append(Damage(kind, what, first, last))
        self._previous, self._expected, self._holes = None, last + 1, True

    def _check(self, row: tuple[Any, ...]) -> Record | None:
        id = row[0]
        if id < self._expected:
            self.damage.append(Damage("row", f"row {id} stands behind row {self._expected - 1}", id))
            return None
        if id > self._expected:
            self._gap(self._expected, id - 1, "missing", "no such rows")
        self._expected = id + 1
        self.places ^= hash((row[1], row[2], id))
        previous, self._previous = self._previous, None
        for name, value, wanted in zip(COLUMNS, row, _TYPES, strict=True):
            if not isinstance(value, wanted) and not (name == "cause" and value is None):
                self._bad(
                    Damage("row", f"holds {type(value).__name__}, not {wanted.__name__}", id, column=name),
                    row,
                )
                return None
        record = Record(*row)
        if previous is not None and not follows(previous, record):
            damage, mended = explain(previous, record)
            self._bad(damage, row)
            self._previous = mended
            return None
        self._previous = self.chain = record.chain
        self.head = id
        self._order(record)
        self._body(record)
        return record

    def _bad(self, damage: Damage, row: tuple[Any, ...]) -> None:
        self.damage.append(damage)
        self._holes = True
        chain = row[-1]
        self._previous = chain if isinstance(chain, bytes) and len(chain) == CHAIN_SIZE else None

    def _order(self, record: Record) -> None:
        before = self.seqs.get(record.stream, 0)
        if record.seq != before + 1 and not self._holes:
            what = f"stream {record.stream!r} goes from {before} to {record.seq}"
            self.damage.append(Damage("order", what, record.id, column="seq"))
        self.seqs[record.stream] = max(before, record.seq)

    def _body(self, record: Record) -> None:
        if not self._decode:
            return
        try:
            codec.decode(record.type, record.body)
        except UnknownEvent:
            self.unknown[record.type] = self.unknown.get(record.type, 0) + 1
        except BadEvent as error:
            self.damage.append(Damage("body", error.message, record.id, column="body"))

    def report(self) -> Report:
        """Tell what was found so far."""
        return Report(
            self.source,
            self.journal,
            self.rows,
            self.head,
            self.chain.hex(),
            not self.damage,
            tuple(self.damage),
            self.torn,
            dict(self.unknown),
            sqlite.sqlite_version,
        )


def identity(connection: Connection) -> tuple[str, bytes | None, list[Damage]]:
    """Return the id of the journal, the chain value before row 1 when it can be known, and what is wrong with them."""
    try:
        row = connection.execute("SELECT uuid, created_wall_ns, genesis FROM journal").fetchone()
    except sqlite.Error as error:
        return "", None, [Damage("file", f"the identity of the journal cannot be read: {error}")]
    if row is None:
        return "", None, [Damage("file", "the identity of the journal is missing")]
    if genesis(f"{row[0]} {row[1]}") != row[2]:
        return str(row[0]), None, [Damage("file", "the identity of the journal was changed")]
    return row[0], row[2], []


def rows(connection: Connection) -> Iterator[Any]:
    """Yield the column tuples of all rows by id, and a `Gap` where SQLite cannot read."""
    after = 0
    while True:
        try:
            for row in connection.execute(f"{SELECT} WHERE id > ? ORDER BY id", (after,)):
                yield row
                after = max(after, row[0])
            return
        except sqlite.Error as error:
            resume, end = _resume(connection, after)
            if resume is None:
                if end > after:
                    yield Gap(after + 1, end, str(error))
                else:
                    yield Gap(after + 1, after + 1, f"{error}; how many rows follow is not known")
                return
            if resume > after + 1:
                yield Gap(after + 1, resume - 1, str(error))
            elif _stuck(connection, after, resume):
                yield Gap(resume, resume, str(error))
                resume += 1
            after = resume - 1


def _stuck(connection: Connection, after: int, resume: int) -> bool:
    """Tell whether a scan from `after` fails before its first row although that row can be had alone."""
    try:
        row = connection.execute(f"{SELECT} WHERE id > ? ORDER BY id LIMIT 1", (after,)).fetchone()
    except sqlite.Error:
        return True
    return bool(row is None or row[0] < resume)


def _resume(connection: Connection, after: int) -> tuple[int | None, int]:
    """Find the next id that can be read, and the last id that the file knows of."""
    end = 0
    for query in ("SELECT max(id) FROM events", f"SELECT max(id) FROM events INDEXED BY {INDEX}"):
        try:
            end = max(end, connection.execute(query).fetchone()[0] or 0)
        except sqlite.Error:
            continue
    for id in range(after + 1, (end or after + _PROBES) + 1):
        try:
            if connection.execute(f"{SELECT} WHERE id = ?", (id,)).fetchone():
                return id, end
        except sqlite.Error:
            continue
    return None, end


def check_index(connection: Connection, audit: Audit) -> None:
    """Compare the index of streams with the rows that passed: it knows of rows that a damaged table has lost."""
    places = last = 0
    try:
        for stream, seq, id in connection.execute(f"SELECT stream, seq, id FROM events INDEXED BY {INDEX}"):
            places ^= hash((stream, seq, id))
            last = max(last, id)
    except sqlite.Error as error:
        audit.damage.append(Damage("index", f"the index of streams cannot be read: {error}"))
        return
    if last >= audit._expected:
        audit._gap(
            audit._expected, last, "missing", "the index of streams knows of these rows, the table does not"
        )
    elif places != audit.places:
        audit.damage.append(Damage("index", "the index of streams and the rows disagree"))


def check_file(connection: Connection, audit: Audit) -> None:
    """Let SQLite check the whole file: pages, free list, types, index."""
    try:
        found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)")]
    except sqlite.Error as error:
        found = [str(error)]
    audit.damage.extend(Damage("file", text) for text in found if text != "ok")


__all__ = ["Audit", "Gap", "Report", "check_file", "check_index", "identity", "rows"]
