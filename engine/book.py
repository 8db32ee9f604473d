# SPDX-License-Identifier: Apache-2.0
"""The book: every stream of the journal, folded. What it says is what is durable.

`admit` judges events before they are written, `apply` takes them in once they are. Reading a journal is `apply` over all its records,
so that the tool, the engine and the daemon cannot differ in what they believe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec.structs import replace

from ..states import codec
from ..states.errors import BadEvent, UnknownEvent
from ..states.events import Event
from ..states.fold import At, Daemon, Session, Update, evolve, new_record
from ..states.machine import Judge
from ..states.names import session_id
from ..states.table import SESSION, UPDATE

Folded = Session | Update | Daemon


class Row(Protocol):
    """What the book reads of a journal record."""

    @property
    def id(self) -> int: ...  # noqa: D102
    @property
    def stream(self) -> str: ...  # noqa: D102
    @property
    def type(self) -> str: ...  # noqa: D102
    @property
    def wall_ns(self) -> int: ...  # noqa: D102
    @property
    def boot_ns(self) -> int: ...  # noqa: D102
    @property
    def boot_id(self) -> str: ...  # noqa: D102
    @property
    def run_id(self) -> str: ...  # noqa: D102
    @property
    def body(self) -> bytes: ...  # noqa: D102


class Book:
    """All streams, folded; and the judge of what may be added to them."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.streams: dict[str, Folded] = {}
        self.unknown: dict[str, str] = {}
        self._judge = Judge()
        for row in rows:
            self.apply(row)

    def apply(self, row: Row) -> Folded:
        """Take in a durable record and return what its stream has become.

        A record that this version cannot read marks its stream as `unknown`: shown, but not driven.
        """
        old = self.streams.get(row.stream) or new_record(row.stream)
        at = At(row.id, row.boot_id, row.wall_ns, row.boot_ns, row.run_id)
        try:
            new = evolve(old, codec.decode(row.type, row.body), at)
        except (UnknownEvent, BadEvent) as error:
            self.unknown[row.stream] = row.type
            note = f"record {row.id}: {error.message}"
            new = replace(old, seq=old.seq + 1, anomalies=(*old.anomalies, note))
        self.streams[row.stream] = new
        return new

    def admit(self, events: Sequence[tuple[str, Event]], boot_id: str) -> None:
        """Judge events that are about to be written, in order.

        Raises `IllegalTransition` when one of them may not happen; then none of them may be written.
        """
        sketch: dict[str, Folded] = {}
        at = At(boot_id=boot_id)
        for stream, event in events:
            if stream in self.unknown:
                raise UnknownEvent(
                    f"{stream} holds a {self.unknown[stream]} that this version does not know",
                    hint="drive it with the newer luod that wrote it",
                )
            record = sketch.get(stream) or self.streams.get(stream) or new_record(stream)
            self._judge.check(record, event, at)
            sketch[stream] = evolve(record, event, at)

    def session(self, stream: str) -> Session | None:
        """Return a session by its id."""
        record = self.streams.get(stream)
        return record if isinstance(record, Session) else None

    def known_session(self, stream: str) -> Session:
        """Return a session whose id came from this book. Raises LookupError for any other."""
        record = self.streams[stream]
        if not isinstance(record, Session):
            raise LookupError(f"{stream} is no session")
        return record

    def known_update(self, stream: str) -> Update:
        """Return an update whose id came from this book. Raises LookupError for any other."""
        record = self.streams[stream]
        if not isinstance(record, Update):
            raise LookupError(f"{stream} is no update")
        return record

    def sessions(self) -> list[Session]:
        """Return all sessions, in the order in which they were bound."""
        return [record for record in self.streams.values() if isinstance(record, Session)]

    def live_sessions(self) -> list[Session]:
        """Return the sessions that have not ended."""
        return [record for record in self.sessions() if record.state not in SESSION.final]

    def of_client(self, client: str) -> Session | None:
        """Return the newest session of a client id."""
        newest = None
        for record in self.sessions():
            if record.client == client and (newest is None or record.attempt > newest.attempt):
                newest = record
        return newest

    def next_session(self, client: str) -> str:
        """Return the id of the next attempt of a client."""
        newest = self.of_client(client)
        return session_id(client, newest.attempt + 1 if newest else 1)

    def updates(self) -> list[Update]:
        """Return all updates, oldest first."""
        return [record for record in self.streams.values() if isinstance(record, Update)]

    def current_update(self) -> Update | None:
        """Return the update that has not ended; there is at most one."""
        open_ = [record for record in self.updates() if record.state not in UPDATE.final]
        return open_[-1] if open_ else None

    def daemon(self) -> Daemon:
        """Return what the journal knows of luod itself."""
        record = self.streams.get("luod")
        return record if isinstance(record, Daemon) else Daemon(id="luod")
