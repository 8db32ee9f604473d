# SPDX-License-Identifier: Apache-2.0
"""The director: drives one update from KEXEC to the kexec, or back to where it began.

It reads the book, asks the barrier, and makes effects; all it decides is in the journal, so that a restarted luod can take the update
up where it was. Times are seconds of CLOCK_BOOTTIME, which every process of a boot shares.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import msgspec

from ..engine import barrier, turns
from ..engine.errors import Refused
from ..engine.ports import Intent
from ..states import events as ev
from ..states.errors import IllegalTransition
from ..states.fold import Session, Update
from ..states.names import BLACK_BOX_SESSION, update_id
from ..states.table import SessionState as S
from ..states.table import UpdateState as U
from .effects import RING

if TYPE_CHECKING:
    from .core import Luod

OUTGOING = (S.CREATED, S.PRESERVED, S.READY)
UNFINISHED = (S.REBOOTING, S.RETRIEVED, S.RESTORED, S.FAILED)


def now() -> float:
    """Return the seconds since boot, suspend included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Director:
    """Drives the updates of one luod, one at a time."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod
        self.engine = luod.engine
        self.freezing: set[str] = set()
        """The sessions that were told to freeze, while the update waits for the last of them."""
        self._driving = False
        self._all_preserved = False

    # -- what clients and admins ask for

    async def start(self, by_uid: int, deadline_s: float, *, force: bool = False) -> str:
        """Begin an update, or go on with one that waits for a person; return its id.

        Raises `Refused` when another update runs, no image is loaded, or sessions of the last update are not finished.
        """
        book = self.engine.book
        current = book.current_update()
        if current is not None:
            if current.state == U.PREPARING and current.paused and not current.abort_reason:
                self._spawn(current.id)
                return current.id
            if current.state != U.RECOVERING:
                raise _running(current)
        open_ = [session for session in book.live_sessions() if self._unfinished(session)]
        if open_ and not force:
            names = ", ".join(session.id for session in open_[:5])
            raise Refused(
                "UNFINISHED",
                f"{len(open_)} sessions of an earlier update are not finished: {names}",
                hint="their memory would be lost: let their clients finish, or use --force to lose them",
            )
        if not await anyio.to_thread.run_sync(self.luod.kernel.loaded):
            raise Refused(
                "NO_IMAGE", "no next kernel is loaded", hint="`luoctl load IMAGE --cmdline ...` first"
            )
        for session in open_:
            await self.luod.ending.give_up(session, f"uid {by_uid} forced another update")
        for session in self._silent():
            await self.luod.ending.left(session, "its client died while luod was away")
        await self.close_if_done()
        current = book.current_update()
        if current is not None:  # another caller was quicker
            raise _running(current)
        number = len(book.updates()) + 1
        update = update_id(number)
        limit = deadline_s or self.luod.config.deadlines.update_s
        joining = tuple(session.id for session in self._joining())
        await self.engine.record((update, ev.UpdateStarted(number, by_uid, joining, limit)))
        self._spawn(update)
        return update

    async def abort(self, reason: str) -> str:
        """Undo the running update; return its id. Raises `Refused` when there is none to undo."""
        update = self.engine.book.current_update()
        if update is None:
            raise Refused("NO_UPDATE", "no update is running", hint="`luoctl status` shows what luod does")
        if update.state not in (U.PREPARING, U.ARMED):
            raise Refused(
                "TOO_LATE",
                f"{update.id} is {update.state}",
                hint="only an update before its kexec can be undone",
            )
        if not update.abort_reason:
            await self.engine.record((update.id, ev.UpdateAbortRequested(reason)))
        self._spawn(update.id)
        self.luod.pulse.beat()
        return update.id

    async def abort_session(self, session: Session, reason: str) -> None:
        """Undo one session; a required one takes the whole update with it at the next look at the barrier."""
        if session.state not in (S.NEW, *OUTGOING):
            raise Refused(
                "TOO_LATE",
                f"{session.id} is {session.state}",
                hint="only a session before the kexec can be undone",
            )
        if not session.abort_reason:
            await self.engine.record((session.id, ev.SessionAbortRequested(reason)))
        self.luod.pulse.beat()
        update = self.engine.book.current_update()
        if update is None or session.policy != "required" or not self._judged(update, session):
            self.luod.spawn(self.luod.ending.undo, [session.id], reason)
        elif not self._driving:
            await self.abort(f"{session.id}: {reason}")

    def _judged(self, update: Update, session: Session) -> bool:
        """Say whether the barrier of this update looks at a session, so that undoing it is the barrier's business."""
        if session.state == S.NEW:
            return self._driving and not self._all_preserved
        return session.update == update.id

    def resume(self, update: Update) -> None:
        """Take an update up again after luod was restarted."""
        if update.abort_reason or not update.paused:
            self._spawn(update.id)
        else:
            self.luod.spawn(self._watch_paused, update.id)

    def _spawn(self, update: str) -> None:
        if not self._driving:
            self._driving = True
            self.luod.spawn(self._drive, update)

    async def _watch_paused(self, update: str) -> None:
        """An update that waits for a person is undone at its deadline."""
        record = self._update(update)
        deadline = self._deadline(record)
        await self.luod.pulse.until(
            lambda: (
                not self._update(update).paused or self._update(update).state != U.PREPARING or self._driving
            ),
            deadline,
        )
        if self._update(update).paused and self._update(update).state == U.PREPARING and not self._driving:
            await self.abort("nobody resumed it before its deadline")

    # -- driving

    async def _drive(self, update: str) -> None:
        try:
            if not self._update(update).abort_reason:
                try:
                    await self._prepare(update)
                except Refused as error:  # an effect that only a person can settle
                    await self._stop(update, f"{error.message}: {error.hint}")
            if self._update(update).abort_reason:
                await self._undo(update)
        finally:
            self._driving = False
            self._all_preserved = False
            self.freezing.clear()

    async def _prepare(self, update: str) -> None:
        """Go from preparing to the kexec. Returns only when the update is being undone."""
        deadline = self._deadline(self._update(update))
        if not await self._box(update):
            return
        dropped: list[str] = []
        going = await self._barrier(update, "preserved", deadline, dropped)
        if going is None:
            return
        unwritten = await self.luod.write_back.wait(update, deadline, lambda: self._goes_on(update, dropped))
        if unwritten is None:
            return
        # Once more: who subscribed meanwhile is not left behind.
        going = await self._barrier(update, "preserved", deadline, dropped)
        if going is None:
            return
        self._all_preserved = True
        self.luod.checkpoint()  # the last quiet moment: from here every fsync is blackout
        freeze_by = min(deadline, now() + self.luod.config.deadlines.freeze_s)
        going = await self._barrier(update, "ready", freeze_by, dropped, going)
        if going is None:
            return
        try:
            armed = ev.UpdateArmed(tuple(going), tuple(dropped), unwritten or msgspec.UNSET)
            await self.engine.record((update, armed))
        except IllegalTransition as error:
            await self._stop(update, str(error))
            return
        (scratch,) = await self.engine.perform(
            Intent(update, f"{update}/scratch", "update.scratch"), again=True
        )
        if scratch.status != "done":
            await self._stop(update, f"the scratch session failed: {scratch.message}")
            return
        if self._update(update).abort_reason or any(self._session(one).abort_reason for one in going):
            await self._stop(update, "an abort came in before the kexec")
            return
        await anyio.lowlevel.checkpoint()  # a luod that is being stopped does not jump
        await self._kexec(update, going)

    async def _kexec(self, update: str, going: Sequence[str]) -> None:
        """Say the last words, and jump. One fsync, and none after it."""
        last_words: list[tuple[str, ev.Event]] = [(one, ev.SessionRebooting(update)) for one in going]
        last_words.append((update, ev.UpdateRebooting(tuple(going))))
        jump = Intent(update, f"{update}/reboot", "update.reboot")
        try:
            (effect,) = await self.engine.perform(jump, again=True, saying=last_words)
        except IllegalTransition as error:
            await self._stop(update, str(error))
            return
        await self.refused(update, effect.errno, effect.message)

    async def refused(self, update: str, errno: str, message: str) -> None:
        """The kexec did not happen: put every session back to where it was, and undo the update."""
        record = self._update(update)
        back: list[tuple[str, ev.Event]] = [
            (one, ev.SessionRebootRefused(errno))
            for one in record.sessions
            if self._session(one).state == S.REBOOTING
        ]
        await self.engine.record(*back, (update, ev.UpdateRefused(errno, message)))
        await self._stop(update, f"the kernel refused the kexec: {errno} {message}".strip())

    async def _barrier(
        self, update: str, name: str, deadline: float, dropped: list[str], among: Sequence[str] = ()
    ) -> list[str] | None:
        """Wait at a barrier; return the sessions that passed, or None when the update is being undone.

        The second barrier is `among` those that passed the first: who subscribes in between has come too late for this update.
        """
        since = now()
        while True:
            beat = self.luod.pulse.current()
            record = self._update(update)
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
            [one for one in self._participants(update, among) if one.id not in dropped],
            now=now(),
            since=since,
            deadline=deadline,
            is_gone=self.luod.is_gone,
        )
        for trouble in verdict.drop:
            dropped.append(trouble.session)
            self.luod.spawn(self.luod.ending.undo, [trouble.session], trouble.why)
        if verdict.abort:
            await self._stop(update, verdict.abort)
            return None
        return verdict

    async def _goes_on(self, update: str, dropped: list[str]) -> bool:
        """Look who has died, refused or changed his mind while luod itself is busy; say whether the update goes on."""
        never = float("inf")
        return (
            not self._update(update).abort_reason
            and await self._judge(update, "ready", never, never, dropped) is not None
        )

    def _participants(self, update: str, among: Sequence[str] = ()) -> list[Session]:
        """Return everybody the update has to wait for: also those that subscribed and have no kernel session yet.

        After a restart of luod their connections are gone for a moment; an update that went on without them would lose them.
        """
        if among:
            return [self._session(one) for one in among]
        return [one for one in self.engine.book.sessions() if one.update == update or one.state == S.NEW]

    def _joining(self) -> list[Session]:
        book = self.engine.book
        return [
            one
            for one in book.live_sessions()
            if self._may_join(one) and self.luod.connection(one) is not None
        ]

    def _may_join(self, session: Session) -> bool:
        return session.state == S.NEW and not session.abort_reason

    def _silent(self) -> list[Session]:
        """Return the subscribed sessions whose process has died while no luod could see it."""
        return [
            one
            for one in self.engine.book.live_sessions()
            if one.state == S.NEW and self.luod.connection(one) is None and self.luod.is_gone(one)
        ]

    def _unfinished(self, session: Session) -> bool:
        """Say whether a kernel session of an earlier boot waits for its client. Another kexec destroys it."""
        if session.state in OUTGOING:
            return session.last_boot() != self.engine.boot_id
        return session.state in UNFINISHED

    async def _invite(self, update: str) -> None:
        """Give every subscribed client that has none yet its kernel session."""
        fresh = self._joining()
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
                    await self._stop(update, f"{one.id}: {why}")
                await self.luod.ending.undo([one.id], why)
            fresh = [one for one in map(self._session, [one.id for one in fresh]) if self._may_join(one)]
        if self._update(update).abort_reason or not fresh:
            return
        doubts = [effect.key for one in fresh for effect in one.doubts()]
        if doubts:
            await self._stop(update, f"{doubts[0]} is in doubt: settle it with `luoctl resolve`")
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
            record = self._session(session)
            self.luod.tell(
                record, {"event": "PRESERVATION_REQUEST", "id": record.client, "update": record.update}
            )
            left = self._deadline(self._update(record.update)) - now()
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
            [self._session(one) for one in going], self.freezing, self.luod.config.order.freeze_at_once
        ):
            self.freezing.add(session.id)
            self.freeze(session, until)

    def freeze(self, session: Session, until: float | None = None) -> None:
        """Tell a client to stop its writers and say READY."""
        left = (until - now()) if until else self.luod.config.deadlines.freeze_s
        self.luod.tell(
            session, {"event": "FREEZE", "id": session.client, "deadline_s": round(max(left, 0.0), 3)}
        )

    async def _box(self, update: str) -> bool:
        """Make sure that this boot has its black box; without one the update does not go on."""
        size = self.luod.config.black_box_bytes
        held = self.luod.held
        again = not (held.has(BLACK_BOX_SESSION) and held.has(RING))
        (made,) = await self.engine.perform(
            Intent("luod", "luod/box.create", "box.create", {"size": size}), again=again
        )
        if made.status == "done":
            (made,) = await self.engine.perform(
                Intent("luod", "luod/box.preserve", "box.preserve"), again=again
            )
        if made.status != "done":
            await self._stop(update, f"the black box could not be made: {made.message}")
            return False
        if self.engine.book.daemon().box_boot_id != self.engine.boot_id:
            await self.engine.record(("luod", ev.BoxCreated(size)))
        self.luod.open_box()
        return True

    # -- undoing

    async def _stop(self, update: str, reason: str) -> None:
        if not self._update(update).abort_reason:
            await self.engine.record((update, ev.UpdateAbortRequested(reason)))

    async def _undo(self, update: str) -> None:
        reason = self._update(update).abort_reason
        await self.luod.ending.undo(self._in_kernel(update), reason)
        ending = self.luod.ending
        await self.luod.pulse.until(lambda: not (self._in_kernel(update) or ending.busy), float("inf"))
        await ending.rebind()  # before the end, so that an update begun right after it has everybody
        await self.engine.record((update, ev.UpdateAborted(reason)))

    def _in_kernel(self, update: str) -> list[str]:
        """Return the sessions of an update that have come as far as the kernel, or are on their way."""
        return [
            one.id
            for one in self._participants(update)
            if one.state in OUTGOING or (one.state == S.NEW and (one.effects or one.abort_reason))
        ]

    # -- after the kexec

    async def close_if_done(self) -> None:
        """Record the end of the update once all its sessions have ended or failed."""
        update = self.engine.book.current_update()
        if update is None or update.state != U.RECOVERING:
            return
        sessions = [
            record for one in update.sessions if (record := self.engine.book.session(one)) is not None
        ]
        if any(one.state in (S.REBOOTING, S.RETRIEVED, S.RESTORED, *OUTGOING) for one in sessions):
            return
        count: Callable[[S], int] = lambda state: sum(one.state == state for one in sessions)  # noqa: E731
        done = ev.UpdateDone(count(S.FINISHED), count(S.LOST), count(S.FAILED), count(S.EXPIRED))
        try:
            await self.engine.record((update.id, done))
        except IllegalTransition:
            return  # another client's last word was quicker

    # -- small things

    def _update(self, update: str) -> Update:
        record = self.engine.book.streams[update]
        assert isinstance(record, Update)
        return record

    def _session(self, session: str) -> Session:
        record = self.engine.book.session(session)
        assert record is not None
        return record

    def _deadline(self, update: Update) -> float:
        began = update.entered.get(U.PREPARING)
        if began is None or update.deadline_s <= 0:
            return float("inf")
        return began.boot_ns / 1e9 + update.deadline_s


def _running(update: Update) -> Refused:
    return Refused(
        "UPDATE_RUNNING", f"{update.id} is {update.state}", hint="`luoctl wait` for it, or `luoctl abort`"
    )


def pid_alive(pid: int) -> bool:
    """Say whether a process of this pid runs; for owners that a restarted luod only knows by number."""
    try:
        os.close(os.pidfd_open(pid))
    except OSError:
        return False
    return True
