# SPDX-License-Identifier: Apache-2.0
"""What every operation on a guest has: the engine's port of an effect, and `undo`."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from ...engine.ports import Intent, Json, Probe
from .errors import CommandRefused, MonitorTimeout, QemuError, ResumeFailed
from .guest import LIVE, Guest


class Operation:
    """One operation on one guest, as an effect (`engine.ports.Effect`).

    `args["runstate"]` of every intent is what the guest did before the update began, read with `Guest.runstate` and so written down
    before anything was done to it: a guest that was stopped by its user stays stopped, whoever died in between.

    All are repeatable: each looks at the guest first, and finds its work done or refuses it where it would do harm. None outlives the
    boot; what a save leaves behind is carried by whoever preserves the memfds.
    """

    repeatable = True
    carried = False

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Do it; return what is worth keeping in the journal."""
        raise NotImplementedError

    def probe(self, intent: Intent) -> Probe:
        """Say whether it has been done, without changing anything."""
        raise NotImplementedError

    def undo(self, intent: Intent) -> dict[str, Json]:
        """Put things back as they were before."""
        raise NotImplementedError


def runstate_before(intent: Intent) -> str:
    """Return what the guest did before the update. Raises `QemuError` for an intent that does not say."""
    state = intent.args.get("runstate")
    if not isinstance(state, str):
        raise QemuError(f"{intent.key} does not say what the guest did before", hint='args={"runstate": ...}')
    return state


def ran_before(intent: Intent) -> bool:
    """Say whether the guest was going before the update, and so has to go on after it."""
    return runstate_before(intent) in LIVE


class Stopwatch:
    """Milliseconds of each part of an operation, by name."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Time what is done inside; a part entered twice counts both times."""
        begun = time.monotonic()
        try:
            yield
        finally:
            spent = (time.monotonic() - begun) * 1000
            self.ms[name] = round(self.ms.get(name, 0.0) + spent, 3)


def let_go_on(guest: Guest, going: bool) -> dict[str, Json]:
    """Let a guest run if it is to be `going` and does not; see that it does. Raises `ResumeFailed`.

    What was saved of it is stale from then on, and is dropped.
    """
    watch = Stopwatch()
    now = guest.runstate()
    if going:
        with watch.part("resume"):
            now = _set_going(guest, now)
        guest.keep_vmstate(None)
    return {"runstate": now, "ms": watch.ms}


def _set_going(guest: Guest, now: str) -> str:
    until = time.monotonic() + guest.timeouts.resume_s
    with guest.monitor.listen() as events:
        try:
            if now not in LIVE:
                guest.ask("cont")
                events.wait({"RESUME"}, until)
            return guest.await_runstate(lambda state: state in LIVE, until - time.monotonic(), "running")
        except CommandRefused as error:
            raise ResumeFailed(
                f"QEMU will not let {guest.name} go on: {error.desc}",
                hint="see QEMU's stderr; its memory is intact",
            ) from error
        except MonitorTimeout as error:
            raise ResumeFailed(
                f"{guest.name} does not go on: {error.message}", hint="see `query-status` and QEMU's stderr"
            ) from error
