# SPDX-License-Identifier: Apache-2.0
"""`Guest`: what this process holds of one guest, and what its operations share.

A QEMU process with its monitor, the memfds that are the guest's memory, and the memfd with the saved device state. QEMU reaches the
latter through an fdset: a set of descriptors with a number, opened as `/dev/fdset/N` (qapi/misc.json, add-fd). The lookup compares the
access mode exactly, so saving needs a descriptor that was opened O_WRONLY and loading one that was opened O_RDONLY.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

import msgspec

from .errors import MonitorTimeout, QemuError, VmmDied
from .monitor import Monitor
from .process import QemuProcess

LIVE = frozenset({"running", "suspended"})
"""Runstates in which the guest is not stopped: `stop` stops it and `cont` leads back (runstate_is_live, system/runstate.c)."""
UNDER_WAY = frozenset({"setup", "active", "device", "pre-switchover", "cancelling", "failing", "wait-unplug"})
"""Migration states that are followed by another. `failing` came with QEMU 11."""
ENDED = frozenset({"completed", "failed", "cancelled"})

_POLL_S = 0.002


class Timeouts(msgspec.Struct, frozen=True):
    """How long each part may take, in seconds: at least ten times what was measured on two cores in software emulation.

    Allocating memory at the first start (prealloc=on) takes 60 ms for each GiB on top of `connect_s`.
    """

    connect_s: float = 10.0
    command_s: float = 5.0
    save_s: float = 30.0
    postmigrate_s: float = 5.0
    cancel_s: float = 5.0
    load_s: float = 30.0
    resume_s: float = 5.0

    def scaled(self, factor: float) -> Timeouts:
        """Return these, each multiplied: for slow hosts, such as an emulated one."""
        return Timeouts(**{name: value * factor for name, value in msgspec.structs.asdict(self).items()})


class Guest:
    """One guest. It owns the descriptors it is given; `close` closes them and the monitor, and leaves the process alone.

    `ram` maps the id of each memory backend object (`-object memory-backend-file,id=ram0`) to its memfd. The last `trailer` bytes of each
    memfd are not the guest's: QEMU takes a file that is larger than the memory, and leaves the rest alone.
    """

    def __init__(
        self,
        name: str,
        ram: Mapping[str, int],
        *,
        process: QemuProcess | None = None,
        monitor: Monitor | None = None,
        vmstate: int | None = None,
        timeouts: Timeouts | None = None,
        trailer: int = 0,
    ) -> None:
        self.name = name
        self.trailer = trailer
        self.ram = dict(ram)
        self.vmstate = vmstate
        self.timeouts = timeouts or Timeouts()
        self._process = process
        self._monitor = monitor

    # -- parts

    @property
    def process(self) -> QemuProcess:
        """The QEMU process. Raises `VmmDied` when there is none."""
        if self._process is None:
            raise VmmDied(f"{self.name} has no QEMU", hint="start one on its memory")
        return self._process

    @property
    def monitor(self) -> Monitor:
        """The monitor. Raises `VmmDied` when there is none."""
        if self._monitor is None:
            raise VmmDied(f"{self.name} has no QEMU", hint="start one on its memory")
        return self._monitor

    def attach(self, process: QemuProcess) -> None:
        """Connect to another QEMU in place of the one so far, whose monitor is closed. Raises as `QemuProcess.connect` does."""
        self.detach()
        self._monitor = process.connect(timeout_s=self.timeouts.connect_s)
        self._process = process

    def detach(self) -> None:
        """Close the monitor; the process is the caller's."""
        if self._monitor is not None:
            self._monitor.close()
        self._monitor = self._process = None

    def alive(self) -> bool:
        """Say whether there is a QEMU and it runs."""
        return self._process is not None and self._process.alive()

    def keep_vmstate(self, fd: int | None) -> None:
        """Hold another memfd with saved device state, or none; the one so far is closed."""
        old, self.vmstate = self.vmstate, fd
        if old is not None and old != fd:
            os.close(old)

    def close(self) -> None:
        """Close the monitor and every memfd. The process is the caller's."""
        self.detach()
        self.keep_vmstate(None)
        while self.ram:
            os.close(self.ram.popitem()[1])

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ram_sizes(self) -> dict[str, int]:
        """Return the size of each memory in bytes, without what is ours at the end of its memfd."""
        return {name: os.fstat(fd).st_size - self.trailer for name, fd in self.ram.items()}

    # -- questions

    def ask(self, command: str, fds: tuple[int, ...] = (), **arguments: Any) -> Any:
        """Run a QMP command with the timeout of commands. Raises as `Monitor.execute` does."""
        return self.monitor.execute(command, fds, timeout_s=self.timeouts.command_s, **arguments)

    def runstate(self) -> str:
        """Return QEMU's word for what the guest does: "running", "paused", "postmigrate", ... (qapi/run-state.json)."""
        return str(self.ask("query-status")["status"])

    def await_runstate(self, right: Callable[[str], bool], timeout_s: float, what: str) -> str:
        """Ask for the runstate until it is right, and return it. Raises `MonitorTimeout`.

        Not every change of it has an event.
        """
        until = time.monotonic() + timeout_s
        while not right(state := self.runstate()):
            if time.monotonic() >= until:
                raise MonitorTimeout(f"{self.name} is still {state} after {timeout_s:g} s, not {what}")
            time.sleep(_POLL_S)
        return state

    def migration(self) -> dict[str, Any]:
        """Return `query-migrate`: of the last migration of this process, out or in."""
        return dict(self.ask("query-migrate"))

    def migration_status(self) -> str:
        """Return the status of the last migration, "none" where there was none."""
        return str(self.migration().get("status", "none"))

    def await_migration_end(self, timeout_s: float) -> str:
        """Ask until no migration is under way; return how the last one ended. Raises `MonitorTimeout`."""
        until = time.monotonic() + timeout_s
        while (status := self.migration_status()) in UNDER_WAY:
            if time.monotonic() >= until:
                raise MonitorTimeout(f"{self.name}: the migration is still {status} after {timeout_s:g} s")
            time.sleep(_POLL_S)
        return status

    def capability(self, **states: bool) -> None:
        """Switch migration capabilities."""
        wanted = [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]
        self.ask("migrate-set-capabilities", capabilities=wanted)

    def arm(self, mode: str) -> None:
        """Set mode and capabilities for a save or load that leaves the memory where it is."""
        self.capability(x_ignore_shared=True, events=True)
        self.ask("migrate-set-parameters", mode=mode)

    def disarm(self) -> None:
        """Undo `arm`, so that an ordinary migration of the guest works as before."""
        self.capability(x_ignore_shared=False)
        self.ask("migrate-set-parameters", mode="normal")

    # -- fdsets

    def offer(self, fd: int, flags: int, opaque: str) -> int:
        """Give QEMU the file behind `fd`, opened anew with `flags`, in an fdset of its own; return the set's number.

        `opaque` is what the set can be found by. A new opening starts at offset 0 whatever was done with `fd`.
        """
        fresh = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
        try:
            return int(self.ask("add-fd", (fresh,), opaque=opaque)["fdset-id"])
        finally:
            os.close(fresh)

    def fdsets(self, right: Callable[[str], bool]) -> dict[int, int]:
        """Return number and descriptor (in QEMU) of the fdsets whose opaque is right."""
        return {
            int(each["fdset-id"]): int(entry["fd"])
            for each in self.ask("query-fdsets")
            for entry in each["fds"]
            if right(str(entry.get("opaque", "")))
        }

    def withdraw(self, numbers: Collection[int]) -> None:
        """Let QEMU close fdsets; those that are gone are no matter."""
        for number in numbers:
            with contextlib.suppress(QemuError):
                self.ask("remove-fd", fdset_id=number)
