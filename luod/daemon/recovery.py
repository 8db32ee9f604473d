# SPDX-License-Identifier: Apache-2.0
"""Recovery: what a starting luod does before it answers anybody.

In the same boot it adopts what the second holder has and settles what is in doubt. In another boot it first reads the black box, then
asks the tables of `engine/reconcile.py` what became of every session and of the update. Doing it twice changes nothing more.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import anyio.to_thread

from .. import __version__
from ..engine.ports import Intent
from ..engine.reconcile import Held as HeldAnswer
from ..engine.reconcile import SessionAction, UpdateAction, session_action, update_action
from ..journal.ring import merge
from ..states import events as ev
from ..states.fold import Session
from ..states.names import BLACK_BOX_SESSION
from ..states.table import SessionState as S
from ..states.table import UpdateState as U
from .blackbox import BoxNews, look
from .effects import RING
from .second_holder import release_ended

if TYPE_CHECKING:
    from .core import Luod

log = logging.getLogger("luod")


async def recover(luod: Luod) -> None:
    """Bring the journal and the world into agreement.

    Raises `JournalDamaged` when the black box contradicts the disk; then a person must choose.
    """
    engine, book = luod.engine, luod.engine.book
    fresh = book.daemon().boot_id != engine.boot_id
    held: HeldAnswer = "unknown"
    news: BoxNews = "consumed"
    why = ""
    if fresh or _unjudged(luod):
        held, news, records, why = await anyio.to_thread.run_sync(look, luod.kernel, luod.custody, luod.held)
        news = _known_news(luod) or news
        tail = merge(luod.journal.head(), records, chain_at=luod.journal.chain_at)
        if tail:
            news = "merged"
            luod.journal.adopt(tail)
            for record in tail:
                book.apply(record)
            log.warning("took %d records over from the black box", len(tail))
    started: list[tuple[str, ev.Event]] = [
        ("luod", ev.DaemonStarted(__version__, f"{luod.config.kernel}", os.getpid())),
    ]
    if fresh and held == "yes":
        args = {"name": BLACK_BOX_SESSION}
        started.append(("luod", ev.EffectIntended("luod/box.retrieve", "box.retrieve", args)))
        started.append(
            ("luod", ev.EffectOutcome("luod/box.retrieve", "done", how="observed", result={"box": news}))
        )
    await engine.record(*started)
    await engine.settle()
    if engine.book.daemon().box_boot_id == engine.boot_id:
        await anyio.to_thread.run_sync(_adopt_box, luod)
    if not fresh and not _unjudged(luod):
        update = book.current_update()
        held = {"absent": "no", "": "unknown"}.get(update.box, "yes") if update else "unknown"  # type: ignore[assignment]
    await _sessions(luod, held, why)
    await _update(luod, held, news, why)
    incoming = book.daemon().effects.get("luod/box.retrieve")
    if incoming is not None and incoming.boot_id == engine.boot_id:
        await engine.perform(Intent("luod", "luod/box.finish", "box.finish"))
    await luod.director.close_if_done()


def _unjudged(luod: Luod) -> bool:
    """Say whether an earlier luod of this boot died before it had said what became of the update that led here.

    Until then the black box is not finished, so looking once more finds the same.
    """
    update = luod.engine.book.current_update()
    return update is not None and update.state == U.REBOOTING and update.reboot_boot_id != luod.engine.boot_id


def _known_news(luod: Luod) -> BoxNews | None:
    """Return what an earlier luod of this boot has found in the black box, if one has looked."""
    seen = luod.engine.book.daemon().effects.get("luod/box.retrieve")
    return seen.result.get("box") if seen is not None and seen.boot_id == luod.engine.boot_id else None


def _adopt_box(luod: Luod) -> None:
    for name in (BLACK_BOX_SESSION, RING):
        fd = luod.custody.get(name)
        if fd is None:
            return
        luod.held.put(name, fd)
    luod.open_box()


async def _sessions(luod: Luod, boot_held: HeldAnswer, why: str) -> None:
    engine, book = luod.engine, luod.engine.book
    names = set(await anyio.to_thread.run_sync(luod.custody.names))
    undo: list[str] = []
    for session in book.live_sessions():
        if session.id in book.unknown:
            continue
        if session.state == S.FAILED and session.done(f"{session.id}/release"):
            continue  # nothing is held of it; a person ends it
        same = session.last_boot() == engine.boot_id
        if same:
            held: HeldAnswer = "yes" if session.kernel_name in names else "no"
            if held == "no" and session.state in (S.RETRIEVED, S.RESTORED, S.FAILED):
                held = await luod.ending.is_there(session)
        else:
            held = boot_held
        action = session_action(session.state, "same" if same else "other", held)
        if session.kernel_name in names:
            await anyio.to_thread.run_sync(_adopt, luod, session)
        if same and session.state in (S.NEW, S.CREATED, S.PRESERVED, S.READY):
            luod.watch_owner(session)
        match action:
            case SessionAction.THAW:
                # a client of the plain protocol never paused for us: it stays ready
                if S.PRESERVED in session.entered:
                    await engine.record((session.id, ev.SessionThawed("luod was restarted")))
            case SessionAction.ABORT:
                reason = "its boot has ended" if not same else "luod and its second holder have both lost it"
                await engine.record((session.id, ev.SessionAborted(reason)))
            case SessionAction.LOST:
                cause = why or (
                    "luod and its second holder have both lost it" if same else "its boot has ended"
                )
                await engine.record((session.id, ev.SessionLost(cause)))
            case SessionAction.KEEP | SessionAction.ADOPT | SessionAction.AWAIT | SessionAction.REFUSED:
                pass
        after = book.session(session.id)
        if (
            after is not None
            and after.abort_reason
            and after.state in (S.NEW, S.CREATED, S.PRESERVED, S.READY)
            and same
        ):
            undo.append(session.id)
    await release_ended(luod, names)
    update = book.current_update()
    if undo and (update is None or not update.abort_reason):
        luod.spawn(luod.ending.undo, undo)


def _adopt(luod: Luod, session: Session) -> None:
    fd = luod.custody.get(session.kernel_name)
    if fd is not None:
        luod.held.put(session.kernel_name, fd)


async def _update(luod: Luod, held: HeldAnswer, news: BoxNews, why: str) -> None:
    engine, book = luod.engine, luod.engine.book
    update = book.current_update()
    if update is None or update.id in book.unknown:
        return
    boots = [at.boot_id for at in update.entered.values()]
    same = bool(boots) and boots[-1] == engine.boot_id
    match update_action(update.state, "same" if same else "other", held):
        case UpdateAction.RESUME:
            luod.director.resume(update)
        case UpdateAction.DISARM:
            if update.abort_reason:
                luod.director.resume(update)
            else:
                await engine.record((update.id, ev.UpdateDisarmed("luod was restarted after the barrier")))
                luod.director.resume(book.known_update(update.id))
        case UpdateAction.REFUSED:
            jump = update.effects.get(f"{update.id}/reboot")
            await luod.director.refused(update.id, jump.errno if jump else "", "luod died before the kexec")
            luod.director.resume(book.known_update(update.id))
        case UpdateAction.RECOVER:
            await engine.record((update.id, ev.UpdateRecovering(news)))
        case UpdateAction.LOST:
            cause = why or (
                "another kexec than luod's"
                if update.state in (U.PREPARING, U.ARMED)
                else "its boot has ended"
            )
            await engine.record((update.id, ev.UpdateLost(cause)))
        case UpdateAction.KEEP:
            pass
