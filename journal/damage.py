# SPDX-License-Identifier: Apache-2.0
"""How damage to a journal is described."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal[
    "row",  # a row that does not hash to its chain value
    "unproved",  # a row that was read but that nothing proves, because the one before it is not known
    "missing",  # ids that should be there and are not
    "unreadable",  # ids in a part of the file that SQLite cannot read
    "order",  # a stream whose numbers do not run on
    "body",  # a known event type whose body does not decode
    "index",  # the index of streams and the rows disagree
    "wal",  # frames of the write-ahead log with committed ones after them
    "file",  # what SQLite says about the file as a whole
    "line",  # a line of an exported file
]


class Damage(msgspec.Struct, frozen=True):
    """One damaged place.

    `first` and `last` are the record ids concerned (0: none in particular), `column` the column when it is known, `offset` the
    byte place in `file` (-1: unknown).
    """

    kind: Kind
    what: str
    first: int = 0
    last: int = 0
    column: str = ""
    file: str = ""
    offset: int = -1

    def __str__(self) -> str:
        place = ""
        if self.first:
            place = (
                f"row {self.first}" if self.last in (0, self.first) else f"rows {self.first} to {self.last}"
            )
        if self.column:
            place += f", column {self.column}"
        if self.offset >= 0:
            place = (
                f"{place} ({self.file} at byte {self.offset})"
                if place
                else f"{self.file} at byte {self.offset}"
            )
        return f"{place}: {self.what}" if place else self.what


class Torn(msgspec.Struct, frozen=True):
    """An unfinished end: what a crash in the middle of a write leaves behind. It was never acknowledged.

    A flipped bit in the last transaction looks the same, so it is always told. `offset` is the byte place in `file`, `frames`
    how many pages or lines of it there are.
    """

    file: str
    offset: int
    frames: int
    what: str
