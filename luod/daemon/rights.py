# SPDX-License-Identifier: Apache-2.0
"""Who may speak of what: a command is checked against the caller's uid and connection before anything else is looked at.

An id that belongs to another uid is answered like one that does not exist, except at SUBSCRIBE, where the caller must learn that the id
is taken.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..engine.errors import Refused
from ..states.fold import Session
from ..states.names import check_client_id
from .connection import Connection

if TYPE_CHECKING:
    from .core import Luod


class Rights:
    """What callers of one luod may see and do."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod

    def is_admin(self, uid: int) -> bool:
        """Say whether a uid may see and steer everything."""
        return uid in (0, os.getuid()) or uid in self.luod.config.admins

    def mine(self, connection: Connection, client: str, verb: str) -> Session:
        """Return the newest session of a client id that the caller owns. Raises `Refused` when there is none that it may know of."""
        client = client or (connection.clients[-1] if connection.clients else "")
        if not client:
            raise Refused(
                "OUT_OF_ORDER", f"{verb} before SUBSCRIBE or CLAIM", hint="SUBSCRIBE with an id first"
            )
        check_client_id(client)
        session = self.luod.engine.book.of_client(client)
        if session is None or not self.may_see(connection, session):
            raise Refused(
                "UNKNOWN_ID", f"{verb}: luod knows no session of {client!r} for uid {connection.peer.uid}",
                hint="check the id; a client whose session does not exist starts cold",
            )  # fmt: skip
        return session

    def may_see(self, connection: Connection, session: Session) -> bool:
        """Say whether a caller may know of a session."""
        owner = session.owner
        return self.is_admin(connection.peer.uid) or (owner is not None and owner.uid == connection.peer.uid)

    def speaks(self, connection: Connection, session: Session, verb: str) -> None:
        """Raise `Refused` unless this very connection speaks for the client of a session."""
        if self.luod.connection(session) is not connection:
            raise Refused(
                "NOT_SUBSCRIBED", f"{verb}: this connection does not speak for {session.client!r}",
                hint="SUBSCRIBE or CLAIM on this connection first",
            )  # fmt: skip


def out_of_order(session: Session, verb: str) -> Refused:
    """Say that a command came at the wrong time."""
    return Refused(
        "OUT_OF_ORDER",
        f"{verb}: session {session.id} is {session.state}",
        hint="docs/protocol.md shows the order",
    )
