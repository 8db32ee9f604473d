# SPDX-License-Identifier: Apache-2.0
"""What the kernel does, stated as cases on raw ioctls: `before` a kexec, and `after` it in the next kernel.

Run in a lab guest: `facts.py before` holds its sessions and says when it is ready; `facts.py after` looks at what came over.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import sys
from pathlib import Path

import raw
from raw import PAGE, create, fails, finish, memfd, preserve, retrieve, retrieve_fd

from luod.adapters.liveupdate import abi
from luod.lab.report import ready

F_GET_SEALS, F_SEAL_WRITE, F_SEAL_EXEC = 1034, 0x8, 0x20
MFD_NOEXEC_SEAL = 0x8


def session_link(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


# -- before the kexec ----------------------------------------------------------------------------------------------------------


def second_open_is_busy() -> None:
    fd = raw.device()
    with fails(errno.EBUSY):
        raw.device()
    os.close(fd)
    os.close(raw.device())


def preserve_works_after_the_device_is_closed() -> None:
    session, fd = create("f-closed-device"), memfd(b"x")
    preserve(session, 1, fd)
    os.close(session)
    os.close(fd)


def probe_with_fd_minus_one_tells_used_from_free() -> None:
    session, fd = create("f-probe"), memfd(b"x")
    preserve(session, 7, fd)
    for _ in range(2):
        with fails(errno.EEXIST):
            preserve(session, 7, -1)
        with fails(errno.EBADF):
            preserve(session, 8, -1)
    other = memfd(b"y")
    preserve(session, 8, other)
    for each in (session, fd, other):
        os.close(each)


def retrieve_and_finish_on_outgoing_are_invalid() -> None:
    session = create("f-direction")
    with fails(errno.EINVAL):
        retrieve_fd(session, 1)
    with fails(errno.EINVAL):
        finish(session)
    os.close(session)


def preserved_memfd_cannot_be_resized() -> None:
    session, fd = create("f-size"), memfd(b"x", PAGE)
    preserve(session, 1, fd)
    for size in (0, 2 * PAGE):
        with fails(errno.EPERM):
            os.ftruncate(fd, size)
    os.ftruncate(fd, PAGE)
    os.pwrite(fd, b"inside", 100)
    with fails(errno.EPERM):
        os.posix_fallocate(fd, 0, PAGE)
    os.close(session)
    os.ftruncate(fd, 2 * PAGE)
    os.close(fd)


def second_preserve_is_busy() -> None:
    one, two, fd = create("f-busy-1"), create("f-busy-2"), memfd(b"x")
    preserve(one, 1, fd)
    for session in (one, two):
        with fails(errno.EBUSY):
            preserve(session, 2, fd)
    os.close(one)
    preserve(two, 2, fd)
    os.close(two)
    os.close(fd)


def preserving_fills_holes() -> None:
    session, fd = create("f-holes"), memfd(b"x", 64 * PAGE)
    assert os.fstat(fd).st_blocks * 512 < 64 * PAGE
    preserve(session, 1, fd)
    assert os.fstat(fd).st_blocks * 512 == 64 * PAGE
    os.close(session)
    os.close(fd)


def duplicate_name_exists() -> None:
    session = create("f-name")
    with fails(errno.EEXIST):
        create("f-name")
    os.close(session)
    os.close(create("f-name"))


def session_fds_say_their_name_and_cannot_be_polled() -> None:
    session = create("f-link")
    assert session_link(session) == "anon_inode:[luo_session] f-link", session_link(session)
    with select.epoll() as epoll, fails(errno.EPERM):
        epoll.register(session)
    os.close(session)


def name_comes_back_with_its_last_word_zeroed_and_the_rest_as_passed() -> None:
    """The kernel copies names by 8-byte words: after the NUL there are zeros up to the word's end, then the caller's own bytes."""
    for name in ("short", "1234567", "12345678", "x" * 63):
        session = create(name)
        buf = bytearray(abi.S_NAME.pack(abi.S_NAME.size, 0, b"#" * 64))
        fcntl.ioctl(session, abi.GET_NAME, buf, True)
        told = bytes(buf[8:])
        word_end = (len(name) // 8 + 1) * 8
        expected = name.encode().ljust(word_end, b"\0").ljust(64, b"#")
        os.close(session)
        assert told == expected, (told, expected)


def reboot_without_an_image_is_refused_and_harmless() -> None:
    session, fd = create("f-refused"), memfd(b"x")
    preserve(session, 1, fd)
    libc = ctypes.CDLL(None, use_errno=True)
    for _ in range(2):
        result = libc.syscall(169, ctypes.c_uint(0xFEE1DEAD), 0x28121969, 0x45584543, 0)
        assert (result, ctypes.get_errno()) == (-1, errno.EINVAL), (result, ctypes.get_errno())
    with fails(errno.EEXIST):
        preserve(session, 1, -1)
    other = memfd(b"y")
    preserve(session, 2, other)
    os.close(create("f-refused-2"))
    for each in (session, fd, other):
        os.close(each)


BEFORE = [
    second_open_is_busy,
    preserve_works_after_the_device_is_closed,
    probe_with_fd_minus_one_tells_used_from_free,
    retrieve_and_finish_on_outgoing_are_invalid,
    preserved_memfd_cannot_be_resized,
    second_preserve_is_busy,
    preserving_fills_holes,
    duplicate_name_exists,
    session_fds_say_their_name_and_cannot_be_polled,
    name_comes_back_with_its_last_word_zeroed_and_the_rest_as_passed,
    reboot_without_an_image_is_refused_and_harmless,
]


def hand_over() -> None:
    """Make the sessions that the cases after the kexec look at, and keep them open in this process."""
    session = create("late-write")
    fd = memfd(b"early", 2 * PAGE)
    preserve(session, 1, fd)
    os.pwrite(fd, b"late", PAGE)
    os.lseek(fd, 123, os.SEEK_SET)
    for name, token in (
        ("dropped", 1),
        ("once", 1),
        ("twice", 0x2A),
        ("done", 3),
        ("reused", 1),
        ("carry", 5),
    ):
        session = create(name)
        preserve(session, token, memfd(name.encode()))
    session = create("noexec")
    preserve(session, 1, memfd(b"sealed", PAGE, flags=os.MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL))
    create("empty")


# -- after the kexec -----------------------------------------------------------------------------------------------------------


def writes_after_preserve_and_the_offset_come_over() -> None:
    session = retrieve("late-write")
    fd = retrieve_fd(session, 1)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 123
    assert os.fstat(fd).st_size == 2 * PAGE
    assert (os.pread(fd, 5, 0), os.pread(fd, 4, PAGE)) == (b"early", b"late")
    finish(session)
    os.close(session)
    os.ftruncate(fd, PAGE)


def closing_without_finish_destroys() -> None:
    os.close(retrieve("dropped"))
    with fails(errno.ENOENT):
        retrieve("dropped")


def second_retrieve_session_is_invalid() -> None:
    session = retrieve("once")
    with fails(errno.EINVAL):
        retrieve("once")
    finish(session)
    with fails(errno.EINVAL):
        retrieve("once")
    os.close(session)
    with fails(errno.ENOENT):
        retrieve("once")


def second_retrieve_fd_is_the_same_open_file() -> None:
    session = retrieve("twice")
    one = retrieve_fd(session, 0x2A)
    two = retrieve_fd(session, 0x2A)
    assert one != two
    os.lseek(one, 3, os.SEEK_SET)
    assert os.lseek(two, 0, os.SEEK_CUR) == 3
    for fd in (one, two):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.readlink(f"/proc/self/fd/{one}") == "/ (deleted)", os.readlink(f"/proc/self/fd/{one}")
    finish(session)
    os.close(session)


def finish_twice_is_fine_and_then_no_token_is_left() -> None:
    session = retrieve("done")
    fd = retrieve_fd(session, 3)
    finish(session)
    finish(session)
    with fails(errno.ENOENT):
        retrieve_fd(session, 3)
    assert os.pread(fd, 4, 0) == b"done"
    os.close(session)


def outgoing_may_take_an_incoming_name() -> None:
    incoming = retrieve("reused")
    outgoing = create("reused")
    os.close(outgoing)
    finish(incoming)
    os.close(incoming)


def retrieved_memfd_is_busy_until_finish() -> None:
    incoming = retrieve("carry")
    fd = retrieve_fd(incoming, 5)
    outgoing = create("carry")
    with fails(errno.EBUSY):
        preserve(outgoing, 5, fd)
    finish(incoming)
    preserve(outgoing, 5, fd)
    os.close(incoming)
    os.close(outgoing)


def noexec_seal_comes_back_write_sealed() -> None:
    session = retrieve("noexec")
    fd = retrieve_fd(session, 1)
    seals = fcntl.fcntl(fd, F_GET_SEALS)
    assert seals & F_SEAL_EXEC, seals
    assert seals & F_SEAL_WRITE, seals
    with fails(errno.EPERM):
        os.pwrite(fd, b"x", 0)
    assert os.pread(fd, 6, 0) == b"sealed"
    finish(session)
    os.close(session)


def empty_sessions_come_over() -> None:
    session = retrieve("empty")
    with fails(errno.ENOENT):
        retrieve_fd(session, 1)
    with fails(errno.EINVAL):
        preserve(session, 1, -1)
    finish(session)
    os.close(session)


def unknown_sessions_do_not_exist() -> None:
    for name in ("never", "f-name", ""):
        with fails(errno.ENOENT):
            retrieve(name)


AFTER = [
    writes_after_preserve_and_the_offset_come_over,
    closing_without_finish_destroys,
    second_retrieve_session_is_invalid,
    second_retrieve_fd_is_the_same_open_file,
    finish_twice_is_fine_and_then_no_token_is_left,
    outgoing_may_take_an_incoming_name,
    retrieved_memfd_is_busy_until_finish,
    noexec_seal_comes_back_write_sealed,
    empty_sessions_come_over,
    unknown_sessions_do_not_exist,
]


def main() -> int:
    if sys.argv[1] == "before":
        good = raw.run_cases(BEFORE)
        hand_over()
        ready()
        signal.pause()
        return 0
    assert Path("/sys/kernel/debug/kho/in").is_dir()
    good = raw.run_cases(AFTER)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
