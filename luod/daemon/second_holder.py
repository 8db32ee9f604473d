# SPDX-License-Identifier: Apache-2.0
"""The second holder, watched: one that has died is named, and one that was started anew gets back everything that luod holds.

Between the two luod is the only holder. It goes on, for nothing is lost yet, and says so in its log and in STATUS.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from ..states.errors import LuodError
from ..states.names import BLACK_BOX_SESSION
from ..states.table import SESSION
from .effects import RING
from .ending import release

if TYPE_CHECKING:
    from .core import Luod

log = logging.getLogger("luod")


class SecondHolder:
    """Keeps the second holder of one luod complete."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod
        self._gone = ""
        self._holds = 0

    def view(self) -> dict[str, Any]:
        """Return what STATUS says of it."""
        state = "gone" if self._gone else "ok"
        return {"state": state, "detail": self._gone, "fds": self._holds}

    async def tend(self) -> None:
        """Look once whether it answers and has everything; give it what it lacks."""
        try:
            names = set(await anyio.to_thread.run_sync(self.luod.custody.names, abandon_on_cancel=True))
        except LuodError as error:
            if not self._gone:
                log.error("%s; luod alone holds %d fds now", error.message, len(self.luod.held.names()))
            self._gone = error.message
            self._holds = 0
            return
        back, self._gone = bool(self._gone), ""
        self._holds = len(names)
        missing = self.luod.held.names() - names
        if missing:
            await anyio.to_thread.run_sync(self._give, sorted(missing))
        if back:
            log.warning("the second holder answers again; it was given %d fds", len(missing))
            await release_ended(self.luod, names)

    def _give(self, names: list[str]) -> None:
        held, custody = self.luod.held, self.luod.custody
        for name in names:
            with held.settled:  # nobody lets go of it meanwhile
                try:
                    if not held.has(name):
                        continue
                    there = custody.get(name)
                    if there is not None:  # it came to both since the names were asked for
                        os.close(there)
                        continue
                    custody.store(name, held.get(name))
                    self._holds += 1
                except LuodError as error:
                    log.error("%s cannot be given to the second holder: %s", name, error.message)


async def release_ended(luod: Luod, names: set[str]) -> None:
    """Let go of what the second holder still has of sessions that have ended; `names` is what it has."""
    ended = [
        one for one in luod.engine.book.sessions() if one.state in SESSION.final and one.kernel_name in names
    ]
    await luod.engine.perform(
        *map(release, ended),
        again=True,
    )
    known = {one.kernel_name for one in luod.engine.book.sessions()} | {BLACK_BOX_SESSION, RING}
    for name in sorted(names - known):
        log.warning("the second holder has %s, of which the journal knows nothing; it is left alone", name)
