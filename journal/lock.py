# SPDX-License-Identifier: Apache-2.0
"""Keeps a second luod away from a journal, and knows who has it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from .errors import JournalBusy, JournalMissing

_held: set[Path] = set()


def held_here(path: Path) -> bool:
    """Tell whether this process has the journal open.

    Opening and closing the file a second time in one process would drop its POSIX locks (fcntl(2)).
    """
    return path.resolve() in _held


def holder(descriptor: int) -> int | None:
    """Return the pid that holds a flock on an open file, if the kernel tells it (proc(5), /proc/locks)."""
    status = os.fstat(descriptor)
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) < 8 or fields[1] != "FLOCK":
            continue
        major, minor, inode = fields[5].split(":")
        same = os.makedev(int(major, 16), int(minor, 16)) == status.st_dev
        if same and int(inode) == status.st_ino and int(fields[4]) > 0:
            return int(fields[4])
    return None


class Lock:
    """An flock on `<journal>.lock`, held until `release`. The file stays: removing it would let two processes in."""

    def __init__(self, journal: Path) -> None:
        """Take the lock; raises `JournalBusy` when another process has it, `JournalMissing` when the file cannot be made."""
        self.journal = journal.resolve()
        self.path = journal.with_name(journal.name + ".lock")
        try:
            self._descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "?")
            raise JournalMissing(
                f"cannot open {self.path}: {error.strerror} ({name})",
                hint="run luod as the user that owns the directory of its journal",
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = holder(self._descriptor)
            os.close(self._descriptor)
            raise busy(journal, pid) from None
        _held.add(self.journal)

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._descriptor >= 0:
            _held.discard(self.journal)
            os.close(self._descriptor)
            self._descriptor = -1


def busy(journal: Path, pid: int | None) -> JournalBusy:
    """Describe a journal that is in use."""
    who = f"process {pid}" if pid else "another process"
    return JournalBusy(
        f"the journal {journal} is in use by {who}", hint="only one luod may run; ask it with luoctl", pid=pid
    )
