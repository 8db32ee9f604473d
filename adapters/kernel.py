# SPDX-License-Identifier: Apache-2.0
"""The one place that chooses a kernel: the real device, or the emulator in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .liveupdate.device import LiveUpdate
from .liveupdate.syscalls import RealSyscalls

Backend = Literal["device", "emulated"]


def open_kernel(
    backend: Backend, *, directory: Path | None = None, held: bool = False, busy_deadline: float = 5.0
) -> LiveUpdate:
    """Return the kernel port. `directory` is where the emulator serves, and must be given for it alone.

    Nothing is opened yet; `status()` says whether the kernel answers. `busy_deadline` is in seconds.
    """
    if backend == "device":
        if directory is not None:
            raise ValueError("the device has no directory")
        return LiveUpdate(RealSyscalls(), held=held, busy_deadline=busy_deadline)
    if directory is None:
        raise ValueError("the emulator needs its directory")
    from .emulator.syscalls import EmulatedSyscalls  # real hosts start without it

    return LiveUpdate(EmulatedSyscalls(directory), held=held, busy_deadline=busy_deadline)
