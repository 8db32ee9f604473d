# SPDX-License-Identifier: Apache-2.0
"""The director: drives one update from KEXEC to the kexec, or back to where it began.

It reads the book, waits at the gate, and makes effects; all it decides is in the journal, so that a restarted luod can take the update
up where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import msgspec

from ..engine.errors import Refused
from ..engine.ports import Intent
from ..states import events as ev
from ..states.errors import IllegalTransition
from ..states.fold import Session, Update
from ..states.names import BLACK_BOX_SESSION, update_id
from ..states.table import OUTGOING, UNFINISHED
from ..states.table import SessionState as S
from ..states.table import UpdateState as U
from .effects import RING
from .pulse import now

if TYPE_CHECKING:
    from .core import Luod


class Director:
    """Drives the updates of one luod, one at a time."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod
        self.engine = luod.engine
        self.book = luod.engine.book
        self.gate = luod.gate
        self._driving = False
        self._all_preserved = False

    # -- what clients and admins ask for

    async def start(self, by_uid: int, deadline_s: float, *, force: bool = False) -> str:
        """Begin an update, or go on with one that waits for a person; return its id.

        Raises `Refused` when another update runs, no image is loaded, or sessions of the last update are not finished.
        """
        book = self.book
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
        joining = tuple(session.id for session in self.gate.joining())
        await self.engine.record((update, ev.UpdateStarted(number, by_uid, joining, limit)))
        self._spawn(update)
        return update

    async def abort(self, reason: str) -> str:
        """Undo the running update; return its id. Raises `Refused` when there is none to undo."""
        update = self.book.current_update()
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
        update = self.book.current_update()
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
        record = self.book.known_update(update)
        deadline = self.gate.deadline(record)
        await self.luod.pulse.until(
            lambda: (
                not self.book.known_update(update).paused
                or self.book.known_update(update).state != U.PREPARING
                or self._driving
            ),
            deadline,
        )
        if (
            self.book.known_update(update).paused
            and self.book.known_update(update).state == U.PREPARING
            and not self._driving
        ):
            await self.abort("nobody resumed it before its deadline")

    # -- driving

    async def _drive(self, update: str) -> None:
        try:
            if not self.book.known_update(update).abort_reason:
                try:
                    await self._prepare(update)
                except Refused as error:  # an effect that only a person can settle
                    await self.gate.stop(update, f"{error.message}: {error.hint}")
            if self.book.known_update(update).abort_reason:
                await self._undo(update)
        finally:
            self._driving = False
            self._all_preserved = False
            self.gate.freezing.clear()

    async def _prepare(self, update: str) -> None:
        """Go from preparing to the kexec. Returns only when the update is being undone."""
        deadline = self.gate.deadline(self.book.known_update(update))
        if not await self._box(update):
            return
        dropped: list[str] = []
        going = await self.gate.wait(update, "preserved", deadline, dropped)
        if going is None:
            return
        unwritten = await self.luod.write_back.wait(
            update, deadline, lambda: self.gate.goes_on(update, dropped)
        )
        if unwritten is None:
            return
        # Once more: who subscribed meanwhile is not left behind.
        going = await self.gate.wait(update, "preserved", deadline, dropped)
        if going is None:
            return
        self._all_preserved = True
        self.luod.checkpoint()  # the last quiet moment: from here every fsync is blackout
        freeze_by = min(deadline, now() + self.luod.config.deadlines.freeze_s)
        going = await self.gate.wait(update, "ready", freeze_by, dropped, going)
        if going is None:
            return
        try:
            armed = ev.UpdateArmed(tuple(going), tuple(dropped), unwritten or msgspec.UNSET)
            await self.engine.record((update, armed))
        except IllegalTransition as error:
            await self.gate.stop(update, str(error))
            return
        (scratch,) = await self.engine.perform(
            Intent(update, f"{update}/scratch", "update.scratch"), again=True
        )
        if scratch.status != "done":
            await self.gate.stop(update, f"the scratch session failed: {scratch.message}")
            return
        if self.book.known_update(update).abort_reason or any(
            self.book.known_session(one).abort_reason for one in going
        ):
            await self.gate.stop(update, "an abort came in before the kexec")
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
            await self.gate.stop(update, str(error))
            return
        await self.refused(update, effect.errno, effect.message)

    async def refused(self, update: str, errno: str, message: str) -> None:
        """The kexec did not happen: put every session back to where it was, and undo the update."""
        record = self.book.known_update(update)
        back: list[tuple[str, ev.Event]] = [
            (one, ev.SessionRebootRefused(errno))
            for one in record.sessions
            if self.book.known_session(one).state == S.REBOOTING
        ]
        await self.engine.record(*back, (update, ev.UpdateRefused(errno, message)))
        await self.gate.stop(update, f"the kernel refused the kexec: {errno} {message}".strip())

    def _silent(self) -> list[Session]:
        """Return the subscribed sessions whose process has died while no luod could see it."""
        return [
            one
            for one in self.book.live_sessions()
            if one.state == S.NEW and self.luod.connection(one) is None and self.luod.is_gone(one)
        ]

    def _unfinished(self, session: Session) -> bool:
        """Say whether a kernel session of an earlier boot waits for its client. Another kexec destroys it."""
        if session.state in OUTGOING:
            return session.last_boot() != self.engine.boot_id
        return session.state in UNFINISHED

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
            await self.gate.stop(update, f"the black box could not be made: {made.message}")
            return False
        if self.book.daemon().box_boot_id != self.engine.boot_id:
            await self.engine.record(("luod", ev.BoxCreated(size)))
        self.luod.open_box()
        return True

    # -- undoing

    async def _undo(self, update: str) -> None:
        reason = self.book.known_update(update).abort_reason
        await self.luod.ending.undo(self._in_kernel(update), reason)
        ending = self.luod.ending
        await self.luod.pulse.until(lambda: not (self._in_kernel(update) or ending.busy), float("inf"))
        await ending.rebind()  # before the end, so that an update begun right after it has everybody
        await self.engine.record((update, ev.UpdateAborted(reason)))

    def _in_kernel(self, update: str) -> list[str]:
        """Return the sessions of an update that have come as far as the kernel, or are on their way."""
        return [
            one.id
            for one in self.gate.participants(update)
            if one.state in OUTGOING or (one.state == S.NEW and (one.effects or one.abort_reason))
        ]

    # -- after the kexec

    async def close_if_done(self) -> None:
        """Record the end of the update once all its sessions have ended or failed."""
        update = self.book.current_update()
        if update is None or update.state != U.RECOVERING:
            return
        sessions = [record for one in update.sessions if (record := self.book.session(one)) is not None]
        if any(one.state in (S.REBOOTING, S.RETRIEVED, S.RESTORED, *OUTGOING) for one in sessions):
            return
        count: Callable[[S], int] = lambda state: sum(one.state == state for one in sessions)  # noqa: E731
        done = ev.UpdateDone(count(S.FINISHED), count(S.LOST), count(S.FAILED), count(S.EXPIRED))
        try:
            await self.engine.record((update.id, done))
        except IllegalTransition:
            return  # another client's last word was quicker


def _running(update: Update) -> Refused:
    return Refused(
        "UPDATE_RUNNING", f"{update.id} is {update.state}", hint="`luoctl wait` for it, or `luoctl abort`"
    )
