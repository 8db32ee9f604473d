# SPDX-License-Identifier: Apache-2.0
"""The memfd handler on real memfds (what mm/memfd_luo.c does in the kernel), and the files it works on."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from ..memfd import F_ADD_SEALS, F_GET_SEALS, KNOWN_SEALS, create_anonymous
from .handlers import File, FileHandler, Refused, SessionView

TMPFS_MAGIC = 0x01021994
_COPY_CHUNK = 1 << 30


class _StatFs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 248))


_libc = ctypes.CDLL(None, use_errno=True)


def filesystem_magic(fd: int) -> int:
    """Return f_type of fstatfs(2), which Python's own statvfs leaves out."""
    facts = _StatFs()
    if _libc.fstatfs(ctypes.c_int(fd), ctypes.byref(facts)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(facts.f_type)


@dataclass(eq=False)
class Descriptor:
    """An fd that the emulated kernel holds: its own reference on an open file description."""

    fd: int

    def fileno(self) -> int:
        """Return the fd."""
        return self.fd

    def close(self) -> None:
        """Drop the reference."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass
class MemfdState:
    """What is taken of a preserved memfd: size and seals at preserve, the offset at freeze."""

    size: int
    seals: int
    offset: int = 0
    frozen: bool = False
    successor: Descriptor | None = None
    """The memory that the next kernel finds, once it is carried."""


@dataclass
class CarriedMemfd:
    """A memfd between two kernels: its bytes in a fresh, still unsealed memfd of the emulated kernel."""

    content: Descriptor
    size: int
    seals: int
    offset: int

    def close(self) -> None:
        """Free the memory."""
        self.content.close()


def _as_descriptor(file: File) -> Descriptor:
    if not isinstance(file, Descriptor):
        raise TypeError(f"not a file of this handler: {file!r}")
    return file


def _number(error: OSError) -> int:
    # tmpfs says ENOSPC when it may not grow; the kernel proper, working on pages, says ENOMEM.
    return errno.ENOMEM if error.errno in {None, errno.ENOSPC} else int(error.errno or errno.EIO)


class MemfdHandler(FileHandler):
    """memfds without huge pages, and unlinked tmpfs files.

    `deviation(text)` is told when the old world did what the kernel would have refused: the size of a preserved file is frozen
    there (EPERM), but nothing in user space can freeze it.
    """

    kind = "memfd"

    def __init__(self, compatible: str, deviation: Callable[[str], None]) -> None:
        super().__init__(compatible)
        self._deviation = deviation

    def can_preserve(self, file: File) -> bool:
        """Shmem-backed and without a name: hugetlb, devices, sockets and linked files are not."""
        if not isinstance(file, Descriptor):
            return False
        facts = os.fstat(file.fd)
        return (
            stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0 and filesystem_magic(file.fd) == TMPFS_MAGIC
        )

    def get_id(self, file: File) -> Hashable:
        """The inode: two opens of one memfd are the same object."""
        facts = os.fstat(_as_descriptor(file).fd)
        return (facts.st_dev, facts.st_ino)

    def preserve(self, file: File, _session: SessionView, /) -> MemfdState:
        """Take size and seals, and fill the holes as pinning every page does."""
        fd = _as_descriptor(file).fd
        seals = fcntl.fcntl(fd, F_GET_SEALS)
        if seals & ~KNOWN_SEALS:
            raise Refused(errno.EOPNOTSUPP)
        facts = os.fstat(fd)
        if facts.st_size and facts.st_blocks * 512 < facts.st_size:
            self._fill(fd, facts.st_size)
        return MemfdState(facts.st_size, seals)

    @staticmethod
    def _fill(fd: int, size: int) -> None:
        try:
            writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return  # The file cannot be opened for writing by this user: its holes are filled when it is carried.
        try:
            os.posix_fallocate(writable, 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise Refused(errno.ENOMEM) from error
            raise Refused(int(error.errno or errno.EIO)) from error
        finally:
            os.close(writable)

    def freeze(self, file: File, data: MemfdState, session: SessionView) -> None:
        """Take the file offset; report a size that changed although it was frozen."""
        fd = _as_descriptor(file).fd
        data.offset = os.lseek(fd, 0, os.SEEK_CUR)
        data.frozen = True
        now = os.fstat(fd).st_size
        if now != data.size:
            self._deviation(
                f"session {session.name.decode('utf-8', 'backslashreplace')}: a preserved memfd went from {data.size} to {now} "
                "bytes; the kernel refuses that with EPERM. The size at preservation is carried"
            )

    def unfreeze(self, _file: File, data: MemfdState, /) -> None:
        """Forget the offset."""
        data.frozen = False

    def carry(self, file: File, data: MemfdState) -> CarriedMemfd:
        """Copy the bytes as they are now into fresh memory, holes as zero pages."""
        source = _as_descriptor(file).fd
        fresh = create_anonymous()
        try:
            os.ftruncate(fresh, data.size)
            if data.size:
                os.posix_fallocate(fresh, 0, data.size)
            _copy(source, fresh, min(data.size, os.fstat(source).st_size))
        except BaseException:
            os.close(fresh)
            raise
        carried = CarriedMemfd(Descriptor(fresh), data.size, data.seals, data.offset)
        data.successor = carried.content
        return carried

    def discard(self, payload: CarriedMemfd) -> None:
        """Free the memory."""
        payload.close()

    def retrieve(self, payload: CarriedMemfd) -> Descriptor:
        """Seal, set the offset, and hand the file out.

        A memfd with F_SEAL_EXEC comes back write-sealed, because it is made executable first: the running kernel adds the same
        seals here as it does there.
        """
        try:
            os.lseek(payload.content.fd, payload.offset, os.SEEK_SET)
            if payload.seals:
                fcntl.fcntl(payload.content.fd, F_ADD_SEALS, payload.seals)
        except OSError as error:
            payload.close()
            raise Refused(_number(error)) from error
        return payload.content

    def inspect(self, payload: object, /) -> Mapping[str, object]:
        """Size, seals and offset."""
        if isinstance(payload, MemfdState | CarriedMemfd):
            return {"size": payload.size, "seals": payload.seals, "offset": payload.offset}
        return {}


def _copy(source: int, target: int, size: int) -> None:
    """Copy the data of `source` (not its holes) to the same places of `target`, without moving the offset of `source`."""
    place = 0
    with open(f"/proc/self/fd/{source}", "rb", buffering=0) as reader:
        # A description of its own: SEEK_DATA would move the shared offset, which is part of what is carried.
        while place < size:
            try:
                start = os.lseek(reader.fileno(), place, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # only holes follow
                raise
            end = min(os.lseek(reader.fileno(), start, os.SEEK_HOLE), size)
            os.lseek(target, start, os.SEEK_SET)
            while start < end:
                start += os.sendfile(target, reader.fileno(), start, min(end - start, _COPY_CHUNK))
            place = end
    os.lseek(target, 0, os.SEEK_SET)
