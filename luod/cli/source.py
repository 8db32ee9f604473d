# SPDX-License-Identifier: Apache-2.0
"""Where the records of a journal come from: luod, a database or a copy of one, or an exported file. One shape for all.

Iterate once; afterwards `damage`, `torn` and `head` say what was met on the way. A file is never changed: the database is copied first.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..client import Client
from ..journal.record import Record
from . import reach

if TYPE_CHECKING:
    from ..journal.audit import Report

Json = dict[str, Any]
SQLITE_MAGIC = b"SQLite format 3\0"


class Source(Protocol):
    """Records in the order of their ids, and what is wrong with where they come from."""

    name: str

    def records(self, after: int = 0, stream: str | None = None) -> Iterator[Record]:
        """Yield the records with an id above `after`, of one stream or of all."""
        ...

    def report(self) -> Report | None:
        """Return what was found so far, or None when luod itself vouches for its records."""
        ...


class Remote:
    """The journal of a running luod, as far as the caller may see it."""

    def __init__(self, client: Client) -> None:
        self.name = "luod"
        self._client = client

    def records(self, after: int = 0, stream: str | None = None) -> Iterator[Record]:
        """Ask page by page."""
        for one in self._client.records(after, stream):
            yield record_of(one)

    def report(self) -> None:
        """Luod has checked its journal when it started."""


class Offline:
    """A file: a database with its log, or an exported journal."""

    def __init__(self, name: str, found: Any) -> None:
        self.name = name
        self._found = found

    def records(self, after: int = 0, stream: str | None = None) -> Iterator[Record]:
        """Read all of it, for what was not read is not checked; yield what is asked for."""
        for record in self._found:
            if record.id > after and (stream is None or record.stream == stream):
                yield record

    def report(self) -> Report:
        """Tell what was found."""
        report: Report = self._found.report()
        return report


@contextmanager
def open_source(socket: str, path: Path | None) -> Generator[Source]:
    """Open the journal at `path`, or that of the luod behind `socket`.

    Raises `TransportError`, or `JournalMissing`, `NotAJournal`, `NewerSchema` and `JournalError`.
    """
    if path is None:
        with reach.connect(socket) as client:
            yield Remote(client)
        return
    with open_file(path) as found:
        yield found


@contextmanager
def open_file(path: Path) -> Generator[Offline]:
    """Open a database, a copy of one, or an exported journal."""
    from ..journal import export
    from ..journal.replay import Replay

    if export.looks_like(path):
        yield Offline(str(path), export.Import(path))
        return
    check_beginning(path)
    with Replay(path) as replay:
        yield Offline(str(path), replay)


def check_beginning(path: Path) -> None:
    """Raise `NotAJournal` for a file that does not even begin like one: nothing in it could be read."""
    from ..journal.errors import NotAJournal

    try:
        with path.open("rb") as file:
            head = file.read(len(SQLITE_MAGIC))
    except OSError:
        return  # who reads it says it better
    if not head.strip(b"\0"):
        what = "it is empty" if not head else "it begins with zeros"
    elif head != SQLITE_MAGIC:
        what = "it does not begin like a SQLite database"
    else:
        return
    raise NotAJournal(
        f"{path} is not a journal of luod: {what}", hint="name another file; this one was not changed"
    )


def locate(socket: str, path: Path | None) -> Path:
    """Return `path`, or where the luod behind `socket` keeps its journal: some things need the file itself."""
    if path is not None:
        return path
    return Path(str(reach.ask(socket, "STATUS")["journal"]["path"]))


def record_of(one: Json) -> Record:
    """Turn what luod sends back into a record. Its chain value is not sent."""
    import msgspec

    body: Any = one["body"]
    fields = cast("Json", body) if isinstance(body, dict) else {}
    raw = (
        bytes.fromhex(fields["undecodable"]) if list(fields) == ["undecodable"] else msgspec.json.encode(body)
    )
    return Record(
        one["id"], one["stream"], one["seq"], one["type"], one["wall_ns"], one["boot_ns"], one["boot_id"],
        one["run_id"], one["cause"], raw, b"",
    )  # fmt: skip


def damage_json(report: Report | None) -> Json:
    """Return what is wrong with a source as every verb shows it."""
    if report is None:
        return {"damage": [], "torn": None}
    import msgspec

    return {
        "damage": [{**msgspec.to_builtins(one), "text": str(one)} for one in report.damage],
        "torn": msgspec.to_builtins(report.torn),
    }
