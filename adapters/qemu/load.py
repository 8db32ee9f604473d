# SPDX-License-Identifier: Apache-2.0
"""`Load`: a new QEMU takes up a guest where another left it, on the same memory."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec

from ...engine.ports import Absent, Done, Intent, Json, Probe
from . import vmstate
from .codec import Event
from .errors import (
    CommandRefused,
    ConfigMismatch,
    MonitorTimeout,
    QemuError,
    RestoreFailed,
    RestoreTimeout,
    restore_error,
)
from .guest import ENDED, LIVE
from .operation import Operation, Stopwatch, runstate_before
from .portrait import Portrait, differences, portrait

OPAQUE = "luod.vmstate.load"


class Load(Operation):
    """The device state goes into a QEMU that was started with `-incoming defer` on the guest's memfds. Leaves the guest stopped.

    Arguments: `runstate`, and of the result of `Save` `bytes`, `sha256`, `ram` and `machine`. Result: `runstate` (now), `ms` per part.

    Nothing is loaded unless both parts are what was saved and the machine is the same. A QEMU that failed cannot try again; memory is
    untouched by it, so another one can.
    """

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Load `guest.vmstate`.

        Raises `StateCorrupt`, `RamMismatch`, `ForeignRam` or `ConfigMismatch` before QEMU is shown anything; `RestoreFailed` and its
        kinds for what QEMU says; `RestoreTimeout`; `VmmDied`.
        """
        guest, args = self.guest, intent.args
        runstate_before(intent)
        watch = Stopwatch()
        if guest.vmstate is None:
            raise RestoreFailed(
                f"{guest.name} has no saved state to load", hint="retrieve it from the session first"
            )
        with watch.part("check"):
            vmstate.require_whole_vmstate(guest.name, guest.vmstate, int(args["bytes"]), str(args["sha256"]))
            vmstate.require_own_ram(guest.name, guest.ram, args["ram"], guest.trailer)
            guest.process.require_mapped(list(guest.ram.values()))
            self._require_same_machine(msgspec.convert(args["machine"], Portrait))
        with watch.part("prepare"):
            number = self._prepare(guest.vmstate)
        try:
            with watch.part("load"):
                self._load(number)
                now = guest.await_runstate(
                    lambda state: state != "inmigrate", guest.timeouts.postmigrate_s, "paused"
                )
        finally:
            guest.withdraw([number])
        return {"runstate": now, "ms": watch.ms}

    def _prepare(self, fd: int) -> int:
        guest = self.guest
        now = guest.runstate()
        if now != "inmigrate" or guest.migration_status() != "none":
            raise RestoreFailed(
                f"{guest.name}: this QEMU cannot load any more: it is {now}",
                hint="each attempt needs a QEMU of its own, started with `-incoming defer -S`",
            )
        try:
            # In inmigrate this means: stay stopped after the load, as -S does; a guest that was saved running would run at once.
            guest.ask("stop")
            guest.arm("normal")
            return guest.offer(fd, os.O_RDONLY, OPAQUE)
        except CommandRefused as error:
            raise restore_error(guest.name, error.desc) from error

    def _require_same_machine(self, saved: Portrait) -> None:
        if found := differences(saved, portrait(self.guest)):
            raise ConfigMismatch(
                f"the QEMU that {self.guest.name} is to go on in is another machine: {'; '.join(found)}",
                hint="start it with the command line of the old one, a versioned machine type and a CPU model by name",
            )

    def _load(self, number: int) -> None:
        guest = self.guest
        until = time.monotonic() + guest.timeouts.load_s
        incoming: dict[str, Any] = {"uri": f"file:/dev/fdset/{number}", "exit-on-error": False}
        with guest.monitor.listen() as events:
            try:
                guest.monitor.ask("migrate-incoming", incoming, timeout_s=guest.timeouts.load_s)
                end = events.wait({"MIGRATION"}, until, accept=_is_end)
            except CommandRefused as error:
                raise restore_error(guest.name, error.desc) from error
            except MonitorTimeout as error:
                raise RestoreTimeout(
                    f"loading {guest.name} took more than {guest.timeouts.load_s:g} s",
                    hint="end this QEMU and try another; memory is untouched",
                ) from error
        if end.data["status"] != "completed":
            words = str(guest.migration().get("error-desc", ""))
            raise restore_error(guest.name, f"{words}\n{guest.process.stderr_tail()}")

    def probe(self, intent: Intent) -> Probe:
        """Ask QEMU; a load under way is waited for."""
        guest = self.guest
        if not guest.alive():
            return Absent()
        if guest.await_migration_end(guest.timeouts.load_s) != "completed":
            return Absent()
        now = guest.await_runstate(lambda state: state != "inmigrate", guest.timeouts.postmigrate_s, "paused")
        return Done({"runstate": now})

    def undo(self, intent: Intent) -> dict[str, Json]:
        """End the new QEMU: the guest has not run in it, so memory and saved state are as they were. Raises `QemuError` if it has."""
        if self.guest.alive():
            if (now := self.guest.runstate()) in LIVE:
                raise QemuError(
                    f"{self.guest.name} is {now}: what was saved is no longer its state",
                    hint="only a guest that was not resumed yet can be put back",
                )
            self.guest.process.kill()
        self.guest.detach()
        return {}


def _is_end(event: Event) -> bool:
    return event.data.get("status") in ENDED
