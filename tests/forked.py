# SPDX-License-Identifier: Apache-2.0
"""Processes that are forks of this one: as mortal as any, and with nothing to import before they begin.

Whoever forks has one thread, or threads that hold nothing which a child needs.
"""

from __future__ import annotations

import importlib
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 30.0


class Child:
    """A fork that runs one function and ends with 0, or with 1 and a traceback. Waited for by its pidfd."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                run()
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)
        self._pidfd = os.pidfd_open(self.pid)
        self._code: int | None = None

    def wait(self) -> int:
        """Wait for its end; the exit code, or minus the signal."""
        if self._code is None:
            assert select.select([self._pidfd], [], [], PATIENCE_S)[0], f"process {self.pid} does not end"
            status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            os.close(self._pidfd)
            assert status is not None
            self._code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        return self._code

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        if self._code is None:
            signal.pidfd_send_signal(self._pidfd, number)
        return self.wait()


class ForkedProgram(Child):
    """A program of ours that says on a pipe when it is ready, without an interpreter of its own to start."""

    def __init__(self, log: Path, module: str, *args: object) -> None:
        run = importlib.import_module(f"{module}.__main__").run
        ready, ready_end = os.pipe()

        def alone() -> None:
            # As after an exec, it has no descriptor but these: it would keep emulators and sessions of the test alive.
            nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
            for place, fd in enumerate((nothing, output, output)):
                os.dup2(fd, place)
            os.closerange(3, ready_end)
            os.closerange(ready_end + 1, os.sysconf("SC_OPEN_MAX"))
            sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
            os._exit(run([*map(str, args), "--ready-fd", str(ready_end)]))

        super().__init__(alone)
        os.close(ready_end)
        with open(ready, "rb", buffering=0) as pipe:
            if not pipe.read(1):
                raise AssertionError(f"{module} ended with {self.wait()}:\n{log.read_text(errors='replace')}")
