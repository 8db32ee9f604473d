# SPDX-License-Identifier: Apache-2.0
"""A host in miniature with guests on it: an emulated kernel, luod and its keeper, and luo-qemu with real QEMUs, all as processes.

What a guest says on its serial port comes through a FIFO that outlives the QEMUs, so that nobody has to wait for time to pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from luod_world import World, new_world

from luod.adapters.qemu.identity import TRAILER
from luod.client import Timeout
from luod.tinyguest import image
from luod.tinyguest.serial import SerialLog

QEMU = "qemu-system-x86_64"
PATIENCE_S = 30.0


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def starts_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class Tenant:
    """One guest: its serial port, its luo-qemu, and the QEMUs that were seen under it."""

    def __init__(
        self, world: World, name: str, *, mib: int = 16, seed: int = 7, hz: int = 100, binary: str = QEMU
    ) -> None:
        self.world = world
        self.name = name
        self.state = world.state.parent / f"{name}.state"
        self.run = world.dir / f"{name}.run"
        self.log = SerialLog(seed)
        self.stderr = world.dir / f"{name}.log"
        self.stderr.touch()
        self.fifo = world.dir / f"{name}.serial"
        os.mkfifo(self.fifo)
        self.serial = os.open(self.fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        kernel = image.write(world.dir / "guest.bin")
        self.command: list[str] = [
            binary, "-accel", "tcg", "-machine", "q35", "-m", f"{mib}M", "-nodefaults", "-no-user-config", "-display", "none",
            "-chardev", f"file,id=s0,path={self.fifo},append=on", "-serial", "chardev:s0",
            "-kernel", str(kernel), "-append", f"seed={seed} hz={hz} chunk=1024",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.qemu = 0
        self._pidfds: dict[int, int] = {}

    # -- luo-qemu

    def start(
        self,
        *options: object,
        more: Sequence[str] = (),
        wait: bool = True,
        program: Sequence[str] = ("-m", "luod.qemu.command"),
    ) -> None:
        """Start luo-qemu; wait until its guest runs and luod knows it, or until it has ended. `program` is another one in its place."""
        ready, ready_end = os.pipe()
        argv = [
            sys.executable, *program, "--name", self.name, "--socket", self.world.socket, "--state", self.state,
            "--run", self.run, "--kernel", "emulated", "--emulator", self.world.emulator_dir, "--slow", 4, "--volatile",
            "--ready-fd", ready_end, *options, "--", *self.command, *more,
        ]  # fmt: skip
        try:
            with self.stderr.open("ab") as output:
                self.process = subprocess.Popen(
                    [str(word) for word in argv], pass_fds=(ready_end,), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                )  # fmt: skip
        finally:
            os.close(ready_end)
        self.world.control.attach(self.process.pid)
        with open(ready, "rb", buffering=0) as pipe:
            if wait:
                assert select.select([pipe], [], [], PATIENCE_S)[0], self.words()
                assert pipe.read(1), self.words()
                self.find_qemu()

    def checked(self, *options: str, more: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Ask luo-qemu what would become of the guest's command line and these words more."""
        return subprocess.run(
            [sys.executable, "-m", "luod.qemu.command", "--check", *options, "--name", self.name, "--state", self.state,
             "--", *self.command, *more],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def check(self, *options: str, more: Sequence[str] = ()) -> tuple[int, dict[str, Any]]:
        """Do that for a program; return the exit code and the answer."""
        found = self.checked("--json", *options, more=more)
        return found.returncode, json.loads(found.stdout)

    def find_qemu(self) -> int:
        """Note the QEMU of this guest, and make it part of the emulated world."""
        found = re.findall(r"QEMU (\d+)", self.words()) if not children_of(self.wrapper.pid) else []
        self.qemu = (children_of(self.wrapper.pid) or [int(found[-1])])[0]
        self.watch(self.qemu)
        return self.qemu

    def watch(self, pid: int) -> None:
        if pid not in self._pidfds:
            self._pidfds[pid] = os.pidfd_open(pid)
            self.world.control.attach(pid)

    @property
    def wrapper(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def wait(self) -> int:
        """Wait for luo-qemu to end."""
        return self.wrapper.wait(PATIENCE_S)

    def kill(self) -> None:
        """End luo-qemu by SIGKILL; its QEMU lives."""
        self.wrapper.kill()
        assert self.wait() == -signal.SIGKILL

    def kill_qemu(self) -> None:
        signal.pidfd_send_signal(self._pidfds[self.qemu], signal.SIGKILL)
        self.qemu_ends()

    def qemu_ends(self) -> None:
        assert select.select([self._pidfds[self.qemu]], [], [], PATIENCE_S)[0], "QEMU does not end"

    def qemu_lives(self) -> bool:
        return not select.select([self._pidfds[self.qemu]], [], [], 0)[0]

    def words(self) -> str:
        return self.stderr.read_text(errors="replace")

    def users_monitor(self) -> Path:
        """Give the guest a monitor of its user's own."""
        path = self.world.dir / f"{self.name}.qmp"
        self.command += ["-qmp", f"unix:{path},server=on,wait=off"]
        return path

    # -- the guest

    def speak(self, ticks: int = 3) -> int:
        """Read until the guest has said so many ticks more; return the number of the last."""
        self.drain()
        return self.speak_until(self.log.last + ticks)

    def speak_until(self, tick: int) -> int:
        until = time.monotonic() + PATIENCE_S
        while self.log.last < tick:
            left = until - time.monotonic()
            assert left > 0, f"the guest says no more: {self.log}\n{self.words()}"
            if select.select([self.serial], [], [], left)[0]:
                self.log.feed(os.read(self.serial, 65536))
        return self.log.last

    def drain(self) -> int:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.serial, 65536):
                self.log.feed(data)
        return self.log.last

    def whole(self) -> None:
        """Fail unless the guest goes on, has lost no step, and its memory is intact all over."""
        self.speak_until(self.log.last + 2 * self.log.memory_kib // 1024 + 2)
        assert self.log.findings == []
        assert self.log.boots == 1

    # -- the end

    def __enter__(self) -> Tenant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(f"--- {self.name}\n{self.words()[-6000:]}\n")
        process = self.process
        if process is not None:
            for child in children_of(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    self.watch(child)
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE_S)
        for pid, pidfd in self._pidfds.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert select.select([pidfd], [], [], PATIENCE_S)[0], f"QEMU {pid} does not end"
            with contextlib.suppress(
                ChildProcessError
            ):  # an orphan falls to this process, which is a subreaper
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
        os.close(self.serial)
        if error is None:
            assert "Traceback" not in self.words(), self.words()[-6000:]


class Host(ExitStack):
    """A world and its tenants."""

    def __init__(self, state: Path, settings: str = "") -> None:
        super().__init__()
        self.state = state
        self.settings = settings

    def __enter__(self) -> Host:
        super().__enter__()
        self.world = self.enter_context(new_world(self.state, self.settings))
        self.tenants: list[Tenant] = []
        return self

    def tenant(self, name: str = "vm1", **options: Any) -> Tenant:
        tenant = self.enter_context(Tenant(self.world, name, **options))
        self.tenants.append(tenant)
        return tenant

    def kexec(self) -> str:
        """Begin an update, and return its id."""
        with self.world.client() as admin:
            return self.world.kexec(admin)

    def reboot(self) -> None:
        """Wait for the kexec; bury everybody, and start luod again in the new kernel."""
        self.world.next_boot()
        for tenant in self.tenants:
            if tenant.process is not None:
                tenant.wait()

    def session(self, name: str) -> dict[str, Any]:
        with self.world.client() as admin:
            return dict(admin.session(name)["session"])

    def companion(self, name: str = "slow") -> Companion:
        return self.enter_context(Companion(self.world, name))

    def aborted(self, update: str = "update/1") -> str:
        """Wait until an update was undone; return why."""
        return str(self.world.wait_record("update.aborted", update)["body"]["reason"])


class Companion:
    """Another client of the host, which is as slow at the barrier as a test wants."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.link = world.client()
        self.link.hello()
        self.link.subscribe(name)
        self.fd = -1

    def take(self) -> None:
        self.fd = self.link.next_event(PATIENCE_S, names=["START_PRESERVATION"]).take_fd()

    def preserve(self) -> None:
        self.take()
        self.link.preserved(self.name)

    def rejoin(self) -> None:
        """Connect again, to a luod that was restarted."""
        self.link.close()
        self.link = self.world.client()
        self.link.hello()
        self.link.subscribe(self.name)

    def hold(self) -> None:
        """Preserve, and let everybody wait at the second barrier."""
        self.preserve()
        self.link.next_event(PATIENCE_S, names=["FREEZE"]).close()

    def ready(self) -> None:
        """Let the update go on; the kexec may be quicker than the reply."""
        with contextlib.suppress(Timeout):
            self.link.call("READY", id=self.name, timeout=0)

    def let_go(self) -> None:
        """Do as an ABORT says."""
        self.link.next_event(PATIENCE_S, names=["ABORT"]).close()
        self.drop()
        self.link.aborted(self.name)

    def drop(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Companion:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        self.link.close()


def memfds_of(pid: int) -> Iterator[int]:
    """Open every memfd of a process, one after the other."""
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            where = os.readlink(f"/proc/{pid}/fd/{number}")
            if where.startswith("/memfd:"):
                fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
                try:
                    yield fd
                finally:
                    os.close(fd)


def is_vmstate(fd: int) -> bool:
    return os.pread(fd, 4, 0) == b"QEVM"


def is_ram(fd: int) -> bool:
    return os.pread(fd, 8, max(0, os.fstat(fd).st_size - TRAILER)) == b"LUODRAM1"


def flip(fd: int, place: int) -> None:
    os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 0x10]), place)
