# SPDX-License-Identifier: Apache-2.0
"""Open device files as the emulated kernel has them: what a call brings, what a file answers, and references to a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..cstruct import CStruct
from .handlers import File, Refused


@dataclass(eq=False)
class DeviceCall:
    """One ioctl on a device file: the argument, which is written to, the files that are named in it, and the memory it points to.

    `files` are by the byte offset of the s32 word that names them; a descriptor that is not open in the caller is not among them.
    They are closed after the call: who keeps one takes it out.
    """

    request: int
    argument: bytearray
    files: dict[int, File] = field(default_factory=dict[int, File])
    pointers: dict[int, bytearray] = field(default_factory=dict[int, bytearray])

    def user_size(self) -> int:
        """Read the u32 that every struct begins with."""
        if len(self.argument) < 4:
            raise Refused(errno.EFAULT)
        return int.from_bytes(self.argument[:4], "little")

    def whole(self, struct: CStruct) -> dict[str, int]:
        """Read the fields of a struct that has a tail: EINVAL when the caller's is shorter, EFAULT."""
        size = self.user_size()
        if size < struct.size:
            raise Refused(errno.EINVAL)
        if size > len(self.argument):
            raise Refused(errno.EFAULT)
        return struct.unpack(self.argument)

    def take(self, minimum: int, known: int) -> bytearray:
        """Take the struct in as copy_struct_from_user() does, zeros where the caller's is shorter: EINVAL, EFAULT, E2BIG."""
        size = self.user_size()
        if size < minimum:
            raise Refused(errno.EINVAL)
        if size > len(self.argument):
            raise Refused(errno.EFAULT)
        if any(self.argument[known:size]):
            raise Refused(errno.E2BIG)
        return bytearray(self.argument[: min(size, known)].ljust(known, b"\0"))

    def give(self, struct: bytearray) -> None:
        """Copy a struct back, no further than the caller has room."""
        room = min(self.user_size(), len(self.argument), len(struct))
        self.argument[:room] = struct[:room]

    def keep(self, offset: int) -> File:
        """Take a named file for good; EBADF if the descriptor is not open."""
        if offset not in self.files:
            raise Refused(errno.EBADF)
        return self.files.pop(offset)


class OpenFile(Protocol):
    """An open file description of a device."""

    label: str
    """What it is called in the audit."""
    requests: Mapping[int, tuple[str, CStruct | None]]
    """The names of the requests it knows, and their structs."""
    queries: frozenset[int]
    """Those of them that change nothing."""

    def ioctl(self, call: DeviceCall) -> int:
        """Run an ioctl."""
        ...

    def pread(self, length: int, offset: int) -> bytes:
        """Read."""
        ...

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write."""
        ...

    def release(self) -> None:
        """See the last close."""
        ...


@dataclass(eq=False)
class Reference:
    """A reference on an open device file: a descriptor of its user's end. The file is released when the last one is closed."""

    opened: OpenFile
    fd: int

    def fileno(self) -> int:
        """Return the descriptor."""
        return self.fd

    def close(self) -> None:
        """Drop the reference."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


Publish = Callable[[OpenFile], File]
"""Makes a new open file reachable, and returns the first reference on it."""


def opened(file: File | None) -> OpenFile | None:
    """Return the device file that a reference is on; None for any other file."""
    return file.opened if isinstance(file, Reference) else None
