# SPDX-License-Identifier: Apache-2.0
"""Start and stop an emulator process, without polling and without leaving one behind."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from ..liveupdate.errors import DeviceAbsent
from .control import Control

_STOP_SECONDS = 30.0


class Emulator:
    """A running emulator. Use it as a context manager, or call `stop`; it also ends when this process does."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], lifeline: int) -> None:
        self.directory = directory
        self._process = process
        self._lifeline = lifeline

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        cmdline: str | None = None,
        image: Path | None = None,
        handlers: Iterable[str] = (),
        devices: Iterable[str] = (),
        command: Sequence[str] = (sys.executable, "-m", "luod.adapters.emulator"),
    ) -> Emulator:
        """Start one with its sockets in `directory`, and return when it serves. DeviceAbsent if it ends instead.

        `cmdline` and `image` are those of the first kernel, `handlers` name extra file handlers as MODULE:FUNCTION,
        `devices` PCI devices as NAME[,bdf=B][,driver=D][,vf][,noiommu].
        """
        argv = [*command, "--dir", str(directory)]
        if cmdline is not None:
            argv += ["--cmdline", cmdline]
        if image is not None:
            argv += ["--image", str(image)]
        for handler in handlers:
            argv += ["--handler", handler]
        for device in devices:
            argv += ["--device", device]
        ready, ready_end = os.pipe2(os.O_CLOEXEC)
        lifeline_end, lifeline = os.pipe2(os.O_CLOEXEC)
        argv += ["--ready-fd", str(ready_end), "--lifeline-fd", str(lifeline_end)]
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=(ready_end, lifeline_end))
        except BaseException:
            os.close(lifeline)
            os.close(ready)
            raise
        finally:
            os.close(ready_end)
            os.close(lifeline_end)
        with open(ready, "rb") as pipe:
            line = pipe.readline()
        emulator = cls(directory, process, lifeline)
        if not line:
            emulator.stop()
            raise DeviceAbsent(
                "start",
                str(directory),
                errno.ENODEV,
                detail="the emulator ended at once",
                hint="see what it wrote to stderr",
            )
        return emulator

    @property
    def pid(self) -> int:
        """The pid of the emulator process."""
        return self._process.pid

    def control(self, *, timeout: float | None = None) -> Control:
        """Open a connection to the control desk; the caller closes it."""
        return Control(self.directory, timeout=timeout)

    def stop(self) -> None:
        """End the emulator and wait for its end. Processes of the world are left alone."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()

    def __enter__(self) -> Emulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
