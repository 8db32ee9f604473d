# SPDX-License-Identifier: Apache-2.0
"""Processes of the demo: forked from one that has imported everything, watched by pidfd, never left behind.

Forking instead of executing saves the interpreter's start for each of them, which is most of the time that a crash sweep takes. The
parent has one thread only; a child keeps no descriptor but those it is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from pathlib import Path

_STOPPING = {signal.SIGINT, signal.SIGTERM}
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
"""prctl(2), from linux/prctl.h."""


@contextlib.contextmanager
def undisturbed() -> Generator[None]:
    """Let a Ctrl-C or SIGTERM wait until the block, or the function, is left.

    Between fork and the moment that somebody knows the child, it would leave a child that nobody ends, or one that speaks as its parent.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Child:
    """A forked process: its pid, a pidfd, and the pipe on which it reports lines."""

    def __init__(self, name: str, work: Callable[[int], int], log: Path) -> None:
        self.name = name
        self.log = log
        self.code: int | None = None
        self._buffer = b""
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        read, write = os.pipe2(os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        with undisturbed():
            self.pid = os.fork()
            if self.pid == 0:
                _become(work, write, out, parent)
            os.close(write)
            os.close(out)
            self.pidfd = os.pidfd_open(self.pid)
            self.pipe = read

    def line(self, timeout: float | None = None) -> bytes:
        """Return the next line that the process reports; empty when it has ended or `timeout` seconds have passed."""
        while b"\n" not in self._buffer:
            poll = select.poll()
            poll.register(self.pipe, select.POLLIN)
            if not poll.poll(None if timeout is None else max(0, int(timeout * 1000))):
                return b""
            data = os.read(self.pipe, 65536)
            if not data:
                return b""
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line + b"\n"

    def lines_now(self) -> list[bytes]:
        """Return the whole lines that can be had without waiting."""
        poll = select.poll()
        poll.register(self.pipe, select.POLLIN)
        while poll.poll(0):
            data = os.read(self.pipe, 65536)
            if not data:
                break
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        return lines

    def ended(self, timeout: float | None = 0.0) -> bool:
        """Wait for the end for `timeout` seconds (None: for ever); say whether it has come."""
        if self.code is not None:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else int(timeout * 1000)):
            return False
        with undisturbed():  # who has reaped it must know that, for nobody can once more
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
        return True

    def stop(self, number: signal.Signals = signal.SIGKILL, *, patience: float = 10.0) -> None:
        """End the process and let go of it."""
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)
            if not self.ended(patience):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                self.ended(None)
        for fd in (self.pidfd, self.pipe):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.pidfd = self.pipe = -1

    def fds(self) -> list[str]:
        """Return what the process has open, by kind."""
        kinds: list[str] = []
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                kinds.append(os.readlink(f"/proc/{self.pid}/fd/{name}").split(":[")[0])
        return sorted(kinds)


def _become(work: Callable[[int], int], pipe: int, out: int, parent: int) -> None:
    """Be the child: its log as standard output and error, the pipe, and nothing else. It does not outlive its parent."""
    code = 1
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel was asked to tell
            os._exit(code)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(pipe, 200)
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.closerange(3, 200)
        os.closerange(201, 1 << 16)
        os.set_inheritable(200, False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # SIGINT stays blocked, also in what the child starts: a Ctrl-C goes to everybody, and the harness stops the others in order.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (the process ends with it)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        code = work(200)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
