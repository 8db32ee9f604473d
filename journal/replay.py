# SPDX-License-Identifier: Apache-2.0
"""Reads a journal without disturbing it: copies the database and its log, and opens the copy.

The copy is consistent although a writer may be at work. Within one generation of the log (its header stays the same) the log only
grows, and a checkpoint writes only pages to the database that stand in the log. So: header, database, log, header again; when both
headers are equal, every page of the database that changed meanwhile is overruled by the copied log. Else the log was started over or
removed, and the copy is made again.

Also reads a database without a log, one that is cut or damaged, and an exported file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from . import audit, store, wal
from .damage import Damage
from .errors import JournalError, JournalMissing, NewerSchema, NotAJournal
from .lock import held_here
from .record import Record
from .sqlite import READ_ERRORS, inspect

_TRIES = 20


class Files:
    """The records in files that nobody writes, and what is wrong with them. Iterate once, then ask for `report()`.

    A context manager. Neither file is changed.
    """

    def __init__(self, path: Path, scan: wal.WalScan, *, called: Path, deep: bool = False) -> None:
        """Open a database whose log looks like `scan`; `called` is the name for reports. `deep`: SQLite checks its file as well.

        Raises `NotAJournal` and `NewerSchema`. Damage is no error here.
        """
        self._deep = deep
        wrong: list[Damage] = []
        journal, start = "", None
        self._connection = inspect(path)
        try:
            store.version(self._connection, called)
            journal, start, wrong = audit.identity(self._connection)
        except (NotAJournal, NewerSchema):
            self._connection.close()
            raise
        except (*READ_ERRORS, JournalError) as error:
            wrong = [Damage("file", str(error), file=called.name)]
        self.genesis = start
        self.audit = audit.Audit(str(called), journal, start)
        self.audit.damage.extend([*wrong, *scan.damage])
        self.audit.torn = scan.torn

    def __iter__(self) -> Iterator[Record]:
        yield from self.audit.run(audit.rows(self._connection))
        audit.check_index(self._connection, self.audit)
        if self._deep:
            audit.check_file(self._connection, self.audit)

    def report(self) -> audit.Report:
        """Tell what was found up to where the iteration has come."""
        return self.audit.report()

    def close(self) -> None:
        """Close the files."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Replay(Files):
    """A copy of a journal, made while it may be in use; leaving the context removes the copy."""

    def __init__(self, path: Path | str, *, deep: bool = False) -> None:
        """Copy the journal at `path` and open the copy. `deep` lets SQLite check the whole file as well.

        Raises `JournalMissing`, `NotAJournal`, `NewerSchema`, and `JournalError` when the journal changes too fast to be copied
        or is open for writing in this very process. Damage is no error here.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="luod-journal-")
        try:
            copy, scan = snapshot(Path(path), Path(self._directory.name))
            super().__init__(copy, scan, called=Path(path), deep=deep)
        except BaseException:
            self._directory.cleanup()
            raise

    def close(self) -> None:
        """Remove the copy."""
        super().close()
        self._directory.cleanup()


def snapshot(path: Path, directory: Path) -> tuple[Path, wal.WalScan]:
    """Copy the journal at `path` and its log into `directory`, consistently; return the copy and what its log looks like.

    Raises `JournalMissing`, `NotAJournal`, `JournalError`.
    """
    if held_here(path):
        raise JournalError(f"{path} is open in this process", hint="read it through Journal.read")
    copy, log = directory / "journal.db", path.with_name(path.name + "-wal")
    copied_log = directory / "journal.db-wal"
    before = b""
    for _ in range(_TRIES):
        try:
            if not path.is_file():
                raise _missing(path)
            first = _state(path, log)
            shutil.copyfile(path, copy)
            _copy_log(log, copied_log)
            if _state(path, log) != first:
                continue
            scan = wal.scan_file(copied_log)
            frames = copied_log.read_bytes() if copied_log.exists() else b""
        except OSError as error:
            raise JournalMissing(
                f"cannot read {path}: {error.strerror}", hint="run this as the user of luod"
            ) from None
        if scan.damage and frames != before:
            before = (
                frames  # the writer may have been seen in the middle of a write: damage stays, that passes
            )
            continue
        return copy, scan
    raise JournalError(
        f"{path} changes faster than it can be copied", hint="try again, or ask the running luod"
    )


def _missing(path: Path) -> JournalError:
    if path.is_dir():
        return NotAJournal(f"{path} is not a journal of luod: it is a directory", hint="name the file in it")
    return JournalMissing(f"there is no journal at {path}", hint="see `journal` in the settings of luod")


def _copy_log(log: Path, to: Path) -> None:
    try:
        shutil.copyfile(log, to)
    except FileNotFoundError:
        to.unlink(missing_ok=True)


def _state(path: Path, log: Path) -> tuple[object, ...]:
    """What must not change while the copy is made: which files, the generation of the log, and without one the database."""
    status = path.stat()
    try:
        with log.open("rb") as file:
            head = file.read(wal.HEADER.size)
            which = os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        head, which = b"", 0
    quiet = () if head.strip(b"\0") else (status.st_size, status.st_mtime_ns)
    return (status.st_ino, which, head, quiet)
