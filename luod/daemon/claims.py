# SPDX-License-Identifier: Apache-2.0
"""Claims: what one client may do with its own session after the kexec, from CLAIM to the end.

luod believes no client that a session is finished: it asks the kernel, for those that say so and for those that never say anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import anyio.to_thread

from ..adapters.liveupdate.errors import KernelError
from ..engine.errors import Refused
from ..engine.ports import Intent
from ..states import events as ev
from ..states.fold import Effect, Session
from ..states.names import check_client_id
from ..states.table import OUTGOING, SESSION
from ..states.table import SessionState as S
from ..views import to_json
from . import effects
from .connection import Connection
from .ending import release, retrieve
from .rights import Rights, out_of_order

if TYPE_CHECKING:
    from .core import Luod

Reply = dict[str, Any]


class Claims:
    """Serves the clients of one luod in the new kernel."""

    def __init__(self, luod: Luod, rights: Rights) -> None:
        self.luod = luod
        self.engine = luod.engine
        self.rights = rights

    async def claim(self, connection: Connection, command: Any) -> tuple[Reply, str] | None:
        """Hand a session back. Returns the reply and the name of the fd that goes with it, or None when it was sent already."""
        client = check_client_id(command.id)
        async with self.luod.lock(client):
            session = self.rights.mine(connection, client, "CLAIM")
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
        session = self.rights.mine(connection, command.id, "RESTORED")
        self.rights.speaks(connection, session, "RESTORED")
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
        session = self.rights.mine(connection, command.id, "FINISHED")
        async with self.luod.lock(session.client):
            session = self.engine.book.session(session.id) or session
            if session.state == S.FINISHED:
                return {"state": session.state}
            self.rights.speaks(connection, session, "FINISHED")
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

    async def poll(self) -> None:
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
