# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a journal.

JournalError
  NewerSchema         written by a newer luod; nothing was touched
  JournalBusy         another process has it
  JournalVolatile     the file system would forget it, or cannot be trusted with it
  JournalMissing      there is no such file, or it may not be read
  NotAJournal         the file is something else
  JournalDamaged      a journal, but not whole; `damage` says where
  JournalWriteError   a write failed: what became of it is unknown until the next start
  RingError           the black box cannot be read
    RingDivergence    the black box and the disk tell different stories
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..states.errors import LuodError

if TYPE_CHECKING:
    from .damage import Damage


class JournalError(LuodError):
    """Something is wrong with the journal."""

    exit_code = 4


class NewerSchema(JournalError):
    """The journal was written by a newer luod; it was not touched."""

    exit_code = 5


class JournalBusy(JournalError):
    """Another process has the journal. `pid` is its process id when the kernel tells."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", pid: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.pid = pid


class JournalVolatile(JournalError):
    """The directory is on a file system that forgets, or whose fsync and locks cannot be relied on."""

    exit_code = 2


class JournalMissing(JournalError):
    """There is no journal at this path, or this process may not open it."""

    exit_code = 2


class NotAJournal(JournalError):
    """The file exists and is not a journal of luod; it was not touched."""


class JournalDamaged(JournalError):
    """The journal is not whole. `damage` lists the places; the file was not changed."""

    def __init__(self, message: str, *, hint: str = "", damage: Sequence[Damage] = ()) -> None:
        super().__init__(message, hint=hint)
        self.damage = tuple(damage)


class JournalWriteError(JournalError):
    """A write to the journal failed. Whether it is on the disk is decided by the next start."""


class RingError(JournalError):
    """The black box is not one, or too small for what is written to it."""


class RingDivergence(RingError):
    """The black box and the disk have different records under the same id, or do not meet."""
