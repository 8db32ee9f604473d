# SPDX-License-Identifier: Apache-2.0
"""A kind of file for the emulator that no kernel knows: pipes. For tests of handlers outside of the emulator."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
import termios

from luod.adapters.emulator.handlers import (
    File,
    FileHandler,
    HandlerRegistry,
    Payload,
    Refused,
    RetrieveStatus,
    SessionView,
)
from luod.adapters.emulator.memfd_files import Descriptor


class PipeHandler(FileHandler):
    """Carries nothing but the fact that there was a pipe."""

    kind = "pipe"

    def can_preserve(self, file: File) -> bool:
        return stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)

    def preserve(self, file: File, session: SessionView, /) -> Payload:
        return None

    def freeze(self, file: File, data: Payload, session: SessionView) -> None:
        waiting = array.array("i", [0])
        fcntl.ioctl(file.fileno(), termios.FIONREAD, waiting)
        if waiting[0]:
            raise Refused(errno.EINVAL)

    def carry(self, file: File, data: Payload) -> Payload:
        return "pipe"

    def retrieve(self, payload: Payload) -> File:
        read_end, write_end = os.pipe()
        os.close(read_end)
        return Descriptor(write_end)

    def can_finish(self, payload: Payload, status: RetrieveStatus, /) -> bool:
        return status == "retrieved"


def add(registry: HandlerRegistry) -> None:
    """Add the kind."""
    registry.register("pipe", "pipe-v1", PipeHandler)
