# SPDX-License-Identifier: Apache-2.0
"""The operations on a guest: pause, save, abort in the old kernel; load and resume in the new one.

          pause        save            abort
    running --> paused --> postmigrate -------> running
                               |
                     (memfds preserved, kexec)
                               |           resume
                               '--> load --> paused --> running

Save stops a running guest by itself; pausing before lets all guests of a host stop at the same instant.
"""

from __future__ import annotations

from ...engine.ports import Absent, Done, Effect, Intent, Json, Probe
from .errors import ResumeFailed
from .guest import LIVE, Guest
from .load import Load
from .operation import Operation, Stopwatch, let_go_on, ran_before, runstate_before
from .save import Abort, Save


class Pause(Operation):
    """QMP `stop`: the guest's CPUs stop and its disks are flushed. A guest that does not run is left as it is.

    Arguments: `runstate`. Result: `runstate` (before), `now`, `ms`.
    """

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Stop the guest."""
        watch = Stopwatch()
        with watch.part("pause"):
            if self.guest.runstate() in LIVE:
                self.guest.ask("stop")
            now = self.guest.await_runstate(
                lambda state: state not in LIVE, self.guest.timeouts.command_s, "stopped"
            )
        return {"runstate": runstate_before(intent), "now": now, "ms": watch.ms}

    def probe(self, intent: Intent) -> Probe:
        """Ask QEMU whether the guest is stopped."""
        if not self.guest.alive():
            return Absent()
        now = self.guest.runstate()
        return Absent() if now in LIVE else Done({"runstate": runstate_before(intent), "now": now})

    def undo(self, intent: Intent) -> dict[str, Json]:
        """Let the guest go on if it ran before."""
        return let_go_on(self.guest, ran_before(intent))


class Resume(Operation):
    """QMP `cont` in the new QEMU, if the guest ran before; otherwise it stays stopped. From here on its memory changes.

    Arguments: `runstate`. Result: `runstate` (now), `ms`.
    """

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Set the guest going. Raises `ResumeFailed`."""
        now = self.guest.runstate()
        if now in ("postmigrate", "inmigrate", "finish-migrate"):
            raise ResumeFailed(
                f"{self.guest.name} cannot be resumed: it is {now}",
                hint="a saved guest goes on by abort, a new QEMU must load first",
            )
        return let_go_on(self.guest, ran_before(intent))

    def probe(self, intent: Intent) -> Probe:
        """Ask QEMU whether the guest does what it did before."""
        if not self.guest.alive():
            return Absent()
        now = self.guest.runstate()
        if ran_before(intent):
            return Done({"runstate": now}) if now in LIVE else Absent()
        return Absent() if now in LIVE or now == "inmigrate" else Done({"runstate": now})

    def undo(self, intent: Intent) -> dict[str, Json]:
        """Stop the guest. What it did since cannot be undone."""
        if self.guest.runstate() in LIVE:
            self.guest.ask("stop")
        return {"runstate": self.guest.runstate()}


def operations(guest: Guest) -> dict[str, Effect]:
    """Return the operations on one guest by effect kind."""
    return {
        "qemu.pause": Pause(guest),
        "qemu.save": Save(guest),
        "qemu.abort": Abort(guest),
        "qemu.load": Load(guest),
        "qemu.resume": Resume(guest),
    }
