# SPDX-License-Identifier: Apache-2.0
"""`Save` and `Abort`: the device state of a guest goes into a memfd, and the guest goes on after all.

Save is a migration into a file with x-ignore-shared: pages of shared, file-backed memory stay where they are, and what is written is
some 0.3 MB of device state whatever the size of the guest (docs/devel/migration/CPR.rst). QEMU flushes and releases the guest's disks
and leaves it in the runstate postmigrate.

The guest is stopped first and the mode is normal. In mode cpr-reboot QEMU 10.0 does not come back from a disk that cannot be flushed:
the guest stays in finish-migrate, from where no command sets it going again. A stopped guest is saved as fast in mode normal. Only
one that is suspended needs cpr-reboot: the mode exists for what its passthrough devices ask for.

Each attempt gets a new memfd and a new fdset: QEMU truncates what it finds in an fdset, but goes on writing where the last attempt
had ended. The fdset stays in QEMU until the guest goes on, so that whoever adopts this QEMU can have the memfd back from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from ...engine.ports import Absent, Done, Intent, Json, Probe, Unknown
from . import vmstate
from .codec import Event
from .errors import (
    CheckpointFailed,
    CheckpointRefused,
    CheckpointTimeout,
    CommandRefused,
    MonitorTimeout,
    QemuError,
    checkpoint_failed,
    checkpoint_refused,
)
from .guest import ENDED, LIVE, UNDER_WAY, Guest
from .operation import Operation, Stopwatch, let_go_on, ran_before, runstate_before
from .portrait import Portrait, portrait

OPAQUE = "luod.vmstate "
"""What the opaque of every fdset with saved state begins with; the effect's key and attempt follow."""
_NOT_NOW = frozenset({"inmigrate", "finish-migrate", "save-vm", "restore-vm", "colo"})


class Save(Operation):
    """The checkpoint. Leaves the guest stopped in postmigrate and `guest.vmstate` holding the memfd, which is not preserved yet.

    Arguments: `runstate`. Result: `bytes` and `sha256` of the device state, `ram` (size and sample of each memfd), `machine`
    (its portrait), `runstate` (before), `qemu` (version), `disks` flushed, `ms` per part. `Load` wants most of it again.

    A guest that is in postmigrate already, because an abort left it there, is not saved again: its state is still what was saved.
    """

    def __init__(self, guest: Guest, *, make_vmstate: Callable[[], int] = vmstate.make_vmstate) -> None:
        super().__init__(guest)
        self._make_vmstate = make_vmstate

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Save the guest.

        Raises `CheckpointRefused` when QEMU does not begin, `CheckpointFailed` or `CheckpointTimeout` when it does not finish: the
        guest then does what it did before. Raises `VmmDied` when QEMU ends.
        """
        runstate_before(intent)
        watch = Stopwatch()
        with watch.part("prepare"):
            now = self.guest.runstate()
            machine = portrait(self.guest)  # before the guest is stopped: it takes a dozen questions
            if now == "postmigrate" and self._saved_before():
                return self._result(intent, watch, machine)
            if now in _NOT_NOW or now == "postmigrate":
                raise CheckpointRefused(
                    f"{self.guest.name} cannot be saved: it is {now}",
                    hint="another migration is under way or was made; let the guest go on first",
                )
            fd, number = self._prepare(intent, "cpr-reboot" if now == "suspended" else "normal")
        try:
            with watch.part("pause"):
                if now in LIVE:
                    self.guest.ask("stop")
            with watch.part("migrate"):
                self._migrate(number)
            with watch.part("postmigrate"):
                self._await_postmigrate()
            self.guest.keep_vmstate(fd)
            return self._result(intent, watch, machine)
        except BaseException as error:
            self._drop(fd, number)
            if self.guest.alive():
                self._put_back(now, error)
            raise

    def _prepare(self, intent: Intent, mode: str) -> tuple[int, int]:
        guest = self.guest
        guest.withdraw(guest.fdsets(lambda opaque: opaque.startswith(OPAQUE)))
        fd = self._make_vmstate()
        try:
            guest.arm(mode)
            return fd, guest.offer(fd, os.O_WRONLY, _opaque(intent))
        except CommandRefused as error:
            os.close(fd)
            raise checkpoint_refused(guest.name, error) from error
        except BaseException:
            os.close(fd)
            raise

    def _migrate(self, number: int) -> None:
        guest = self.guest
        until = time.monotonic() + guest.timeouts.save_s
        # Listening begins here: a command that was refused earlier has left a stray event `failed`.
        with guest.monitor.listen() as events:
            try:
                guest.ask("migrate", uri=f"file:/dev/fdset/{number}")
                end = str(events.wait({"MIGRATION"}, until, accept=_is_end).data["status"])
            except CommandRefused as error:
                raise checkpoint_refused(guest.name, error) from error
            except MonitorTimeout as error:
                guest.ask("migrate_cancel")
                end = guest.await_migration_end(guest.timeouts.cancel_s)
                # It may have been done before the cancel came; a guest that is saved is not given up.
                if end != "completed":
                    raise CheckpointTimeout(
                        f"saving {guest.name} took more than {guest.timeouts.save_s:g} s and was cancelled",
                        hint="is a disk of the guest stuck? The guest goes on; see `query-migrate` and QEMU's stderr",
                    ) from error
        if end != "completed":
            raise checkpoint_failed(guest.name, str(guest.migration().get("error-desc", "")))

    def _await_postmigrate(self) -> None:
        """`completed` is said before the runstate is right: for a moment it still is finish-migrate."""
        try:
            self.guest.await_runstate(
                lambda state: state == "postmigrate", self.guest.timeouts.postmigrate_s, "postmigrate"
            )
        except MonitorTimeout as error:
            raise CheckpointTimeout(error.message, hint="the guest is set going again") from error

    def _result(self, intent: Intent, watch: Stopwatch, machine: Portrait) -> dict[str, Json]:
        guest = self.guest
        fd = guest.vmstate
        assert fd is not None
        with watch.part("check"):
            size = self._require_all_written(fd)
        with watch.part("hash"):
            sha256 = vmstate.digest(fd)
        with watch.part("sample"):
            ram = vmstate.fingerprints(guest.ram, guest.trailer)
        return {
            "bytes": size,
            "sha256": sha256,
            "ram": ram,
            "machine": msgspec.to_builtins(machine),
            "runstate": runstate_before(intent),
            "qemu": guest.monitor.greeting.version,
            "disks": _disks(guest.ask("query-block")),
            "ms": watch.ms,
        }

    def _require_all_written(self, fd: int) -> int:
        """Raise `CheckpointFailed` unless the file is whole, and holds none of the pages of our memory."""
        guest = self.guest
        report: dict[str, Any] = dict(guest.migration().get("ram", {}))
        size, sent, total = os.fstat(fd).st_size, int(report["transferred"]), int(report["total"])
        if size != sent:
            raise CheckpointFailed(
                f"QEMU says that {guest.name} was saved in {sent} bytes, and the file has {size}",
                hint="do not use this save",
            )
        ours = guest.ram_sizes()
        blocks = vmstate.ram_blocks(fd)
        # In the stream is the size of all blocks, in the report that of those whose pages were written.
        skipped = blocks.total - total if blocks else 0
        known = {} if blocks is None else {name: blocks.sizes.get(name) for name in ours}
        if skipped != sum(ours.values()) or known != ours:
            raise CheckpointFailed(
                f"QEMU has written memory of {guest.name} into the device state: {skipped} bytes stayed in place, and it has "
                f"{sum(ours.values())}",
                hint="all memory must be memory-backend-file with share=on on the memfds that are to be preserved",
            )
        return size

    def _drop(self, fd: int, number: int) -> None:
        if self.guest.vmstate == fd:
            self.guest.keep_vmstate(None)
        else:
            os.close(fd)
        self.guest.withdraw([number])

    def _put_back(self, before: str, cause: BaseException) -> None:
        """Have the guest do what it did before a save that failed; QEMU does so by itself, but not after a cancel that came late."""
        guest = self.guest
        try:
            if guest.migration_status() in UNDER_WAY:
                guest.ask("migrate_cancel")
                guest.await_migration_end(guest.timeouts.cancel_s)
            guest.await_runstate(lambda state: state != "finish-migrate", guest.timeouts.cancel_s, "stopped")
            if before in LIVE:
                let_go_on(guest, True)
            guest.disarm()
        except QemuError as error:
            raise CheckpointFailed(
                f"{cause}; and then {guest.name} could not be set going again: {error.message}",
                hint="abort again; see `query-migrate`, `query-status` and QEMU's stderr",
            ) from cause

    # -- afterwards

    def _saved_before(self) -> bool:
        """Take up the state of a guest that was saved, and has not run since: what is in hand, or else what its QEMU still holds."""
        if self.guest.migration_status() != "completed":
            return False
        return self.guest.vmstate is not None or self._recover(lambda opaque: opaque.startswith(OPAQUE))

    def _recover(self, right: Callable[[str], bool]) -> bool:
        for number in self.guest.fdsets(right).values():
            self.guest.keep_vmstate(self.guest.process.open_descriptor(number, os.O_RDWR))
            return True
        return False

    def probe(self, intent: Intent) -> Probe:
        """Ask QEMU; a save under way is waited for. If it is done, the memfd is taken back from QEMU."""
        guest = self.guest
        if not guest.alive():
            return Absent()
        status = guest.await_migration_end(guest.timeouts.save_s)
        guest.await_runstate(lambda state: state != "finish-migrate", guest.timeouts.postmigrate_s, "stopped")
        if guest.runstate() != "postmigrate" or status != "completed":
            return Absent()
        mine = _opaque(intent)
        if not self._recover(lambda opaque: opaque == mine):
            return Unknown(f"{guest.name} was saved by somebody else")
        try:
            return Done(self._result(intent, Stopwatch(), portrait(guest)))
        except CheckpointFailed as error:
            return Unknown(error.message)

    def undo(self, intent: Intent) -> dict[str, Json]:
        """Do what `Abort` does."""
        return Abort(self.guest).apply(intent)


class Abort(Operation):
    """The guest goes on in the QEMU it was saved in, as if nothing had been; whatever state a save had reached.

    One that was stopped by its user stays so, in the runstate postmigrate: QEMU knows no way back from there but to let it run. Its
    saved state stays valid meanwhile, and the next save takes it.

    Arguments: `runstate`. Result: `runstate` (now), `ms`.
    """

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Cancel what is under way, drop what was saved, and let the guest go on. Raises `ResumeFailed`."""
        guest = self.guest
        if guest.migration_status() in UNDER_WAY:
            guest.ask("migrate_cancel")
            guest.await_migration_end(guest.timeouts.cancel_s)
            guest.await_runstate(lambda state: state != "finish-migrate", guest.timeouts.cancel_s, "stopped")
        result = let_go_on(guest, ran_before(intent))
        if result["runstate"] != "postmigrate":
            guest.withdraw(guest.fdsets(lambda opaque: opaque.startswith(OPAQUE)))
            guest.disarm()
        return result

    def probe(self, intent: Intent) -> Probe:
        """Ask QEMU whether the guest does what it did before."""
        if not self.guest.alive():
            return Absent()
        if self.guest.migration_status() in UNDER_WAY:
            return Absent()
        now = self.guest.runstate()
        return Done({"runstate": now}) if (now in LIVE) == ran_before(intent) else Absent()

    def undo(self, intent: Intent) -> dict[str, Json]:
        """Stop the guest again."""
        if self.guest.runstate() in LIVE:
            self.guest.ask("stop")
        return {"runstate": self.guest.runstate()}


def _opaque(intent: Intent) -> str:
    return f"{OPAQUE}{intent.key} {intent.attempt}"


def _is_end(event: Event) -> bool:
    return event.data.get("status") in ENDED


def _disks(blocks: list[dict[str, Any]]) -> list[str]:
    """Return the names of the writable disks, which QEMU flushes when it stops the guest and again when it releases them."""
    return [
        str(each["device"] or each.get("qdev", ""))
        for each in blocks
        if each.get("inserted") and not each["inserted"]["ro"]
    ]
