# SPDX-License-Identifier: Apache-2.0
"""The desk: what one client may do with its own session.

Each command is checked against the caller's uid and the state of its session before anything is written. What is refused changes
nothing and is answered with a code, what is wrong and what to do. An id that belongs to another uid is answered like one that does
not exist, except at SUBSCRIBE, where the caller must learn that the id is taken.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import anyio.to_thread

from .. import __version__, protocol
from ..adapters.liveupdate.errors import KernelError
from ..engine.errors import Refused
from ..engine.ports import Intent
from ..states import events as ev
from ..states.fold import Effect, Session
from ..states.names import check_client_id
from ..states.table import SESSION
from ..states.table import SessionState as S
from ..views import to_json
from . import effects
from .connection import Connection
from .director import OUTGOING
from .ending import release, retrieve

if TYPE_CHECKING:
    from .core import Luod

FEATURES = frozenset({"freeze", "inventory", "progress"})
VERSION = 1
Reply = dict[str, Any]


def out_of_order(session: Session, verb: str) -> Refused:
    """Say that a command came at the wrong time."""
    return Refused(
        "OUT_OF_ORDER",
        f"{verb}: session {session.id} is {session.state}",
        hint="docs/protocol.md shows the order",
    )


class Desk:
    """Serves the clients of one luod."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod
        self.engine = luod.engine

    def is_admin(self, uid: int) -> bool:
        """Say whether a uid may see and steer everything."""
        return uid in (0, os.getuid()) or uid in self.luod.config.admins

    # -- finding the session that a command speaks of

    def _mine(self, connection: Connection, client: str, verb: str) -> Session:
        """Return the newest session of a client id that the caller owns."""
        client = client or (connection.clients[-1] if connection.clients else "")
        if not client:
            raise Refused(
                "OUT_OF_ORDER", f"{verb} before SUBSCRIBE or CLAIM", hint="SUBSCRIBE with an id first"
            )
        check_client_id(client)
        session = self.engine.book.of_client(client)
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

    def _speaks(self, connection: Connection, session: Session, verb: str) -> None:
        if self.luod.connection(session) is not connection:
            raise Refused(
                "NOT_SUBSCRIBED", f"{verb}: this connection does not speak for {session.client!r}",
                hint="SUBSCRIBE or CLAIM on this connection first",
            )  # fmt: skip

    # -- the life of a client in the old kernel

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
            "role": "admin" if self.is_admin(connection.peer.uid) else "client",
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
            if session is not None and ((open_ and not self.may_see(connection, session)) or taken):
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
            await self.luod.director.hand(session.id)
        if session.state == S.PRESERVED:
            if session.id in self.luod.director.freezing:
                self.luod.director.freeze(session)
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
        if self.is_admin(uid):
            return
        mine = sum(one.owner is not None and one.owner.uid == uid for one in self.engine.book.live_sessions())
        if mine >= self.luod.config.limits.sessions:
            raise Refused(
                "LIMIT", f"uid {uid} has {mine} sessions already", hint="raise limits.sessions in luod.toml"
            )

    async def unsubscribe(self, connection: Connection, command: Any) -> Reply:
        """Take no further part. A session that is in the kernel already is undone."""
        session = self._mine(connection, command.id, "UNSUBSCRIBE")
        self._speaks(connection, session, "UNSUBSCRIBE")
        if session.state in SESSION.final:
            return {}
        self.luod.leaving.add(session.client)
        await self.luod.director.abort_session(session, "its client unsubscribed")
        return {}

    async def preserved(self, connection: Connection, command: Any) -> Reply:
        """Take the inventory of what the client has preserved."""
        session = self._mine(connection, command.id, "PRESERVED")
        self._speaks(connection, session, "PRESERVED")
        if session.state != S.CREATED:
            raise out_of_order(session, "PRESERVED")
        await self.engine.record((session.id, ev.SessionPreserved(resources_of(command.resources))))
        return {}

    async def ready(self, connection: Connection, command: Any) -> Reply:
        """The client has stopped its writers."""
        session = self._mine(connection, command.id or "", "READY")
        self._speaks(connection, session, "READY")
        if session.state not in (S.CREATED, S.PRESERVED) or session.update == "":
            raise out_of_order(session, "READY")
        if (
            session.state == S.PRESERVED
            and session.id not in self.luod.director.freezing
            and connection.hello
            and "freeze" in connection.features
        ):
            raise out_of_order(session, "READY before FREEZE")
        late = resources_of(command.resources, after=session.declared)
        await self.engine.record((session.id, ev.SessionReady(late, command.spans)))
        return {}

    async def nack(self, connection: Connection, command: Any) -> Reply:
        """The client cannot follow."""
        session = self._mine(connection, command.id, "NACK")
        self._speaks(connection, session, "NACK")
        if session.state not in OUTGOING:
            raise out_of_order(session, "NACK")
        token = getattr(command, "token", None) or ""
        await self.engine.record((session.id, ev.SessionNacked(command.errno, command.message, str(token))))
        return {}

    async def aborted(self, connection: Connection, command: Any) -> Reply:
        """The client has closed its session fd."""
        session = self._mine(connection, command.id, "ABORTED")
        if not session.abort_reason and session.state not in SESSION.final and session.attempt > 1:
            older = self.engine.book.session(f"{session.client}.{session.attempt - 1}")
            session = older or session
        self.luod.said_closed(session.id)
        return {}

    async def adopt(self, connection: Connection, command: Any, fds: list[int]) -> Reply:
        """Take a session fd back from a client, when luod and its second holder have lost theirs."""
        session = self._mine(connection, command.id, "ADOPT")
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

    # -- the life of a client in the new kernel

    async def claim(self, connection: Connection, command: Any) -> tuple[Reply, str] | None:
        """Hand a session back. Returns the reply and the name of the fd that goes with it, or None when it was sent already."""
        client = check_client_id(command.id)
        async with self.luod.lock(client):
            session = self._mine(connection, client, "CLAIM")
            if session.state == S.LOST:
                raise Refused("LOST", f"session {session.id} is lost: {session.reason}", hint="start cold")
            if session.state in SESSION.final:
                raise Refused(
                    "ENDED",
                    f"session {session.id} is {session.state}",
                    hint="there is nothing to claim; start cold",
                )
            if session.state == S.NEW or (
                session.state in OUTGOING and session.last_boot() == self.engine.boot_id
            ):
                raise out_of_order(session, "CLAIM")
            speaker = self.luod.connection(session)
            if speaker is not None and speaker is not connection:
                if speaker.peer.alive() and not speaker.peer.same_process(connection.peer):
                    raise Refused(
                        "ALREADY_CLAIMED", f"session {session.id} is with pid {speaker.peer.pid}",
                        hint="that process must end before another can have it",
                    )  # fmt: skip
                speaker.close()
            if session.state in (S.REBOOTING, *OUTGOING):
                async with self.luod.turns.place(session, connection):
                    await self._retrieve(session)
            elif not self.luod.held.has(session.kernel_name):
                await self._missing(session)
            elif session.state == S.FAILED:
                await self.luod.ending.retry(session, f"uid {connection.peer.uid}")
            self.luod.attach(client, connection)
            session = self.engine.book.session(session.id) or session
            reply = {
                "id": client, "session": session.id, "state": session.state, "fds": 1,
                "resources": [to_json(one) for one in session.resources], "open_steps": session.open_steps(),
            }  # fmt: skip
            message = dict(reply)
            seq = getattr(command, "seq", None)
            message.update({"reply": seq, "ok": True} if seq is not None else {"event": "SESSION"})
            args: dict[str, Any] = {"name": session.kernel_name, "message": message}
            (handed,) = await self.engine.perform(
                Intent(session.id, f"{session.id}/hand", "session.hand", args), again=True
            )
            if handed.status != "done":
                raise Refused("GONE", f"the session could not be handed over: {handed.message}")
        return None

    async def _missing(self, session: Session) -> None:
        """Look what became of a session that luod and its second holder have both lost; return if it could be had again."""
        there = await self.luod.ending.is_there(session)
        if there == "no" and session.state != S.FAILED:
            cause = "luod and its second holder have both lost it, and no client held it"
            await self.engine.record((session.id, ev.SessionLost(cause)))
            self.luod.spawn(self.luod.director.close_if_done)
            raise Refused("LOST", f"session {session.id} is lost: {cause}", hint="start cold")
        if there != "yes":
            raise Refused(
                "GONE", f"luod no longer holds session {session.id}",
                hint="the process that has its fd can give it back with ADOPT",
            )  # fmt: skip

    async def _retrieve(self, session: Session) -> None:
        (got,) = await self.engine.perform(retrieve(session))
        if got.status == "done":
            await self.engine.record((session.id, ev.SessionRetrieved()))
            return
        if got.errno == "ENOENT":
            await self.engine.record((session.id, ev.SessionLost(got.message)))
            self.luod.spawn(self.luod.director.close_if_done)
            raise Refused("LOST", f"session {session.id} is lost: {got.message}", hint="start cold")
        hint = (
            "try again"
            if got.errno == "EBUSY"
            else "somebody else retrieved it in this boot; see `luoctl session`"
        )
        raise Refused("KERNEL", f"session {session.id} cannot be retrieved now: {got.message}", hint=hint)

    async def restored(self, connection: Connection, command: Any) -> Reply:
        """A step of a restore plan has an outcome."""
        session = self._mine(connection, command.id, "RESTORED")
        self._speaks(connection, session, "RESTORED")
        step = ev.SessionStep(
            str(command.token), command.step, command.ok, command.errno or "", command.took_ms
        )
        key = f"{step.token}/{step.step}"
        known = session.steps.get(key)
        if session.state == S.RESTORED and command.ok and known is not None and known.ok:
            return {"open_steps": []}
        if session.state != S.RETRIEVED:
            raise out_of_order(session, "RESTORED")
        facts: list[tuple[str, ev.Event]] = [(session.id, step)]
        if not command.ok:
            why = f"step {step.step} of {step.token} failed"
            facts.append((session.id, ev.SessionFailed(why, step.errno)))
        elif session.open_steps() == [key]:
            facts.append((session.id, ev.SessionRestored()))
        await self.engine.record(*facts)
        if not command.ok:
            self.luod.spawn(self.luod.director.close_if_done)
        after = self.engine.book.session(session.id) or session
        return {"open_steps": after.open_steps()}

    async def finished(self, connection: Connection, command: Any) -> Reply:
        """The client says that FINISH has run; luod looks for itself."""
        session = self._mine(connection, command.id, "FINISHED")
        async with self.luod.lock(session.client):
            session = self.engine.book.session(session.id) or session
            if session.state == S.FINISHED:
                return {"state": session.state}
            self._speaks(connection, session, "FINISHED")
            if session.state not in (S.RETRIEVED, S.RESTORED):
                raise out_of_order(session, "FINISHED")
            if session.open_steps():
                raise Refused(
                    "OPEN_STEPS", f"session {session.id} has open steps: {', '.join(session.open_steps()[:5])}",
                    hint="report each with RESTORED before FINISH",
                )  # fmt: skip
            if (
                not self.luod.held.has(session.kernel_name)
                and await self.luod.ending.is_there(session) == "no"
            ):
                await self._finished_by(session, "client")
            elif not await self._end_if_finished(session):
                raise Refused(
                    "NOT_FINISHED", f"session {session.id} still holds its files",
                    hint="run the LIVEUPDATE_SESSION_FINISH ioctl first",
                )  # fmt: skip
        return {"state": str(S.FINISHED)}

    async def look_for_finish(self, session: Session) -> bool:
        """Ask the kernel whether a claimed session has been finished by a client that does not say so."""
        async with self.luod.lock(session.client):
            now = self.engine.book.session(session.id)
            if now is None or now.state not in (S.RETRIEVED, S.RESTORED) or now.doubts():
                return False
            return await self._end_if_finished(now)

    async def _end_if_finished(self, session: Session) -> bool:
        if not self.luod.held.has(session.kernel_name):
            raise Refused("GONE", f"luod no longer holds session {session.id}", hint="see `luoctl session`")
        fd = self.luod.held.get(session.kernel_name)
        if not await anyio.to_thread.run_sync(effects.finished, self.luod.kernel, fd):
            return False
        await self._finished_by(session, "marker")
        return True

    async def _finished_by(self, session: Session, proof: Literal["marker", "client"]) -> None:
        facts: list[tuple[str, ev.Event]] = []
        if session.open_steps():
            open_ = ", ".join(session.open_steps()[:5])
            facts.append((session.id, ev.SessionFailed(f"its client ran FINISH with open steps: {open_}")))
        else:
            if session.state == S.RETRIEVED:
                facts.append((session.id, ev.SessionRestored()))
            facts.append((session.id, ev.SessionFinished(proof)))
        await self.engine.record(*facts)
        await self.release(session)
        self.luod.spawn(self.luod.director.close_if_done)

    async def release(self, session: Session) -> Effect:
        """Let luod and its second holder close a session."""
        (released,) = await self.engine.perform(release(session))
        return released

    async def left(self, connection: Connection, clients: Sequence[str]) -> None:
        """A connection has ended: look at what its clients leave behind."""
        for client in clients:
            session = self.engine.book.of_client(client)
            if session is None:
                continue
            if session.state == S.NEW:
                async with self.luod.lock(client):  # it may be coming back right now
                    session = self.engine.book.of_client(client) or session
                    if session.state == S.NEW and self.luod.connection(session) is None:
                        await self.luod.ending.left(session, "its client left before anything was preserved")
            elif session.state in (S.RETRIEVED, S.RESTORED):
                await self._try_look(session)

    async def poll_claimed(self) -> None:
        """Look once at every claimed session whose client may finish without a word."""
        for session in self.engine.book.live_sessions():
            if session.state in (S.RETRIEVED, S.RESTORED) and self.luod.held.has(session.kernel_name):
                connection = self.luod.connection(session)
                if connection is None or not connection.hello:
                    await self._try_look(session)

    async def _try_look(self, session: Session) -> None:
        try:
            await self.look_for_finish(session)
        except (KernelError, Refused):
            return  # the next look, or the client's own word, tells


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
