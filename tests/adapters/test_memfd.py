# SPDX-License-Identifier: Apache-2.0
"""memfds for a live update, and the traps of others."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from luod.adapters import memfd


@pytest.fixture
def owned() -> Iterator[list[int]]:
    fds: list[int] = []
    yield fds
    for fd in fds:
        os.close(fd)


def test_create(owned: list[int]) -> None:
    owned.append(fd := memfd.create("ram", 8192))
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:ram (deleted)"
    facts = memfd.inspect(fd)
    assert (facts.size, facts.allocated, facts.offset, facts.seals, facts.writable) == (8192, 0, 0, 0, True)
    assert facts.problems == ("sparse: PRESERVE_FD allocates the missing 8192 bytes",)
    os.posix_fallocate(fd, 0, 8192)
    assert memfd.inspect(fd).problems == ()


def test_create_asks_for_an_executable_one(monkeypatch: pytest.MonkeyPatch, owned: list[int]) -> None:
    """Or vm.memfd_noexec=1 would add the seal that a live update turns into a write seal."""
    flags: list[int] = []
    real = os.memfd_create

    def old_kernel(name: str, value: int) -> int:
        flags.append(value)
        if value & memfd.MFD_EXEC:
            raise OSError(errno.EINVAL, "unknown flag")
        return real(name, value)

    monkeypatch.setattr(memfd.os, "memfd_create", old_kernel)
    owned.append(memfd.create("ram", 1))
    assert [bool(value & memfd.MFD_EXEC) for value in flags] == [True, False]


def test_create_where_it_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str, value: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(memfd.os, "memfd_create", forbidden)
    with pytest.raises(memfd.MemfdError, match="memfd_noexec"):
        memfd.create("ram", 1)


def test_create_of_an_impossible_size() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(memfd.MemfdError, match="-1 bytes"):
        memfd.create("ram", -1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_seal_for_preservation(owned: list[int]) -> None:
    owned.append(fd := memfd.create("ram", 4096))
    memfd.seal_for_preservation(fd)
    memfd.seal_for_preservation(fd)
    facts = memfd.inspect(fd)
    assert facts.sealed_for_preservation
    assert facts.writable
    assert facts.seal_names == ("SEAL", "SHRINK", "GROW")
    assert os.pwrite(fd, b"x", 0) == 1
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


def test_what_cannot_be_sealed(owned: list[int]) -> None:
    owned.append(fd := memfd.create("ram", 1, sealing=False))
    with pytest.raises(memfd.MemfdError, match="MFD_ALLOW_SEALING"):
        memfd.seal_for_preservation(fd)
    with open("/dev/null", "rb") as null:
        with pytest.raises(memfd.MemfdError, match="have seals"):
            memfd.seal_for_preservation(null.fileno())
        with pytest.raises(memfd.MemfdError, match="no memfd"):
            memfd.inspect(null.fileno())


def test_problems(owned: list[int]) -> None:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | memfd.MFD_NOEXEC_SEAL
    owned.append(fd := os.memfd_create("noexec", flags))
    assert "write-sealed" in memfd.inspect(fd).problems[0]
    fcntl.fcntl(fd, memfd.F_ADD_SEALS, memfd.F_SEAL_WRITE)
    facts = memfd.inspect(fd)
    assert facts.problems == ()  # it is write-sealed before, too
    assert not facts.writable


def test_a_linked_tmpfs_file(owned: list[int]) -> None:
    path = Path("/dev/shm") / f"luod-memfd-{os.getpid()}"
    owned.append(fd := os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        assert "unlink it first" in memfd.inspect(fd).problems[0]
    finally:
        path.unlink()
    assert memfd.inspect(fd).problems == ()


def test_read_only(owned: list[int]) -> None:
    owned.append(fd := memfd.create("ram", 1))
    owned.append(readonly := os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    assert not memfd.inspect(readonly).writable
