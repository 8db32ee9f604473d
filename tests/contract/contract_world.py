# SPDX-License-Identifier: Apache-2.0
"""The world a contract case runs in: a kernel behind the port, and fds that are closed when the case ends."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from luod.adapters import memfd
from luod.adapters.emulator.memfd_files import TMPFS_MAGIC, filesystem_magic
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate import abi
from luod.adapters.liveupdate.errors import KernelError

PAGE = mmap.PAGESIZE


class World:
    """`backend` is "device" or "emulated". `kept` are the session fds that have to live until the kexec."""

    def __init__(self, backend: str, directory: Path | None = None) -> None:
        if backend not in {"device", "emulated"}:
            raise ValueError(backend)
        self.backend = backend
        self.directory = directory
        self.kernel = (
            open_kernel("device") if backend == "device" else open_kernel("emulated", directory=directory)
        )
        self.syscalls = self.kernel.syscalls
        self.kept: list[int] = []
        self.kept_sessions: list[int] = []
        self._owned: list[int] = []
        raise_file_limit()

    # -- fds -------------------------------------------------------------------------------------------------------------------

    def own(self, fd: int) -> int:
        """Close this fd when the case ends."""
        self._owned.append(fd)
        return fd

    def close(self, fd: int) -> None:
        """Close an owned fd now."""
        self._owned.remove(fd)
        os.close(fd)

    def keep(self, fd: int) -> int:
        """Hold this fd until the kexec."""
        if fd in self._owned:
            self._owned.remove(fd)
        self.kept.append(fd)
        return fd

    def end_case(self) -> None:
        """Close what the case has left open."""
        while self._owned:
            with contextlib.suppress(OSError):
                os.close(self._owned.pop())

    def end(self) -> None:
        """Close everything."""
        self.end_case()
        while self.kept:
            os.close(self.kept.pop())
        self.kernel.close()

    # -- making things ---------------------------------------------------------------------------------------------------------

    def session(self, name: str) -> int:
        """An outgoing session that ends with the case."""
        return self.own(self.kernel.create_session(name))

    def kept_session(self, name: str) -> int:
        """An outgoing session that goes through the kexec."""
        fd = self.keep(self.kernel.create_session(name))
        self.kept_sessions.append(fd)
        return fd

    def incoming(self, name: str) -> int:
        """Retrieve a session that came with the kexec."""
        return self.own(self.kernel.retrieve_session(name))

    def device(self) -> int:
        """The open device."""
        return self.own(self.syscalls.open_device())

    def memfd(self, content: bytes = b"", size: int = 0, *, sealing: bool = True) -> int:
        """A memfd with that content at its start, offset 0."""
        fd = self.own(memfd.create("contract", max(size, len(content)), sealing=sealing))
        if content:
            os.pwrite(fd, content, 0)
        return fd

    def retrieved(self, session: int, token: int) -> int:
        """RETRIEVE_FD."""
        return self.own(self.kernel.retrieve_fd(session, token))

    # -- raw calls -------------------------------------------------------------------------------------------------------------

    def ioctl(self, fd: int, request: int, buf: bytes | bytearray) -> bytearray:
        """One raw ioctl; returns the struct as the kernel left it."""
        arg = bytearray(buf)
        self.syscalls.ioctl(fd, request, arg)
        return arg

    def preserve_raw(self, session: int, token: int, fd: int) -> None:
        """PRESERVE_FD."""
        self.ioctl(session, abi.PRESERVE_FD, abi.pack_fd(token, fd))

    def tmpfs(self) -> Path:
        """A directory on a tmpfs."""
        for path in ("/dev/shm", "/run", "/tmp", "/dev"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                if filesystem_magic(fd) == TMPFS_MAGIC and os.access(path, os.W_OK):
                    return Path(path)
            finally:
                os.close(fd)
        raise AssertionError("no writable tmpfs on this machine: mount one on /dev/shm")


def errno_of(call: Callable[..., object], *args: object) -> int:
    """The errno a call ends with; 0 if it ends well."""
    try:
        call(*args)
    except KernelError as error:
        return error.errno
    except OSError as error:
        return error.errno or 0
    return 0


@contextlib.contextmanager
def refused(errno: int) -> Iterator[None]:
    """What is inside must end with that errno."""
    try:
        yield
    except (KernelError, OSError) as error:
        if error.errno != errno:
            raise AssertionError(f"errno {error.errno} instead of {errno}: {error}") from error
        return
    raise AssertionError(f"nothing was refused; errno {errno} was due")


def read_all(fd: int) -> bytes:
    """The whole file, without moving its offset."""
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0) if size else b""


def mapped(fd: int) -> bytes:
    """The whole file, as a shared read-only mapping shows it."""
    with mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as view:
        return bytes(view)


def raise_file_limit() -> None:
    """The stress cases hold thousands of fds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 14
    if soft < wanted:
        top = wanted if hard == resource.RLIM_INFINITY or hard >= wanted or os.geteuid() == 0 else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, max(top, hard)))


@contextlib.contextmanager
def no_free_fd() -> Iterator[None]:
    """While this lasts no fd can be opened: EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
