# SPDX-License-Identifier: Apache-2.0
"""`QemuProcess`: one QEMU, started here or found running, watched by pidfd.

QEMU's stderr goes to a memfd, not to a pipe: QEMU can never block on it, and it is still there for whoever adopts the process after
the one that started it has died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from .errors import LaunchFailed, NotThatQemu, RamMismatch, VmmDied, restore_error
from .monitor import Monitor

TAIL = 4096
"""How many bytes of QEMU's stderr are read for a message."""
_DEATH_S = 2.0


class Identity(msgspec.Struct, frozen=True):
    """What names a process for good within one boot: its pid and its start time in clock ticks after boot (proc(5), stat, 22)."""

    pid: int
    started: int


def identity(pid: int) -> Identity:
    """Return the identity of a running process. Raises `NotThatQemu` when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise NotThatQemu(f"no process {pid}", hint="it has ended; start another QEMU") from None
    return Identity(pid, int(stat.rpartition(")")[2].split()[19]))


class QemuProcess:
    """A QEMU process and the path of its monitor. Use it as a context manager, or call `close` or `release`.

    `close` ends what was started here and lets go of what was adopted; `release` lets both run on.
    """

    def __init__(
        self, pid: int, pidfd: int, monitor: Path, stderr: int | None, child: subprocess.Popen[bytes] | None
    ) -> None:
        self.identity = identity(pid)
        self.monitor_path = monitor
        self._pidfd = pidfd
        self._stderr = stderr
        self._child = child
        self._status: int | None = None
        self._lock = threading.Lock()

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        monitor: Path,
        *,
        pass_fds: Sequence[int] = (),
        terminal: bool = False,
    ) -> QemuProcess:
        """Start QEMU with `argv`, which must make it serve its monitor at `monitor` (`-qmp unix:PATH,server=on,wait=off`).

        `pass_fds` are inherited under their own numbers. With `terminal` QEMU has the stdin and stdout of this process, else none. A socket
        left over at `monitor` is removed. QEMU lives on when this process ends. Raises `LaunchFailed` when there is no such program.
        """
        with contextlib.suppress(FileNotFoundError):
            monitor.unlink()
        stderr = os.memfd_create("qemu.stderr", os.MFD_CLOEXEC)
        try:
            # In append mode, so that it may be emptied while QEMU writes.
            fcntl.fcntl(stderr, fcntl.F_SETFL, os.O_APPEND)
            child = subprocess.Popen(
                list(argv),
                stdin=None if terminal else subprocess.DEVNULL,
                stdout=None if terminal else stderr,
                stderr=stderr,
                pass_fds=tuple(pass_fds),
            )
        except OSError as error:
            os.close(stderr)
            raise LaunchFailed(
                f"cannot start {argv[0]}: {error.strerror}",
                hint="install QEMU, or name the binary that the guest was started with",
                errno=_name(error),
            ) from None
        except BaseException:
            os.close(stderr)
            raise
        try:
            return cls(child.pid, os.pidfd_open(child.pid), monitor, stderr, child)
        except BaseException:
            child.kill()
            child.wait()
            os.close(stderr)
            raise

    @classmethod
    def adopt(cls, expected: Identity, monitor: Path) -> QemuProcess:
        """Take over watching a QEMU that somebody else has started.

        Raises `NotThatQemu` when the pid is free or another process has it by now. That it is the one behind the monitor is checked
        by `connect`.
        """
        try:
            pidfd = os.pidfd_open(expected.pid)
        except ProcessLookupError:
            raise NotThatQemu(f"no process {expected.pid}", hint="it has ended; start another QEMU") from None
        try:
            # The pidfd was opened before: if the start time is right now, the pidfd is of that process.
            found = identity(expected.pid)
            if found != expected:
                raise NotThatQemu(
                    f"process {expected.pid} was started at tick {found.started}, not at {expected.started}",
                    hint="the pid was used again: that QEMU has ended",
                )
            return cls(expected.pid, pidfd, monitor, _reopened_stderr(expected.pid), None)
        except BaseException:
            os.close(pidfd)
            raise

    # -- life

    @property
    def pid(self) -> int:
        """The pid."""
        return self.identity.pid

    def alive(self) -> bool:
        """Say whether the process still runs."""
        return not self.wait(0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended gets none."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    @property
    def status(self) -> int | None:
        """How it ended: its exit code, or minus the number of a signal; None while it runs, and for an adopted process."""
        return self._status

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the process to end, for ever without a timeout; say whether it has."""
        with self._lock:
            if self._pidfd < 0:
                return True
            pidfd = os.dup(self._pidfd)  # another thread may let go of it meanwhile
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000):
                return False
        finally:
            os.close(pidfd)
        if self._child is not None and self._status is None:
            self._status = self._child.wait()
        return True

    def fileno(self) -> int:
        """Return the pidfd, which becomes readable when the process ends."""
        return self._pidfd

    def kill(self) -> None:
        """End the process by SIGKILL and wait for its end. The guest's memory stays in its memfds."""
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """End a process that was started here, and give back every descriptor. An adopted process runs on."""
        if self._child is not None:
            self.kill()
        self.release()

    def release(self) -> None:
        """Give back every descriptor; the process runs on."""
        if self._child is not None and self._status is None:
            # Popen warns of a child that nobody waited for; here that is what was asked for.
            self._child.returncode = self._child.poll() or 0
        with self._lock:
            for fd in (self._pidfd, self._stderr):
                if fd is not None and fd >= 0:
                    os.close(fd)
            self._pidfd, self._stderr = -1, None

    def __enter__(self) -> QemuProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- words

    def new_words(self, after: int) -> bytes:
        """Return what QEMU has written to its stderr behind an offset in bytes."""
        return b"" if self._stderr is None else os.pread(self._stderr, 1 << 16, after)

    def stderr_tail(self) -> str:
        """Return the end of what QEMU has written to stdout and stderr."""
        with self._lock:
            if self._stderr is None:
                return ""
            size = os.fstat(self._stderr).st_size
            tail = os.pread(self._stderr, TAIL, max(0, size - TAIL))
        return tail.decode(errors="replace").strip()

    def obituary(self) -> str:
        """Say how the process ended, in QEMU's own last words where there are any; empty while it runs."""
        # A QEMU that is killed closes its sockets a little before its pidfd says so.
        if not self.wait(_DEATH_S):
            return ""
        how = f"process {self.pid} " + _ending(self._status)
        words = self.stderr_tail()
        return f"{how}: {words}" if words else how

    # -- the monitor

    def connect(self, *, timeout_s: float) -> Monitor:
        """Connect to the monitor of this very process, as soon as it serves it. The caller closes it.

        Raises `NotThatQemu` when another process listens there, `MonitorTimeout`, and when QEMU ends first the `RestoreFailed` that
        its last words stand for, or `LaunchFailed`.
        """
        try:
            return Monitor.connect(
                self.monitor_path,
                timeout_s=timeout_s,
                alive=self.alive,
                obituary=self.obituary,
                check=self._check_peer,
                name=f"QEMU {self.pid}",
            )
        except (LaunchFailed, VmmDied):
            # It listens before it opens the memory, so it may also end with the conversation begun.
            if self.alive():
                raise
            failure = restore_error("its memory", self.stderr_tail())
            raise (failure if isinstance(failure, RamMismatch) else self._launch_failed()) from None

    def _launch_failed(self) -> LaunchFailed:
        return LaunchFailed(
            f"QEMU did not start: {self.obituary()}", hint="run the command line by hand to see more"
        )

    def _check_peer(self, sock: socket.socket) -> None:
        """The kernel remembers who called listen(2): SO_PEERCRED, unix(7)."""
        size = struct.calcsize("3i")
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if pid != self.pid:
            raise NotThatQemu(
                f"{self.monitor_path} is served by process {pid}, not by QEMU {self.pid}",
                hint="let QEMU listen by itself: `-qmp unix:PATH,server=on,wait=off`, one path for each guest",
            )

    # -- descriptors

    def maps_shared(self, fd: int) -> bool:
        """Say whether the process has the file behind `fd` mapped writable and shared.

        By inode, not by name: a memfd that came through a kexec has none. (proc_pid_maps(5))
        """
        facts = os.fstat(fd)
        device = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}"
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            _, permissions, _, where, inode, *_ = line.split(maxsplit=5)
            if permissions[:2] + permissions[3] == "rws" and (where, int(inode)) == (device, facts.st_ino):
                return True
        return False

    def require_mapped(self, fds: Sequence[int]) -> None:
        """Raise `RamMismatch` unless each memfd is the guest's memory, mapped writable and shared.

        QEMU opens the memory by a number in /proc/self/fd. If that number is another file there, or share=off, it starts all the
        same, and what the guest writes is lost at the next update.
        """
        for fd in fds:
            if not self.maps_shared(fd):
                raise RamMismatch(
                    f"QEMU {self.pid} has not mapped the memfd of inode {os.fstat(fd).st_ino} as shared memory",
                    hint="memory-backend-file,mem-path=/proc/self/fd/N,share=on with N inherited, and no -add-fd of N",
                )

    def open_descriptor(self, number: int, flags: int) -> int:
        """Open again what the process holds under a descriptor number. OSError where it is no file, or is not allowed."""
        return os.open(f"/proc/{self.pid}/fd/{number}", flags | os.O_CLOEXEC)

    def find_descriptor(self, inode: int, device: int, flags: int) -> int | None:
        """Open again the file of that inode, if the process has it open: how memory is found again by one who adopts QEMU."""
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                facts = os.stat(f"/proc/{self.pid}/fd/{name}")
                if (facts.st_ino, facts.st_dev) == (inode, device):
                    return self.open_descriptor(int(name), flags)
        return None


def _ending(status: int | None) -> str:
    if status is None:
        return "has ended"
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _reopened_stderr(pid: int) -> int | None:
    """Return the memfd that an adopted process writes its stderr to, if it is one."""
    try:
        if "memfd:qemu.stderr" in os.readlink(f"/proc/{pid}/fd/2"):
            return os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        pass
    return None


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "")
