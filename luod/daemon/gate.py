# SPDX-License-Identifier: Apache-2.0
"""The gate: whom an update waits for before it goes on, and what they are told meanwhile.

Everybody passes two barriers (`engine/barrier.py`): preserved while their guests run, ready when these stand still. At the first, who
has subscribed is given a session; at the second, those whose turn it is are told to freeze. Times are seconds of CLOCK_BOOTTIME.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio

from ..engine import barrier, turns
from ..engine.ports import Intent
from ..states import events as ev
from ..states.errors import IllegalTransition
from ..states.fold import Session, Update
from ..states.table import SessionState as S
from ..states.table import UpdateState as U
from .pulse import now

if TYPE_CHECKING:
    from .core import Luod


class Gate:
    """Lets one update at a time through."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod
        self.engine = luod.engine
        self.book = luod.engine.book
        self.freezing: set[str] = set()
        """The sessions that were told to freeze, while the update waits for the last of them."""

    async def wait(
        self, update: str, name: str, deadline: float, dropped: list[str], among: Sequence[str] = ()
    ) -> list[str] | None:
        """Wait at a barrier; return the sessions that passed, or None when the update is being undone.

        The second barrier is `among` those that passed the first: who subscribes in between has come too late for this update.
        """
        since = now()
        while True:
            beat = self.luod.pulse.current()
            record = self.book.known_update(update)
            if record.abort_reason:
                return None
            if name == "preserved":
                await self._invite(update)
            else:
                self._freeze_next([one for one in among if one not in dropped], deadline)
            verdict = await self._judge(update, name, since, deadline, dropped, among)
            if verdict is None:
                return None
            if verdict.go is not None:
                return list(verdict.go)
            if not verdict.drop:
                with anyio.move_on_after(max(0.0, verdict.wake - now()) + 0.001):
                    await beat.wait()

    async def _judge(
        self,
        update: str,
        name: str,
        since: float,
        deadline: float,
        dropped: list[str],
        among: Sequence[str] = (),
    ) -> barrier.Verdict | None:
        """Ask a barrier, and undo whom it drops; return its verdict, or None when the update is being undone."""
        verdict = barrier.judge(
            name,
            [one for one in self.participants(update, among) if one.id not in dropped],
            now=now(),
            since=since,
            deadline=deadline,
            is_gone=self.luod.is_gone,
        )
        for trouble in verdict.drop:
            dropped.append(trouble.session)
            self.luod.spawn(self.luod.ending.undo, [trouble.session], trouble.why)
        if verdict.abort:
            await self.stop(update, verdict.abort)
            return None
        return verdict

    async def goes_on(self, update: str, dropped: list[str]) -> bool:
        """Look who has died, refused or changed his mind while luod itself is busy; say whether the update goes on."""
        never = float("inf")
        return (
            not self.book.known_update(update).abort_reason
            and await self._judge(update, "ready", never, never, dropped) is not None
        )

    def participants(self, update: str, among: Sequence[str] = ()) -> list[Session]:
        """Return everybody the update has to wait for: also those that subscribed and have no kernel session yet.

        After a restart of luod their connections are gone for a moment; an update that went on without them would lose them.
        """
        if among:
            return [self.book.known_session(one) for one in among]
        return [one for one in self.book.sessions() if one.update == update or one.state == S.NEW]

    def joining(self) -> list[Session]:
        """Return the sessions whose clients have subscribed, are connected, and have no kernel session yet."""
        return [
            one
            for one in self.book.live_sessions()
            if self._may_join(one) and self.luod.connection(one) is not None
        ]

    def _may_join(self, session: Session) -> bool:
        return session.state == S.NEW and not session.abort_reason

    async def _invite(self, update: str) -> None:
        """Give every subscribed client that has none yet its kernel session."""
        fresh = self.joining()
        for kind in ("create", "mark"):
            if not fresh:
                return
            intents = [
                Intent(
                    one.id, f"{one.id}/{kind}", f"session.{kind}", {"name": one.kernel_name, "session": one.id},
                )
                for one in fresh
            ]  # fmt: skip
            effects = await self.engine.perform(*intents)
            bad = {e.key.rpartition("/")[0]: e for e in effects if e.status != "done"}
            for one in [one for one in fresh if one.id in bad]:
                why = f"its kernel session could not be made: {bad[one.id].message}"
                if one.policy == "required":
                    await self.stop(update, f"{one.id}: {why}")
                await self.luod.ending.undo([one.id], why)
            fresh = [
                one for one in map(self.book.known_session, [one.id for one in fresh]) if self._may_join(one)
            ]
        if self.book.known_update(update).abort_reason or not fresh:
            return
        doubts = [effect.key for one in fresh for effect in one.doubts()]
        if doubts:
            await self.stop(update, f"{doubts[0]} is in doubt: settle it with `luoctl resolve`")
            return
        try:
            await self.engine.record(*((one.id, ev.SessionCreated(update, one.kernel_name)) for one in fresh))
        except IllegalTransition:
            return  # one of them has left meanwhile: the barrier looks again
        await self.hand(*(one.id for one in fresh))

    async def hand(self, *sessions: str) -> None:
        """Send START_PRESERVATION with the session fd. A client that has gone is the barrier's business."""
        intents: list[Intent] = []
        for session in sessions:
            record = self.book.known_session(session)
            self.luod.tell(
                record, {"event": "PRESERVATION_REQUEST", "id": record.client, "update": record.update}
            )
            left = self.deadline(self.book.known_update(record.update)) - now()
            message = {
                "event": "START_PRESERVATION", "id": record.client, "session": session, "fds": 1,
                "deadline_s": round(min(left, record.deadline_s or left), 3),
            }  # fmt: skip
            args: dict[str, Any] = {"name": record.kernel_name, "message": message}
            intents.append(Intent(session, f"{session}/hand", "session.hand", args))
        await self.engine.perform(*intents, again=True)

    def _freeze_next(self, going: Sequence[str], until: float) -> None:
        """Tell those whose turn it is to freeze."""
        for session in turns.to_freeze(
            [self.book.known_session(one) for one in going],
            self.freezing,
            self.luod.config.order.freeze_at_once,
        ):
            self.freezing.add(session.id)
            self.freeze(session, until)

    def freeze(self, session: Session, until: float | None = None) -> None:
        """Tell a client to stop its writers and say READY."""
        left = (until - now()) if until else self.luod.config.deadlines.freeze_s
        self.luod.tell(
            session, {"event": "FREEZE", "id": session.client, "deadline_s": round(max(left, 0.0), 3)}
        )

    async def stop(self, update: str, reason: str) -> None:
        """Have an update undone; the first reason counts."""
        if not self.book.known_update(update).abort_reason:
            await self.engine.record((update, ev.UpdateAbortRequested(reason)))

    def deadline(self, update: Update) -> float:
        """Return when an update has to have come to its kexec."""
        began = update.entered.get(U.PREPARING)
        if began is None or update.deadline_s <= 0:
            return float("inf")
        return began.boot_ns / 1e9 + update.deadline_s
