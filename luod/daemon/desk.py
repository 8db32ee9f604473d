# SPDX-License-Identifier: Apache-2.0
"""The desk: what one client may do with its own session up to the kexec.

Each command is checked against the caller (`rights`) and the state of its session before anything is written. What is refused changes
nothing and is answered with a code, what is wrong and what to do.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from .. import __version__, protocol
from ..engine.errors import Refused
from ..states import events as ev
from ..states.fold import Session
from ..states.names import check_client_id
from ..states.table import OUTGOING, SESSION
from ..states.table import SessionState as S
from .connection import Connection
from .rights import Rights, out_of_order

if TYPE_CHECKING:
    from .core import Luod

FEATURES = frozenset({"freeze", "inventory", "progress"})
VERSION = 1
Reply = dict[str, Any]


class Desk:
    """Serves the clients of one luod in the old kernel."""

    def __init__(self, luod: Luod, rights: Rights) -> None:
        self.luod = luod
        self.engine = luod.engine
        self.rights = rights

    async def hello(self, connection: Connection, command: Any) -> Reply:
        """Agree on version and features."""
        if command.version < 1:
            raise Refused(
                "BAD_VERSION", f"version {command.version} does not exist", hint="this luod speaks version 1"
            )
        connection.hello = True
        connection.features = frozenset(command.features) & FEATURES
        return {
            "version": min(command.version, VERSION), "features": sorted(connection.features),
            "server": f"luod {__version__}", "boot_id": self.engine.boot_id,
            "role": "admin" if self.rights.is_admin(connection.peer.uid) else "client",
        }  # fmt: skip

    async def subscribe(self, connection: Connection, command: Any) -> Reply:
        """Bind an id to its owner, or take a subscription up again on a new connection."""
        client = check_client_id(command.id)
        async with self.luod.lock(client):
            book, uid = self.engine.book, connection.peer.uid
            session = book.of_client(client)
            open_ = session is not None and session.state not in SESSION.final
            speaker = self.luod.connection(session) if session else None
            taken = speaker is not None and speaker.peer.uid != uid
            if session is not None and ((open_ and not self.rights.may_see(connection, session)) or taken):
                raise Refused(
                    "NOT_YOURS", f"the id {client!r} belongs to another user", hint="choose another id"
                )
            if speaker is not None and speaker is not connection and speaker.peer.alive() and open_:
                if not speaker.peer.same_process(connection.peer):
                    raise Refused(
                        "ALREADY_SUBSCRIBED", f"the id {client!r} is in use by pid {speaker.peer.pid}",
                        hint="one process speaks for an id; choose another id",
                    )  # fmt: skip
                speaker.close()
            if session is None or not open_:
                self._limit(connection)
                owner = connection.peer.owner()
                attempt = session.attempt + 1 if session else 1
                bound = ev.SessionBound(
                    client,
                    attempt,
                    owner,
                    command.policy,
                    command.deadline_s or 0.0,
                    command.order,
                    command.devices,
                )
                stream = book.next_session(client)
                await self.engine.record((stream, bound))
                session = book.session(stream)
                assert session is not None
            elif session.state not in (S.NEW, *OUTGOING):
                raise Refused(
                    "OUT_OF_ORDER", f"session {session.id} is {session.state}: it waits for CLAIM",
                    hint="CLAIM it, or let an admin give it up",
                )  # fmt: skip
            self.luod.attach(client, connection)
            await self._catch_up(connection, session)
            now = book.session(session.id)
            assert now is not None
            return {"session": now.id, "state": now.state}

    async def _catch_up(self, connection: Connection, session: Session) -> None:
        """Tell a client that came back what it may have missed."""
        update = self.engine.book.current_update()
        older = self.engine.book.session(f"{session.client}.{session.attempt - 1}")
        if session.state == S.NEW and older is not None and self._unheard(connection, older):
            self.luod.told_abort.add(older.id)
            told = {"event": "ABORT", "id": session.client, "session": older.id, "deadline_s": 0.0}
            self.luod.tell(session, {**told, "reason": older.reason})
        if session.abort_reason:
            self.luod.tell(
                session,
                {"event": "ABORT", "id": session.client, "reason": session.abort_reason, "deadline_s": 0.0},
            )
            return
        preparing = update is not None and update.id == session.update and not update.abort_reason
        if preparing and (session.state == S.CREATED or self._succeeds(connection, session)):
            await self.luod.gate.hand(session.id)
        if session.state == S.PRESERVED:
            if session.id in self.luod.gate.freezing:
                self.luod.gate.freeze(session)
            else:
                self.luod.tell(
                    session, {"event": "RESUME", "id": session.client, "reason": session.reason or "go on"}
                )

    def _succeeds(self, connection: Connection, session: Session) -> bool:
        """Say whether another process than the one that bound a session speaks for it now, and so does not have its fd."""
        return (
            session.state in (S.PRESERVED, S.READY)
            and "freeze" in connection.features
            and session.owner is not None
            and session.owner.pid != connection.peer.pid
        )

    def _unheard(self, connection: Connection, session: Session) -> bool:
        """Say whether the caller may still hold a session that was undone while nobody could tell it so."""
        undone = session.entered.get(S.ABORTED)
        return (
            undone is not None
            and undone.boot_id == self.engine.boot_id
            and f"{session.id}/hand" in session.effects
            and session.owner is not None
            and session.owner.pid == connection.peer.pid
            and session.id not in self.luod.told_abort
        )

    def _limit(self, connection: Connection) -> None:
        uid = connection.peer.uid
        if self.rights.is_admin(uid):
            return
        mine = sum(one.owner is not None and one.owner.uid == uid for one in self.engine.book.live_sessions())
        if mine >= self.luod.config.limits.sessions:
            raise Refused(
                "LIMIT", f"uid {uid} has {mine} sessions already", hint="raise limits.sessions in luod.toml"
            )

    async def unsubscribe(self, connection: Connection, command: Any) -> Reply:
        """Take no further part. A session that is in the kernel already is undone."""
        session = self.rights.mine(connection, command.id, "UNSUBSCRIBE")
        self.rights.speaks(connection, session, "UNSUBSCRIBE")
        if session.state in SESSION.final:
            return {}
        self.luod.leaving.add(session.client)
        await self.luod.director.abort_session(session, "its client unsubscribed")
        return {}

    async def preserved(self, connection: Connection, command: Any) -> Reply:
        """Take the inventory of what the client has preserved."""
        session = self.rights.mine(connection, command.id, "PRESERVED")
        self.rights.speaks(connection, session, "PRESERVED")
        if session.state != S.CREATED:
            raise out_of_order(session, "PRESERVED")
        await self.engine.record((session.id, ev.SessionPreserved(resources_of(command.resources))))
        return {}

    async def ready(self, connection: Connection, command: Any) -> Reply:
        """The client has stopped its writers."""
        session = self.rights.mine(connection, command.id or "", "READY")
        self.rights.speaks(connection, session, "READY")
        if session.state not in (S.CREATED, S.PRESERVED) or session.update == "":
            raise out_of_order(session, "READY")
        if (
            session.state == S.PRESERVED
            and session.id not in self.luod.gate.freezing
            and connection.hello
            and "freeze" in connection.features
        ):
            raise out_of_order(session, "READY before FREEZE")
        late = resources_of(command.resources, after=session.declared)
        await self.engine.record((session.id, ev.SessionReady(late, command.spans)))
        return {}

    async def nack(self, connection: Connection, command: Any) -> Reply:
        """The client cannot follow."""
        session = self.rights.mine(connection, command.id, "NACK")
        self.rights.speaks(connection, session, "NACK")
        if session.state not in OUTGOING:
            raise out_of_order(session, "NACK")
        token = getattr(command, "token", None) or ""
        await self.engine.record((session.id, ev.SessionNacked(command.errno, command.message, str(token))))
        return {}

    async def aborted(self, connection: Connection, command: Any) -> Reply:
        """The client has closed its session fd."""
        session = self.rights.mine(connection, command.id, "ABORTED")
        if not session.abort_reason and session.state not in SESSION.final and session.attempt > 1:
            older = self.engine.book.session(f"{session.client}.{session.attempt - 1}")
            session = older or session
        self.luod.said_closed(session.id)
        return {}

    async def adopt(self, connection: Connection, command: Any, fds: list[int]) -> Reply:
        """Take a session fd back from a client, when luod and its second holder have lost theirs."""
        session = self.rights.mine(connection, command.id, "ADOPT")
        if len(fds) != 1:
            raise Refused(
                "BAD_FDS", f"ADOPT needs one fd, {len(fds)} came", hint="send the session fd with the message"
            )
        if not await anyio.to_thread.run_sync(self.luod.kernel.is_session, fds[0]):
            raise Refused(
                "BAD_FDS", "the fd of ADOPT is no live-update session", hint="send the session fd itself"
            )
        name = await anyio.to_thread.run_sync(self.luod.kernel.session_name, fds[0])
        if name != session.kernel_name:
            raise Refused("NOT_YOURS", f"that fd is of session {name!r}, not of {session.client!r}")
        if session.state not in (*OUTGOING, S.RETRIEVED, S.RESTORED, S.FAILED):
            raise out_of_order(session, "ADOPT")
        fd = os.dup(fds[0])
        try:
            await anyio.to_thread.run_sync(self.luod.custody.store, name, fd)
        except BaseException:
            os.close(fd)
            raise
        self.luod.held.put(name, fd)
        self.luod.attach(session.client, connection)
        return {"session": session.id, "state": session.state}


def resources_of(declared: Sequence[Any], after: Sequence[ev.Resource] = ()) -> tuple[ev.Resource, ...]:
    """Turn an inventory from the wire, which comes on top of `after`, into what the journal keeps.

    Raises `Refused` for a token named twice, and for a step named twice in a plan.
    """
    resources = tuple(protocol.to_resource(one) for one in declared)
    tokens = Counter(one.token for one in (*after, *resources))
    steps = Counter(f"{one.token}/{step.step}" for one in resources for step in one.plan)
    for what, names, hint in (
        ("token", tokens, "a token names one resource of a session"),
        ("step", steps, "a step names one call of a restore plan: add #LABEL"),
    ):
        if twice := next((name for name, count in names.items() if count > 1), ""):
            raise Refused("BAD_FIELD", f"{what} {twice} is declared twice", hint=hint)
    return resources
