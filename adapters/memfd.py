# SPDX-License-Identifier: Apache-2.0
"""memfds made so that a live update carries them unharmed, and the traps of those that were not.

What survives: bytes, size and seals as they were at PRESERVE_FD, the offset at the reboot. What does not: the name, mode, owner,
access mode, and every seal added after PRESERVE_FD. (Documentation/mm/memfd_preservation.rst, mm/memfd_luo.c)
"""

from __future__ import annotations

import errno
import fcntl
import os

import msgspec

from ..states.errors import LuodError

F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x01
F_SEAL_SHRINK = 0x02
F_SEAL_GROW = 0x04
F_SEAL_WRITE = 0x08
F_SEAL_FUTURE_WRITE = 0x10
F_SEAL_EXEC = 0x20
KNOWN_SEALS = 0x3F

SEAL_NAMES = {
    F_SEAL_SEAL: "SEAL",
    F_SEAL_SHRINK: "SHRINK",
    F_SEAL_GROW: "GROW",
    F_SEAL_WRITE: "WRITE",
    F_SEAL_FUTURE_WRITE: "FUTURE_WRITE",
    F_SEAL_EXEC: "EXEC",
}

PRESERVATION_SEALS = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL

MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
MFD_NOEXEC_SEAL = 0x8
MFD_EXEC = 0x10

_BLOCK = 512


class MemfdError(LuodError):
    """A memfd cannot be made, sealed or looked at."""


class MemfdFacts(msgspec.Struct, frozen=True):
    """What matters of a memfd for a live update. Sizes in bytes; `problems` names what would go wrong, empty if nothing."""

    size: int
    allocated: int
    offset: int
    seals: int
    writable: bool
    sealed_for_preservation: bool
    problems: tuple[str, ...] = ()

    @property
    def seal_names(self) -> tuple[str, ...]:
        """The seals by name, lowest bit first."""
        return tuple(name for bit, name in SEAL_NAMES.items() if self.seals & bit)


def _memfd(name: str, flags: int) -> int:
    """memfd_create with MFD_EXEC where the kernel knows it (Linux 6.3).

    Without it, a host with vm.memfd_noexec=1 makes a memfd that a live update gives back write-sealed.
    """
    try:
        return os.memfd_create(name, flags | MFD_EXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return os.memfd_create(name, flags)
        raise


def create(name: str, size: int, *, sealing: bool = True) -> int:
    """Make a memfd of `size` bytes and return its fd, close-on-exec.

    `sealing` allows seals to be added. EACCES comes from vm.memfd_noexec=2, under which no memfd can be carried writable.
    """
    try:
        fd = _memfd(name, MFD_CLOEXEC | (MFD_ALLOW_SEALING if sealing else 0))
    except OSError as error:
        hint = (
            "set vm.memfd_noexec to 0 or 1"
            if error.errno == errno.EACCES
            else "see RLIMIT_NOFILE and free memory"
        )
        raise MemfdError(f"memfd_create {name!r}: {error.strerror}", hint=hint) from error
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise MemfdError(
            f"ftruncate of memfd {name!r} to {size} bytes: {error.strerror}", hint="check the size"
        ) from error
    return fd


def create_anonymous() -> int:
    """Make the empty, nameless, sealable memfd that the kernel rebuilds a preserved one from."""
    return _memfd("", MFD_CLOEXEC | MFD_ALLOW_SEALING)


def seal_for_preservation(fd: int) -> None:
    """Freeze the size for good: GROW, SHRINK and SEAL, which is what a device that maps the memfd asks for.

    Without effect when the seals are there already.
    """
    try:
        have = fcntl.fcntl(fd, F_GET_SEALS)
        if have & PRESERVATION_SEALS != PRESERVATION_SEALS:
            fcntl.fcntl(fd, F_ADD_SEALS, PRESERVATION_SEALS)
    except OSError as error:
        hint = (
            "create it with MFD_ALLOW_SEALING"
            if error.errno == errno.EPERM
            else "only memfds and tmpfs files have seals"
        )
        raise MemfdError(f"sealing fd {fd}: {error.strerror}", hint=hint) from error


def inspect(fd: int) -> MemfdFacts:
    """Look at a memfd, and name what a live update would do to it. MemfdError when it is none."""
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
        facts = os.fstat(fd)
        mode = fcntl.fcntl(fd, fcntl.F_GETFL)
        offset = os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        raise MemfdError(
            f"fd {fd} is no memfd: {error.strerror}", hint="pass a memfd or an unlinked tmpfs file"
        ) from error
    allocated = facts.st_blocks * _BLOCK
    return MemfdFacts(
        size=facts.st_size,
        allocated=allocated,
        offset=offset,
        seals=seals,
        writable=mode & os.O_ACCMODE == os.O_RDWR and not seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE),
        sealed_for_preservation=seals & PRESERVATION_SEALS == PRESERVATION_SEALS,
        problems=tuple(_problems(facts, seals, allocated)),
    )


def _problems(facts: os.stat_result, seals: int, allocated: int) -> list[str]:
    problems: list[str] = []
    if facts.st_nlink:
        problems.append("it still has a name in a file system, so PRESERVE_FD gives ENOENT: unlink it first")
    if seals & ~KNOWN_SEALS:
        problems.append(f"seals {seals & ~KNOWN_SEALS:#x} are unknown, so PRESERVE_FD gives EOPNOTSUPP")
    if seals & F_SEAL_EXEC and not seals & F_SEAL_WRITE:
        problems.append(
            "F_SEAL_EXEC: it comes back write-sealed; create it with MFD_EXEC (vm.memfd_noexec adds that seal)"
        )
    if allocated < facts.st_size:
        problems.append(f"sparse: PRESERVE_FD allocates the missing {facts.st_size - allocated} bytes")
    return problems
