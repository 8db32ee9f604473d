# SPDX-License-Identifier: Apache-2.0
"""The one SQLite connection of a journal: makes the file, opens it, inserts rows, reads them.

Not thread-safe: `writer.Journal` serialises its use.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from . import audit, layout, volume, wal
from .damage import Damage
from .errors import (
    JournalDamaged,
    JournalError,
    JournalMissing,
    JournalWriteError,
    NewerSchema,
    NotAJournal,
)
from .lock import Lock, busy
from .record import COLUMNS, Record, follows, genesis
from .sqlite import READ_ERRORS, Connection, connect, inspect, pragma

PREGROW = 4 << 20
"""Default size of the log in bytes that is written once at start, so that appends do not allocate blocks."""
_INSERT = f"INSERT INTO events({', '.join(COLUMNS)}) VALUES({', '.join('?' * len(COLUMNS))})"
_FRAME = 4096 + wal.FRAME.size
_HEADER = 100  # bytes of the database header (fileformat2.html section 1.3)


class Store:
    """An open journal database. `head` and `seqs` (last number of each stream) follow what is committed."""

    def __init__(self, path: Path, connection: Connection, lock: Lock, audited: audit.Audit) -> None:
        self.path = path
        self.connection = connection
        self.lock = lock
        self.journal_id = audited.journal
        self.head: tuple[int, bytes] = (audited.head, audited.chain)
        self.seqs = audited.seqs
        self.torn = audited.torn
        self.pregrow = 0
        self._used = 0

    @classmethod
    def open(cls, path: Path, *, volatile: bool = False, pregrow: int = PREGROW) -> Store:
        """Open the journal for writing, making it when there is none.

        Everything is read and checked before a byte is changed. Raises the errors of `journal.errors`.
        """
        volume.check(path.parent, volatile=volatile)
        lock = Lock(path)
        connection: Connection | None = None
        try:
            _absent_or_fit(path)
            if not path.exists():
                _create(path)
            audited = check(path)
            connection = connect(path)
            _configure(connection, path)
            _migrate(connection)
            store = cls(path, connection, lock, audited)
            store.checkpoint()
            store.pregrow = pregrow
            store._grow(pregrow)
            return store
        except READ_ERRORS as error:
            _close(connection)
            lock.release()
            raise _translate(path, error) from error
        except OSError as error:
            _close(connection)
            lock.release()
            raise _refused(path, error) from error
        except BaseException:
            _close(connection)
            lock.release()
            raise

    def insert(self, records: Sequence[Record]) -> None:
        """Commit records in one transaction: durable when this returns. Raises sqlite errors, after which the store is done for."""
        rows = [tuple(getattr(record, name) for name in COLUMNS) for record in records]
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany(_INSERT, rows)
        self.connection.execute("COMMIT")
        last = records[-1]
        self.head = (last.id, last.chain)
        for record in records:
            self.seqs[record.stream] = record.seq
        # the pages at the end of the table and of its index, and one more for every 1500 bytes that fill them
        self._used += _FRAME * (3 + sum(len(record.body) + 200 for record in records) // 1500)

    def rows(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records behind id `after`; raises `JournalDamaged` when they do not hang together."""
        try:
            found = self.connection.execute(
                f"{audit.SELECT} WHERE id >= ? ORDER BY id LIMIT ?", (after, limit + 1)
            ).fetchall()
        except READ_ERRORS as error:
            raise _translate(self.path, error) from error
        records = [Record(*row) for row in found]
        for before, record in itertools.pairwise(records):
            if record.id != before.id + 1 or not follows(before.chain, record):
                raise JournalDamaged(
                    f"{self.path}: row {record.id} no longer follows row {before.id}",
                    hint="stop luod and run `luoctl journal verify` on a copy",
                )
        return [record for record in records if record.id > after]

    def chain_at(self, id: int) -> bytes | None:
        """Return the chain value of row `id`; for 0 the one before the first row; None when there is no such row."""
        query = (
            "SELECT chain FROM events WHERE id = ?"
            if id
            else "SELECT genesis FROM journal WHERE only_row = ? + 1"
        )
        row = self.connection.execute(query, (id,)).fetchone()
        return row[0] if row else None

    def checkpoint(self) -> None:
        """Move the log into the database and start the log over, in place: its blocks stay allocated."""
        row = self.connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if row is None or row[0]:
            raise JournalWriteError(
                f"{self.path}: the checkpoint was refused: {row}", hint="nobody else may open it"
            )
        self._used = 0

    def log_used(self) -> int:
        """Estimate how many bytes of the log are in use: SQLite tells it only by a checkpoint."""
        return self._used

    def close(self) -> None:
        """Close the database: SQLite moves the log into it and removes the log."""
        try:
            self.connection.close()
        finally:
            self.lock.release()

    def _grow(self, size: int) -> None:
        """Fill the log up to `size` bytes with zeros behind what is there; SQLite reads frames up to the first that is none."""
        descriptor = os.open(f"{self.path}-wal", os.O_WRONLY | os.O_CLOEXEC)
        try:
            have = os.fstat(descriptor).st_size
            while have < size:
                have += os.pwrite(descriptor, bytes(min(size - have, 1 << 20)), have)
            if size:
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def check(path: Path, *, decode: bool = False) -> audit.Audit:
    """Read all of the journal at `path` without changing it; the caller holds its lock.

    Raises `JournalDamaged`, `NewerSchema`, `NotAJournal`; returns what is known of its rows.
    """
    scan = wal.scan_file(path.with_name(path.name + "-wal"))
    if scan.damage:
        raise damaged(path, scan.damage)
    connection = inspect(path)
    try:
        version(connection, path)
        journal_id, start, wrong = audit.identity(connection)
        audited = audit.Audit(str(path), journal_id, start, decode=decode)
        audited.torn = scan.torn
        audited.damage.extend(wrong)
        for _ in audited.run(audit.rows(connection)):
            if audited.damage:
                break
        if not audited.damage:
            audit.check_index(connection, audited)
    finally:
        connection.close()
    if audited.damage:
        raise damaged(path, audited.damage)
    return audited


def version(connection: Connection, path: Path) -> int:
    """Return the version of the layout; raises `NotAJournal` and `NewerSchema`."""
    if pragma(connection, "application_id") != layout.APPLICATION_ID:
        raise not_a_journal(path, "it is a database of another application")
    found = int(pragma(connection, "user_version"))
    if found > layout.VERSION:
        raise NewerSchema(
            f"{path} has layout {found}; this luod knows layouts up to {layout.VERSION}",
            hint="run the newer luod again; nothing was changed",
        )
    if found < 1:
        raise damaged(path, [Damage("file", f"the layout number is {found}", file=path.name, offset=60)])
    return found


def header_fits(path: Path) -> None:
    """Look at the first bytes of the file; raises `NotAJournal`, `JournalMissing` or `JournalDamaged`, and OSError."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise not_a_journal(path, f"it is {kind}")
    with path.open("rb") as file:
        head = file.read(_HEADER)
    if not head.strip(b"\0"):
        what = "the file is empty" if not head else "the file begins with zeros"
        raise damaged(path, [Damage("file", what, file=path.name, offset=0)])
    if head[:16] != b"SQLite format 3\0":
        raise not_a_journal(path, "it is not a SQLite database")
    if int.from_bytes(head[68:72]) != layout.APPLICATION_ID:
        raise not_a_journal(path, "it is a database of another application")
    if head[18:20] != b"\2\2":
        raise damaged(
            path, [Damage("file", "the file does not say that it has a log", file=path.name, offset=18)]
        )


def not_a_journal(path: Path, why: str) -> NotAJournal:
    """Describe a file that is something else."""
    return NotAJournal(
        f"{path} is not a journal of luod: {why}", hint="name another file; this one was not changed"
    )


def damaged(path: Path, damage: Sequence[Damage]) -> JournalDamaged:
    """Describe a journal that is not whole."""
    more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
    return JournalDamaged(
        f"the journal {path} is damaged: {damage[0]}{more}",
        hint="`luoctl journal verify` tells everything that can still be read; the file was not changed",
        damage=damage,
    )


def _absent_or_fit(path: Path) -> None:
    if not os.path.lexists(path):
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            what = f"{log.name} is there and {path.name} is not"
            raise damaged(path, [Damage("file", what, file=path.name)])
        return
    header_fits(path)


def _create(path: Path) -> None:
    """Make a new journal beside its place and move it there whole: a half-made one is never found under its name."""
    fresh = path.with_name(path.name + ".new")
    for leftover in (fresh, Path(f"{fresh}-wal"), Path(f"{fresh}-journal")):
        leftover.unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = connect(fresh)
    try:
        pragma(connection, "synchronous=FULL")
        pragma(connection, f"application_id={layout.APPLICATION_ID}")
        pragma(connection, "journal_mode=WAL")
        _migrate(connection)
        name, now = str(uuid.uuid4()), time.time_ns()
        connection.execute("INSERT INTO journal VALUES(1, ?, ?, ?)", (name, now, genesis(f"{name} {now}")))
        # Closing would do this too, but without a word when it fails; the log does not move with the file.
        busy_flag, pages, moved = connection.execute("PRAGMA wal_checkpoint(FULL)").fetchone()
        if busy_flag or pages != moved:
            raise JournalWriteError(
                f"{path}: {moved} of {pages} pages could be written", hint="free space, try again"
            )
    finally:
        connection.close()
    _sync(fresh, os.O_RDONLY)
    os.rename(fresh, path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _configure(connection: Connection, path: Path) -> None:
    """Set what durability hangs on and read it back."""
    pragma(connection, "synchronous=FULL")
    pragma(connection, "wal_autocheckpoint=0")
    mode, level = pragma(connection, "journal_mode=WAL"), pragma(connection, "synchronous")
    locking = pragma(connection, "locking_mode")
    if (mode, level, locking) != ("wal", 2, "exclusive"):
        raise JournalError(
            f"{path}: SQLite answers journal_mode={mode}, synchronous={level}, locking_mode={locking}",
            hint="this SQLite cannot keep a durable journal; install pysqlite3",
        )
    connection.execute("BEGIN IMMEDIATE")  # takes the exclusive lock now rather than at the first event
    connection.execute("ROLLBACK")


def _migrate(connection: Connection) -> None:
    if pragma(connection, "user_version") == layout.VERSION:
        return
    # Most starts find the layout as it should be, and need neither.
    from sqlite_utils import Database

    from . import schema

    schema.migrations.apply(Database(connection))


def _close(connection: Connection | None) -> None:
    if connection is not None:
        connection.close()


def _translate(path: Path, error: Exception) -> JournalError:
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    text = f"{path}: {error} ({name})"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or "locked" in str(error):
        return busy(path, None)
    if (
        name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))
        or "malformed" in str(error)
        or isinstance(error, UnicodeError)
    ):
        return damaged(path, [Damage("file", str(error), file=path.name)])
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
        return JournalMissing(text, hint="run luod as the user that owns the journal")
    return JournalWriteError(text, hint="free space or repair the disk, then start luod again")


def _refused(path: Path, error: OSError) -> JournalError:
    name = errno.errorcode.get(error.errno or 0, "?")
    text = f"{path}: {error.strerror} ({name})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EROFS, errno.ENOTDIR):
        return JournalMissing(text, hint="run luod as the user that owns the journal")
    return JournalWriteError(text, hint="free space or repair the disk, then start luod again")


__all__ = ["PREGROW", "Store", "check", "header_fits", "version"]
