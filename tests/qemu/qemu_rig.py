# SPDX-License-Identifier: Apache-2.0
"""A guest under test: its memory, the QEMUs that are started on it one after the other, and one pipe for what it says in all of them."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from luod.adapters import memfd
from luod.adapters.qemu.guest import Guest, Timeouts
from luod.adapters.qemu.operations import operations
from luod.adapters.qemu.process import QemuProcess
from luod.engine.ports import Intent
from luod.tinyguest import image
from luod.tinyguest.serial import SerialLog

QEMU = os.environ.get("LUOD_QEMU", "qemu-system-x86_64")
"""The QEMU under test; all of it passes with 10.0.2 and 11.1.3."""
MACHINE = "pc-q35-10.0"
SPEAK_S = 20.0
TIMEOUTS = Timeouts().scaled(4)
"""Generous: nothing here waits for one of them to pass unless it says so."""


class Rig:
    """One guest. `guest` holds the QEMU that `start` started last; earlier ones are in `processes` until the end."""

    def __init__(
        self,
        place: Path,
        *,
        mib: int = 16,
        seed: int = 7,
        hz: int = 100,
        devices: Sequence[str] = (),
        timeouts: Timeouts = TIMEOUTS,
    ) -> None:
        self.place = place
        self.size = mib << 20
        self.devices = tuple(devices)
        self.log = SerialLog(seed)
        self.words = f"seed={seed} hz={hz} chunk=1024"
        self.serial, self.serial_end = os.pipe2(os.O_CLOEXEC)
        self.processes: list[QemuProcess] = []
        ram = memfd.create("guest-ram", self.size)
        memfd.seal_for_preservation(ram)
        self.guest = Guest("vm1", {"ram0": ram}, timeouts=timeouts)

    @property
    def ram(self) -> int:
        return self.guest.ram["ram0"]

    # -- QEMU

    def command(
        self,
        *more: str,
        backend: str = "",
        machine: str = MACHINE,
        size: int = 0,
        cpus: int = 1,
        qemu: str = QEMU,
    ) -> list[str]:
        size = size or self.size
        path = f"/proc/self/fd/{self.ram}"
        backend = backend or f"memory-backend-file,id=ram0,size={size},mem-path={path},share=on"
        memory_id = dict(each.split("=", 1) for each in backend.split(",")[1:]).get("id", "ram0")
        return [
            qemu, "-accel", "tcg", "-machine", f"{machine},memory-backend={memory_id}", "-cpu", "qemu64",
            "-smp", str(cpus), "-nodefaults", "-no-user-config", "-display", "none", "-object", backend, "-m", f"{size >> 20}M",
            "-chardev", f"file,id=s0,path=/proc/self/fd/{self.serial_end}", "-serial", "chardev:s0",
            "-kernel", str(image.write(self.place / "guest.bin")), "-append", self.words,
            *self.devices, *more,
        ]  # fmt: skip

    def spawn(self, argv: Sequence[str], *, fds: Sequence[int] = ()) -> QemuProcess:
        """Start a QEMU with a monitor of its own and the guest's memory inherited."""
        monitor = self.place / f"qmp{len(self.processes)}.sock"
        process = QemuProcess.spawn(
            [*argv, "-qmp", f"unix:{monitor},server=on,wait=off"],
            monitor,
            pass_fds=(self.ram, self.serial_end, *fds),
        )
        self.processes.append(process)
        return process

    def start(self, *more: str, fds: Sequence[int] = (), **options: Any) -> QemuProcess:
        """Start a QEMU and let `guest` be in it."""
        process = self.spawn(self.command(*more, **options), fds=fds)
        self.guest.attach(process)
        return process

    def start_incoming(self, *more: str, **options: Any) -> QemuProcess:
        return self.start("-incoming", "defer", "-S", *more, **options)

    # -- the guest

    def speak(self, ticks: int) -> int:
        """Read until the guest has said so many ticks more; return the number of the last."""
        return self.speak_until(self.log.last + ticks)

    def speak_until(self, tick: int) -> int:
        until = time.monotonic() + SPEAK_S
        while self.log.last < tick:
            left = until - time.monotonic()
            assert left > 0, f"the guest says no more: {self.log}"
            if select.select([self.serial], [], [], left)[0]:
                self.log.feed(os.read(self.serial, 65536))
        return self.log.last

    def drain(self) -> int:
        """Read what the guest has said already; return the number of its last tick."""
        while select.select([self.serial], [], [], 0)[0]:
            self.log.feed(os.read(self.serial, 65536))
        return self.log.last

    # -- operations

    def do(self, kind: str, **args: Any) -> dict[str, Any]:
        """Apply an operation as an update would: `do("save", runstate="running")`."""
        return operations(self.guest)[f"qemu.{kind}"].apply(self.intent(kind, **args))

    def intent(self, kind: str, **args: Any) -> Intent:
        return Intent("vm1.1", f"vm1.1/{kind}", f"qemu.{kind}", args)

    # -- the end

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.close()
        self.guest.close()
        os.close(self.serial)
        os.close(self.serial_end)
