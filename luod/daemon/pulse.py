# SPDX-License-Identifier: Apache-2.0
"""A pulse: something changed, look again. What is waited for is always a condition, never a particular message."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio


def now() -> float:
    """Return the seconds since boot, suspend included: the clock of all deadlines, which every process of a boot shares."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Pulse:
    """Wakes everybody who waits each time it beats."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def beat(self) -> None:
        """Wake everybody who waits now."""
        self._event.set()
        self._event = anyio.Event()

    def current(self) -> anyio.Event:
        """Return the event of the next beat; take it before looking, so that no beat is missed."""
        return self._event

    async def until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until `condition` holds or `deadline` (seconds of CLOCK_BOOTTIME) has passed; return the condition."""
        while True:
            beat = self._event
            if condition():
                return True
            left = deadline - now()
            if left <= 0:
                return False
            with anyio.move_on_after(left):
                await beat.wait()
