# SPDX-License-Identifier: Apache-2.0
"""The write-back: file systems are on their disks before anybody is told to freeze.

reboot(LINUX_REBOOT_CMD_KEXEC) writes no file system back, so what lies in the page cache goes with the old kernel. sync(2) is called
while the guests still run, and costs no blackout. It may hang on a dead disk or mount, so nobody depends on its end. It is no effect of
the journal: a sync that a dead luod began leaves nothing behind to be asked about, and another one does no harm.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio

from ..states.errors import LuodError

if TYPE_CHECKING:
    from .core import Luod

log = logging.getLogger("luod")


class Attempt:
    """One sync, from its beginning to its end or to the instant when nobody waits for it any more. Times are of one clock, in seconds."""

    def __init__(self, update: str, began: float, until: float) -> None:
        self.update = update
        self.began = began
        self.until = until
        self.ended = False
        self.unwritten = ""
        """Why the file systems are not written back; empty as long as they may be."""

    def waits(self, now: float) -> bool:
        """Say whether the update still waits for it."""
        return not self.ended and now < self.until


class WriteBack:
    """Begins a sync for each update, and hears of its end."""

    def __init__(self, luod: Luod, clock: Callable[[], float]) -> None:
        self.luod = luod
        self.clock = clock

    async def wait(self, update: str, deadline: float, goes_on: Callable[[], Awaitable[bool]]) -> str | None:
        """Write back for an update that must be through at `deadline`; return why that was not done, empty where it was.

        At each beat `goes_on` is asked whether the update does: None is returned as soon as it does not. Half of the time that is left
        may be waited at most: the other half is for the freeze, which the update cannot do without.
        """
        limit = self.luod.config.update.sync_s
        if limit <= 0:
            return ""
        began = self.clock()
        attempt = Attempt(update, began, began + min(limit, max(0.0, deadline - began) / 2))
        self.luod.spawn(self._run, attempt)
        while attempt.waits(self.clock()):
            beat = self.luod.pulse.current()
            if not await goes_on():
                return None
            with anyio.move_on_after(max(0.0, attempt.until - self.clock()) + 0.001):
                await beat.wait()
        if not attempt.ended:
            self._give_up(attempt)
        return attempt.unwritten

    def _give_up(self, attempt: Attempt) -> None:
        """Note that the update does not wait any longer. The call itself cannot be ended, and may still come to its end."""
        waited = attempt.until - attempt.began
        attempt.unwritten = f"sync(2) did not end within {waited:.3g} s"
        log.warning(
            "%s: %s; the update goes on. What was written to files without fsync in the last half minute may not be on disk when the "
            "kernel is replaced. Look for a dead mount or a slow disk (`grep -E 'Dirty|Writeback' /proc/meminfo`); "
            "sync_s under [update] says how long luod waits",
            attempt.update,
            attempt.unwritten,
        )

    async def _run(self, attempt: Attempt) -> None:
        try:
            fd = await anyio.to_thread.run_sync(self.luod.kernel.sync)
            try:
                await anyio.wait_readable(fd)
                self.luod.kernel.synced(fd)
            finally:
                os.close(fd)
        except (LuodError, OSError) as error:
            attempt.unwritten = str(error)
            log.warning(
                "%s: the file systems could not be written back: %s; the update goes on",
                attempt.update,
                error,
            )
        else:
            late = " (the update did not wait for it)" if attempt.unwritten else ""
            log.info(
                "%s: the file systems are written back, after %.3g s%s",
                attempt.update,
                self.clock() - attempt.began,
                late,
            )
        attempt.ended = True
        self.luod.pulse.beat()
