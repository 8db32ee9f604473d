# SPDX-License-Identifier: Apache-2.0
"""The ends of a session that are not FINISH: undone before the kexec, given up or tried again after it.

Each is a conversation between the client, luod and the second holder, so each can be overtaken by another event at every `await`; what
has been overtaken is looked at again, never assumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from ..adapters.liveupdate.errors import KernelError, SessionUnknown
from ..engine.errors import Refused
from ..engine.ports import Intent
from ..engine.reconcile import Held as HeldAnswer
from ..states import events as ev
from ..states.errors import IllegalTransition
from ..states.fold import Session
from ..states.table import OUTGOING, UNFINISHED, UpdateState
from ..states.table import SessionState as S
from .pulse import now

if TYPE_CHECKING:
    from .core import Luod

NEVER = float("inf")


class Ending:
    """Ends sessions of one luod."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod
        self.engine = luod.engine
        self.book = luod.engine.book
        self._undoing: set[str] = set()
        self._undone: list[str] = []

    # -- before the kexec

    async def undo(self, sessions: Sequence[str], reason: str = "") -> None:
        """Undo sessions: their clients go on, close their fd and say so; luod and its second holder let go.

        Without a `reason` each is undone for the one that its record names.
        """
        names = [one for one in sessions if one not in self._undoing and self._open(one)]
        self._undoing.update(names)
        try:
            await self._ask(names, reason)
            await self._close(names, reason)
            self._undone += names
        finally:
            self._undoing.difference_update(names)
            self.luod.pulse.beat()
        if self.book.current_update() is None:
            await self.rebind()

    async def rebind(self) -> None:
        """Bind again the clients that are still connected after their session was undone.

        Not while the update goes on without one: it would be asked again at once.
        """
        undone, self._undone = self._undone, []
        for name in undone:
            await self.luod.rebind(self.book.known_session(name))

    @property
    def busy(self) -> bool:
        """Whether a session is being undone."""
        return bool(self._undoing)

    async def _ask(self, names: Sequence[str], reason: str) -> None:
        asked: list[tuple[str, ev.Event]] = []
        for session in map(self.book.known_session, names):
            why = reason or session.abort_reason
            if not session.abort_reason:
                asked.append((session.id, ev.SessionAbortRequested(why)))
            if session.state == S.READY:
                asked.append((session.id, ev.SessionThawed(why)))
        if asked:
            await self.engine.record(*asked)
        limit = self.luod.config.deadlines.abort_s
        for session in map(self.book.known_session, names):
            told = {"id": session.client, "reason": session.abort_reason}
            self.luod.tell(session, {"event": "RESUME", **told})
            if self.luod.tell(session, {"event": "ABORT", **told, "deadline_s": limit}):
                self.luod.told_abort.add(session.id)

    async def _close(self, names: Sequence[str], reason: str) -> None:
        by = now() + self.luod.config.deadlines.abort_s
        again = False
        while left := [one for one in names if self._open(one)]:
            # A call that has begun is never cancelled; and while one is in doubt nobody can say what there is to be let go.
            await self.luod.pulse.until(
                lambda: not any(self.book.known_session(one).doubts() for one in left), NEVER
            )
            await self.engine.perform(
                *(
                    release(one)
                    for one in map(self.book.known_session, left)
                    if f"{one.id}/create" in one.effects
                ),
                again=again,
            )
            await self.luod.pulse.until(
                lambda: all(self.luod.let_go(self.book.known_session(one)) for one in left), by
            )
            gone: list[tuple[str, ev.Event]] = []
            for session in map(self.book.known_session, left):
                holder = "" if self.luod.let_go(session) else self.luod.holder(session)
                gone.append((session.id, ev.SessionAborted(reason or session.abort_reason, holder)))
            try:
                await self.engine.record(*gone)
            except IllegalTransition:
                again = True  # an effect of one of them was begun meanwhile

    async def left(self, session: Session, reason: str) -> None:
        """Undo a session whose client has gone before it had anything to preserve."""
        if not session.effects:
            try:
                await self.engine.record((session.id, ev.SessionAborted(reason)))
                return
            except IllegalTransition:
                pass  # somebody was quicker, or its kernel session is being made right now
        with contextlib.suppress(Refused):  # it has ended meanwhile
            await self.luod.director.abort_session(self.book.known_session(session.id), reason)

    # -- after the kexec

    async def give_up(self, session: Session, reason: str) -> None:
        """End a session that waits to be claimed or finished. Its memory is free as soon as no client holds it.

        Raises `Refused` when it waits for neither, or the kernel does not let it be taken.
        """
        async with self.luod.lock(session.client):
            session = self.book.known_session(session.id)
            if session.state not in UNFINISHED:
                raise Refused(
                    "OUT_OF_ORDER",
                    f"session {session.id} is {session.state}",
                    hint="there is nothing to give up",
                )
            if session.state == S.REBOOTING:
                (got,) = await self.engine.perform(retrieve(session))
                if got.errno == "ENOENT":
                    await self.engine.record((session.id, ev.SessionLost(got.message)))
                    return
                if got.status != "done":
                    raise Refused(
                        "KERNEL", f"session {session.id} cannot be given up: {got.message}", hint="try again"
                    )
            await self.engine.record((session.id, ev.SessionExpired(reason)))
            await self.engine.perform(release(session))
        self.luod.spawn(self.luod.director.close_if_done)

    async def retry(self, session: Session, by: str) -> None:
        """Let the client of a failed session try again. Raises `Refused` when it has not failed, or nobody holds it any more."""
        if session.state != S.FAILED:
            raise Refused(
                "OUT_OF_ORDER",
                f"session {session.id} is {session.state}",
                hint="only a failed session is tried again",
            )
        if not self.luod.held.has(session.kernel_name):
            raise Refused(
                "GONE", f"luod no longer holds session {session.id}: {session.reason}",
                hint=f"`luoctl resolve {session.id} give-up` ends it",
            )  # fmt: skip
        await self.engine.record((session.id, ev.SessionRetried(by)))

    async def expire_unclaimed(self) -> None:
        """Give up sessions that nobody has claimed in time, and free their memory."""
        limit = self.luod.config.deadlines.claim_s
        update = self.book.current_update()
        began = update.entered.get(UpdateState.RECOVERING) if update is not None else None
        if limit <= 0 or began is None or now() < began.boot_ns / 1e9 + limit:
            return
        for session in self.book.live_sessions():
            if session.state == S.REBOOTING and self.luod.connection(session) is None:
                try:
                    await self.give_up(session, f"nobody claimed it within {limit:g} s")
                except Refused:
                    continue  # it was claimed meanwhile, or the kernel is busy: the next look tells

    async def is_there(self, session: Session) -> HeldAnswer:
        """Say whether a retrieved session that luod has lost is still held by somebody: by its client, that is.

        The kernel forgets an incoming session at its last close; until then it says that it was retrieved already.
        """
        return await anyio.to_thread.run_sync(self._is_there, session.kernel_name)

    def _is_there(self, name: str) -> HeldAnswer:
        try:
            fd = self.luod.kernel.retrieve_session(name)
        except SessionUnknown:
            return "no"
        except KernelError:
            return "unknown"
        self.luod.custody.store(name, fd)
        self.luod.held.put(name, fd)
        return "yes"

    # -- small things

    def _open(self, name: str) -> bool:
        return self.book.known_session(name).state in (S.NEW, *OUTGOING)


def release(session: Session) -> Intent:
    """Return the intent to let go of a session."""
    return _intent(session, "release")


def retrieve(session: Session) -> Intent:
    """Return the intent to take a session out of the new kernel."""
    return _intent(session, "retrieve")


def _intent(session: Session, what: str) -> Intent:
    args: dict[str, Any] = {"name": session.kernel_name}
    return Intent(session.id, f"{session.id}/{what}", f"session.{what}", args)
