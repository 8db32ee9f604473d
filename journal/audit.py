# SPDX-License-Identifier: Apache-2.0
"""Reads every row once, checks it, and goes on past damage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from msgspec.structs import replace

from ..states import codec
from ..states.errors import BadEvent, UnknownEvent
from .damage import Damage, Kind, Torn
from .diagnose import explain
from .record import CHAIN_SIZE, COLUMNS, Record, follows, genesis
from .sqlite import READ_ERRORS, Connection, sqlite

SELECT = f"SELECT {', '.join(COLUMNS)} FROM events"
INDEX = "sqlite_autoindex_events_1"
_TYPES: tuple[type, ...] = (int, str, int, str, int, int, str, str, int, bytes, bytes)
_PROBES = 4096  # how many ids behind an unreadable one are tried one by one, before the steps double
_LARGEST = (1 << 63) - 1
_SEARCHES = 100  # how many damaged rows are searched for a flipped bit


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
    """Checks a run of rows as they pass. Iterate over `run` to get the records, then ask for `report()`.

    A record comes out when its chain value proves it; a row with one flipped bit comes out as it was, and is reported. The row behind a gap
    comes out although nothing proves it, and is reported as `unproved`. Everything else that is damaged is only reported.
    """

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
        self.expected = 1
        self._holes = start is None
        self._decode = decode

    def run(self, rows: Iterable[Any]) -> Iterator[Record]:
        """Check `rows` (column tuples or `Gap`s) and yield the records that are sound."""
        for row in rows:
            if isinstance(row, Gap):
                self.gap(row.first, row.last, "unreadable", row.why)
                continue
            record = self._check(row)
            if record is not None:
                self.rows += 1
                yield record

    def gap(self, first: int, last: int, kind: Kind, what: str) -> None:
        """Report ids that are not there to be read; the row behind them cannot be proved."""
        self.damage.append(Damage(kind, what, first, last))
        self._previous, self.expected, self._holes = None, last + 1, True

    def _check(self, row: tuple[Any, ...]) -> Record | None:
        self.places ^= hash((row[1], row[2], row[0]))
        for name, value, wanted in zip(COLUMNS, row, _TYPES, strict=True):
            if not isinstance(value, wanted) and not (name == "cause" and value is None):
                what = f"holds {type(value).__name__}, not {wanted.__name__}"
                self._bad(Damage("row", what, row[0], column=name), row)
                return None
        record = Record(*row)
        if record.id != self.expected:
            mended = replace(record, id=self.expected)
            if self._previous is not None and follows(self._previous, mended):
                what = f"it reads {record.id} and was {mended.id}"
                self.damage.append(Damage("row", what, mended.id, column="id"))
                record = mended
            elif record.id < self.expected:
                what = f"row {record.id} stands behind row {self.expected - 1}"
                self.damage.append(Damage("row", what, record.id))
                return None
            else:
                self.gap(self.expected, record.id - 1, "missing", "no such rows")
        if self._previous is None:
            what = "the row cannot be proved: the one before it is not known"
            self.damage.append(Damage("unproved", what, record.id))
        elif not follows(self._previous, record):
            damage, found = explain(self._previous, record, search=len(self.damage) < _SEARCHES)
            self._bad(damage, row)
            if found is None:
                return None
            self._previous, record = found.chain, found
        self._previous = self.chain = record.chain
        self.head = record.id
        self.expected = record.id + 1
        self._order(record)
        self._body(record)
        return record

    def _bad(self, damage: Damage, row: tuple[Any, ...]) -> None:
        self.damage.append(damage)
        self._holes = True
        self.expected = max(self.expected, row[0] + 1)
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
    except READ_ERRORS as error:
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
        except READ_ERRORS as error:
            why = str(error)
        # The module reads one row ahead, so the row before the bad one is lost with it: fetch it alone.
        while (single := _first(connection, after + 1)) is not None:
            yield single
            after = single[0]
        resume, end = _resume(connection, after + 1)
        if resume is None:
            yield Gap(
                after + 1,
                max(end, after + 1),
                why if end > after else f"{why}; how much follows is not known",
            )
            return
        yield Gap(after + 1, resume - 1, why)
        after = resume - 1


def _resume(connection: Connection, bad: int) -> tuple[int | None, int]:
    """Find the next row behind `bad` that can be read, and the last id that the file knows of (0: it does not)."""
    end = 0
    for query in ("SELECT max(id) FROM events", f"SELECT max(id) FROM events INDEXED BY {INDEX}"):
        try:
            end = max(end, connection.execute(query).fetchone()[0] or 0)
        except READ_ERRORS:
            continue
    id, step, tried = bad + 1, 1, 0
    while id <= min(end or bad + _PROBES, _LARGEST):
        found = _first(connection, id)
        if found is not None:
            back = _PROBES if step > 1 else 0
            while back and id - 1 > bad and _first(connection, id - 1) is not None:
                id, back = id - 1, back - 1
            return (id if step > 1 else found[0]), end
        tried += 1
        step = step * 2 if tried > _PROBES else 1
        id += step
    return None, end


def _first(connection: Connection, id: int) -> Any | None:
    """Return the first row from `id` on, or None when there is none or it cannot be read."""
    try:
        row = connection.execute(
            f"{SELECT} WHERE id >= ? ORDER BY id LIMIT 1", (min(id, _LARGEST),)
        ).fetchone()
    except READ_ERRORS:
        return None
    return row if row and row[0] >= id else None


def check_index(connection: Connection, audit: Audit) -> None:
    """Compare the index of streams with the rows that passed: it knows of rows that a damaged table has lost."""
    places = last = 0
    try:
        for stream, seq, id in connection.execute(f"SELECT stream, seq, id FROM events INDEXED BY {INDEX}"):
            places ^= hash((stream, seq, id))
            last = max(last, id)
    except READ_ERRORS as error:
        audit.damage.append(Damage("index", f"the index of streams cannot be read: {error}"))
        return
    if last >= audit.expected:
        audit.gap(
            audit.expected, last, "missing", "the index of streams knows of these rows, the table does not"
        )
    elif places != audit.places:
        audit.damage.append(Damage("index", "the index of streams and the rows disagree"))


def check_file(connection: Connection, audit: Audit) -> None:
    """Let SQLite check the whole file: pages, free list, types, index."""
    try:
        found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)")]
    except READ_ERRORS as error:
        found = [str(error)]
    audit.damage.extend(Damage("file", text) for text in found if text != "ok")


__all__ = ["Audit", "Gap", "Report", "check_file", "check_index", "identity", "rows"]
