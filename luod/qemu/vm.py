# SPDX-License-Identifier: Apache-2.0
"""`Vm`: what this process holds of its guest, how it lets go of it, and how another process finds all of it again.

    luo-qemu --- monitor --- QEMU        QEMU inherits: the memfds of RAM, the memfd of the record, and the lifeline,
        |                      |         a file locked by flock(2) for as long as QEMU lives
        '---- memfds, session -'

QEMU does not end with this process. The next one sees by the lifeline that there is a QEMU, is told by the kernel who listens behind the
monitor, and takes the memfds out of /proc/PID/fd, where the page at their end says what they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path

from ..adapters.liveupdate.device import LiveUpdate
from ..adapters.qemu import record as records
from ..adapters.qemu.errors import LaunchFailed, NotThatQemu, QemuError, RamMismatch
from ..adapters.qemu.guest import Guest, Timeouts
from ..adapters.qemu.identity import NO_RECORD, TRAILER, Trailer, read_trailer, write_trailer
from ..adapters.qemu.portrait import portrait
from ..adapters.qemu.process import QemuProcess, identity
from ..adapters.qemu.record import Record

VMSTATE = "vmstate"
RECORD = "record"
_LOOK_S = 0.01


class Vm:
    """One guest, in this process. `run` is the directory of the monitor and the lifeline; nothing in it outlives the boot."""

    def __init__(
        self, name: str, run: Path, kernel: LiveUpdate, *, timeouts: Timeouts, terminal: bool = True
    ) -> None:
        self.name = name
        self.kernel = kernel
        self.monitor_path = run / "qmp.sock"
        self.timeouts = timeouts
        self.uuid = ""
        self.devices: tuple[str, ...] = ()
        self.record: Record | None = None
        """What was read from the record of a guest that is being restored, or written at the last freeze."""
        self.digest = b""
        self.changes: tuple[str, ...] = ()
        """What the command line says otherwise by now, where the guest was started as it was saved."""
        self.retrieved: dict[str, int] = {}
        """Memfds that came out of a session: RAM by its id, `record` and `vmstate`."""
        self.session = ""
        self.session_fd = -1
        self.record_fd = -1
        self._guest: Guest | None = None
        self._process: QemuProcess | None = None
        self._lifeline = run / "qemu.lock"
        self._terminal = terminal

    # -- parts

    @property
    def guest(self) -> Guest:
        """The guest. Raises `QemuError` when there is none."""
        if self._guest is None:
            raise QemuError(f"{self.name} has no QEMU", hint="start one on its memory", errno="ESRCH")
        return self._guest

    @property
    def process(self) -> QemuProcess | None:
        """The QEMU of this guest, which may have ended; None before the first."""
        return self._process

    def alive(self) -> bool:
        """Say whether there is a QEMU of this guest, and it runs."""
        return self._guest is not None and self._process is not None and self._process.alive()

    def argv(self) -> list[str]:
        """Return the command line that the QEMU was started with, as the kernel has it."""
        text = Path(f"/proc/{self.guest.process.pid}/cmdline").read_bytes()
        return [os.fsdecode(word) for word in text.split(b"\0")[:-1]]

    # -- a QEMU of our own

    def start(self, argv: list[str], ram: Mapping[str, int], record_fd: int, vmstate: int | None) -> None:
        """Start a QEMU on memfds and connect to it. All descriptors are this object's from here on, also when it fails.

        Raises `LaunchFailed` and what `QemuProcess.connect` raises; no QEMU is left running then.
        """
        self.drop_guest()
        guest = Guest(self.name, ram, timeouts=self.timeouts, trailer=TRAILER, vmstate=vmstate)
        self._keep_record(record_fd)
        try:
            lifeline = self._take_lifeline()
            try:
                fds = (*guest.ram.values(), record_fd, lifeline)
                process = QemuProcess.spawn(argv, self.monitor_path, pass_fds=fds, terminal=self._terminal)
            finally:
                os.close(lifeline)
            self._process = process
            guest.attach(process)
            guest.process.require_mapped(list(guest.ram.values()))
            self.devices = portrait(guest).devices
        except BaseException:
            guest.close()
            self._end_process()
            raise
        self._guest = guest

    def _take_lifeline(self) -> int:
        """Lock the lifeline for a QEMU about to be started: the lock is the open file's, so QEMU has it when we have closed ours."""
        fd = os.open(self._lifeline, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LaunchFailed(
                f"{self.name} has a QEMU already: it holds {self._lifeline}",
                hint="start luo-qemu again: it adopts it",
                errno="EBUSY",
            ) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.release()
            self._process = None

    # -- a QEMU that an earlier process has started

    def lifeline_held(self) -> bool:
        """Say whether a QEMU of this guest lives that somebody else has started."""
        try:
            fd = os.open(self._lifeline, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def adopt(self) -> bool:
        """Take over the QEMU of this guest if there is one; say whether there is.

        Raises `LaunchFailed` for one that lives but does not answer, and `RamMismatch` for one whose memory cannot be found.
        """
        if self.alive():
            return True
        until = time.monotonic() + self.timeouts.connect_s
        while self.lifeline_held():
            with contextlib.suppress(QemuError):
                process = QemuProcess.adopt(identity(self._listener()), self.monitor_path)
                try:
                    self._take_over(process)
                except BaseException:
                    process.release()
                    raise
                return True
            if time.monotonic() > until:
                raise LaunchFailed(
                    f"{self.name} has a QEMU, but it does not answer at {self.monitor_path}",
                    hint="is it stopped or hung? Its memory is kept as long as it lives",
                    errno="ETIMEDOUT",
                )
            time.sleep(_LOOK_S)
        return False

    def _listener(self) -> int:
        """Return the pid behind the monitor: the kernel knows who called listen(2). Raises `NotThatQemu` while nobody does."""
        import socket
        import struct

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.connect(str(self.monitor_path))
            except OSError as error:
                raise NotThatQemu(f"nobody serves {self.monitor_path}: {error.strerror}") from None
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return int(struct.unpack("3i", credentials)[0])

    def _take_over(self, process: QemuProcess) -> None:
        ram: dict[str, int] = {}
        record_fd, uuids = -1, set[str]()
        try:
            for number in sorted(map(int, os.listdir(f"/proc/{process.pid}/fd"))):
                fd = _memfd_of(process, number)
                if fd is None:
                    continue
                mark = _mark(fd)
                if mark is not None and mark.ram not in ram:
                    ram[mark.ram] = fd
                    uuids.add(mark.uuid)
                elif mark is None and record_fd < 0 and records.is_memfd(fd):
                    record_fd = fd
                else:
                    os.close(fd)
            if len(uuids) != 1 or record_fd < 0:
                raise RamMismatch(
                    f"QEMU {process.pid} of {self.name} does not hold the memory of one guest, and its record",
                    hint="it was not started by luo-qemu",
                )
            guest = Guest(self.name, ram, timeouts=self.timeouts, trailer=TRAILER)
        except BaseException:
            for fd in (*ram.values(), *((record_fd,) if record_fd >= 0 else ())):
                os.close(fd)
            raise
        try:
            guest.attach(process)
            self.devices = portrait(guest).devices
        except BaseException:
            guest.close()
            os.close(record_fd)
            raise
        self.drop_guest()
        self._guest, self._process = guest, process
        self._keep_record(record_fd)
        self.uuid = uuids.pop()

    # -- marks

    def mark(self, generation: int, digest: bytes) -> None:
        """Write into the page behind each piece of RAM with which record it goes; none but zeros for a guest that runs again."""
        for name, fd in self.guest.ram.items():
            write_trailer(fd, Trailer(self.uuid, name, generation, digest))

    def going_on(self) -> bool:
        """Say whether the memory is marked as no longer what was saved: this QEMU alone can go on with it."""
        marks = [read_trailer(fd) for fd in self.guest.ram.values()]
        return any(mark.generation and mark.record == NO_RECORD for mark in marks)

    # -- the session

    def hold(self, session: str, fd: int) -> None:
        """Hold a session fd in place of the one so far; -1 holds none."""
        if self.session_fd >= 0:
            os.close(self.session_fd)
        self.session, self.session_fd = session, fd

    def keep(self, what: str, fd: int) -> None:
        """Keep a memfd that came out of the session. Who has the guest running already needs it no more."""
        if self.alive():
            os.close(fd)
            return
        old = self.retrieved.pop(what, None)
        if old is not None:
            os.close(old)
        self.retrieved[what] = fd

    def has(self, what: str) -> bool:
        """Say whether this process has what a session gave."""
        return what in self.retrieved or self.alive()

    def retrieve_from_dead(self) -> None:
        """Take what a QEMU that has ended after a save has left here, as if it came out of a session."""
        guest = self.guest
        fds = {**guest.ram, RECORD: self.record_fd}
        if guest.vmstate is not None:
            fds[VMSTATE] = guest.vmstate
        for what, fd in fds.items():
            copy, old = os.dup(fd), self.retrieved.pop(what, None)
            if old is not None:
                os.close(old)
            self.retrieved[what] = copy

    # -- letting go

    def drop_retrieved(self) -> None:
        """Let go of what came out of a session."""
        while self.retrieved:
            os.close(self.retrieved.popitem()[1])

    def _keep_record(self, fd: int) -> None:
        if self.record_fd >= 0 and self.record_fd != fd:
            os.close(self.record_fd)
        self.record_fd = fd

    def drop_guest(self) -> None:
        """Let go of the guest: its memory stays in QEMU, if that lives, and in the session."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        if self._process is not None:
            self._process.release()
            self._process = None

    def end_guest(self) -> None:
        """End the QEMU at once, and let go of the guest."""
        if self._guest is not None:
            self._guest.detach()
        self._end_process()
        self.drop_guest()

    def close(self) -> None:
        """Let go of everything. QEMU lives on."""
        self.drop_guest()
        self._keep_record(-1)
        self.hold("", -1)
        self.drop_retrieved()


def _memfd_of(process: QemuProcess, number: int) -> int | None:
    """Open a memfd of the process anew; None for any other descriptor."""
    try:
        where = os.readlink(f"/proc/{process.pid}/fd/{number}")
        # One that came through a kexec has lost its name: "/memfd: (deleted)", or "/ (deleted)".
        if not (where.startswith("/memfd:") or where == "/ (deleted)"):
            return None
        return process.open_descriptor(number, os.O_RDWR)
    except OSError:
        return None


def _mark(fd: int) -> Trailer | None:
    try:
        return read_trailer(fd)
    except QemuError:
        return None
