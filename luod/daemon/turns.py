# SPDX-License-Identifier: Apache-2.0
"""A place in the restore: a CLAIM waits for those that should come before it, and for room, but never longer than the settings say."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ..engine.turns import may_restore
from ..states.fold import Session
from ..states.table import UpdateState as U
from .connection import Connection
from .pulse import now

if TYPE_CHECKING:
    from .core import Luod


class Turns:
    """Lets the sessions of an update back in their order."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod
        self._coming: set[str] = set()

    @asynccontextmanager
    async def place(self, session: Session, connection: Connection) -> AsyncGenerator[None]:
        """Wait for the session's turn, and hold its place until it is retrieved or could not be.

        The order is a hint: whoever should come first and does not keeps nobody waiting beyond `order.wait_s`.
        """
        await self.luod.pulse.until(lambda: connection.closed or self._may(session), self._patience(session))
        self._coming.add(session.id)
        try:
            yield
        finally:
            self._coming.discard(session.id)

    def _may(self, session: Session) -> bool:
        book = self.luod.engine.book
        others = [one for one in book.live_sessions() if one.update == session.update]
        return may_restore(session, others, self._coming, self.luod.config.order.restore_at_once)

    def _patience(self, session: Session) -> float:
        """Return when the waiting ends: counted from the new kernel's luod, or from now where only room is missing."""
        wait = self.luod.config.order.wait_s
        update = self.luod.engine.book.current_update()
        began = (
            update.entered.get(U.RECOVERING) if update is not None and update.id == session.update else None
        )
        limited = self.luod.config.order.restore_at_once > 0
        return (now() if limited or began is None else began.boot_ns / 1e9) + wait
