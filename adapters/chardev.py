# SPDX-License-Identifier: Apache-2.0
"""The seam under iommufd and VFIO: everything that is asked of their device files, and nothing else.

`DeviceFiles` is implemented by `SystemCalls` here, and by the emulator, where a call is a message to a process that stands for the kernel.
That process sees neither the caller's descriptors nor its memory. So who calls says which words of an argument are descriptors
(`fds`) and which are pointers, and to what (`pointers`).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

NO_POINTERS: Mapping[int, bytearray] = {}


class DeviceFiles(Protocol):
    """What can be done to a device file. Every failure is an OSError with the kernel's errno."""

    def open(self, path: str) -> int:
        """Open a device node for reading and writing, close-on-exec; return the fd, which is the caller's to close."""
        ...

    def ioctl(
        self,
        fd: int,
        request: int,
        argument: bytearray | int = 0,
        *,
        fds: Sequence[int] = (),
        pointers: Mapping[int, bytearray] = NO_POINTERS,
    ) -> int:
        """Run one ioctl and return what it returns, which for some is a new fd.

        `argument` is a struct, which the kernel may write to, or a number passed by value. `fds` are the byte offsets of the s32 words
        in it that are open descriptors of this process. `pointers` are the offsets of u64 words that point to more memory: that memory,
        read and written by the kernel, whose address is put there.
        """
        ...

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Read from a device file."""
        ...

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write to a device file; return how many bytes were taken."""
        ...

    def mmap(self, fd: int, length: int, offset: int) -> mmap.mmap:
        """Map a part of a device file, shared, for reading and writing."""
        ...

    def speaks_proposed(self) -> bool:
        """Say whether the kernel behind these files gives the numbers of `adapters.proposed` the meaning that they have there."""
        ...


class SystemCalls:
    """The running kernel."""

    def open(self, path: str) -> int:
        """Open the node."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(
        self,
        fd: int,
        request: int,
        argument: bytearray | int = 0,
        *,
        fds: Sequence[int] = (),
        pointers: Mapping[int, bytearray] = NO_POINTERS,
    ) -> int:
        """Make the call, again when a signal cuts in (`fcntl.ioctl` does not do that by itself)."""
        if isinstance(argument, int):
            return _restarted(fd, request, argument)
        held = [
            (offset, (ctypes.c_char * len(memory)).from_buffer(memory)) for offset, memory in pointers.items()
        ]
        for offset, memory in held:
            argument[offset : offset + 8] = ctypes.addressof(memory).to_bytes(8, "little")
        return _restarted(fd, request, argument)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Read, at an offset."""
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write, at an offset."""
        return os.pwrite(fd, data, offset)

    def mmap(self, fd: int, length: int, offset: int) -> mmap.mmap:
        """Map, shared."""
        return mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def speaks_proposed(self) -> bool:
        """Say no: nothing of it is merged, and a kernel cannot be asked what one of its numbers means."""
        return False


def _restarted(fd: int, request: int, argument: bytearray | int) -> int:
    while True:
        try:
            if isinstance(argument, int):
                return fcntl.ioctl(fd, request, argument)
            return int(fcntl.ioctl(fd, request, argument, True))
        except InterruptedError:
            continue
