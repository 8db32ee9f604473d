# SPDX-License-Identifier: Apache-2.0
"""What the tests of the emulator process share: forked processes of its world, threads that block, and a way to load an image."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate.errors import KernelError
from luod.engine.ports import KexecImage

CMDLINE = "liveupdate=on kho=on"


def load(emulator: Emulator, image: Path | None = None, cmdline: str = CMDLINE) -> None:
    kernel = open_kernel("emulated", directory=emulator.directory)
    kernel.load(KexecImage(image or stub_image(emulator.directory / "image"), None, cmdline))


class Child:
    """A forked process that runs `body(tell)` and then waits to be killed; `tell` reaches `heard`."""

    def __init__(self, body: Callable[[Callable[[bytes], None]], None]) -> None:
        self._told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                body(lambda data: void(os.write(tell, data)))
                while True:
                    signal.pause()
            finally:
                os._exit(3)
        os.close(tell)

    def heard(self) -> bytes:
        return os.read(self._told, 64)

    def is_silent(self) -> bool:
        return not select.select([self._told], [], [], 0)[0]

    def ended_by(self) -> int:
        """Wait for its end; the signal that ended it, or 0."""
        os.close(self._told)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) * -1

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.ended_by()


def void(_: object) -> None:
    return None


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run a call that may block; its result or its error is put in the list."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(call())
        except KernelError as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, result
