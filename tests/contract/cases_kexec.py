# SPDX-License-Identifier: Apache-2.0
"""The contract across kexecs. A case is a set of functions `CASE_stageN(world)`; between two stages lies one kexec.

What a stage leaves for the next travels in sessions only. Session names begin with the name of the case.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import struct
from collections.abc import Callable

from contract_world import PAGE, World, errno_of, mapped, no_free_fd, read_all, refused

from luod.adapters import memfd
from luod.adapters.liveupdate import abi

Stage = Callable[[World], None]


def _carry(world: World, session: int, token: int, content: bytes, size: int = 0) -> None:
    """Preserve a memfd with that content, and close it: the session holds it."""
    fd = world.memfd(content, size)
    world.kernel.preserve_fd(session, token, fd)
    world.close(fd)


def _page(text: bytes) -> bytes:
    return text + bytes(PAGE - len(text))


# -- the kernel's own selftests ------------------------------------------------------------------------------------------------


def k20_simple_stage1(world: World) -> None:
    _carry(world, world.kept_session("k20-state"), 999, b"2")
    _carry(world, world.kept_session("k20-test"), 0x1A, b"hello kexec world", PAGE)


def k20_simple_stage2(world: World) -> None:
    state = world.incoming("k20-state")
    assert os.read(world.retrieved(state, 999), 8) == b"2"
    test = world.incoming("k20-test")
    assert mapped(world.retrieved(test, 0x1A)) == _page(b"hello kexec world")
    world.kernel.finish(test)
    world.kernel.finish(state)


_K21 = {"k21-one": {0x1001: b"only one"}, "k21-two": {0x2002: b"first of two", 0x3003: b"second of two"}}


def k21_multi_session_stage1(world: World) -> None:
    world.kept_session("k21-empty-a")
    world.kept_session("k21-empty-b")
    for name, files in _K21.items():
        session = world.kept_session(name)
        for token, content in files.items():
            _carry(world, session, token, content, PAGE)


def k21_multi_session_stage2(world: World) -> None:
    for name in ("k21-empty-a", "k21-empty-b"):
        world.kernel.finish(world.incoming(name))
    for name, files in _K21.items():
        session = world.incoming(name)
        for token, content in files.items():
            assert mapped(world.retrieved(session, token)) == _page(content)
        world.kernel.finish(session)


def k22_many_files_stage1(world: World) -> None:
    session = world.kept_session("k22")
    for token in range(500):
        _carry(world, session, token, b"content of file %d" % token, PAGE)


def k22_many_files_stage2(world: World) -> None:
    session = world.incoming("k22")
    for token in range(500):
        fd = world.retrieved(session, token)
        assert mapped(fd) == _page(b"content of file %d" % token), token
        world.close(fd)
    world.kernel.finish(session)


def k23_many_sessions_stage1(world: World) -> None:
    for number in range(2000):
        world.kept_session(f"k23-{number}")


def k23_many_sessions_stage2(world: World) -> None:
    for number in range(2000):
        session = world.incoming(f"k23-{number}")
        world.kernel.finish(session)
        world.close(session)


# -- incoming sessions ---------------------------------------------------------------------------------------------------------


def x04_finish_reserved_stage1(world: World) -> None:
    _carry(world, world.kept_session("x04"), 1, b"x")


def x04_finish_reserved_stage2(world: World) -> None:
    session = world.incoming("x04")
    with refused(errno.EINVAL):
        world.ioctl(session, abi.FINISH, abi.pack_finish(reserved=1))
    for size in (0, 4, 7):
        assert errno_of(world.ioctl, session, abi.FINISH, struct.pack("<II", size, 0)) == errno.EINVAL
    with refused(errno.E2BIG):
        world.ioctl(session, abi.FINISH, struct.pack("<III", 12, 0, 1))
    assert read_all(world.retrieved(session, 1)) == b"x"  # nothing of it has finished the session
    world.ioctl(session, abi.FINISH, struct.pack("<III", 12, 0, 0))
    with refused(errno.ENOENT):
        world.kernel.retrieve_fd(session, 1)


def x06_preserve_on_incoming_stage1(world: World) -> None:
    world.kept_session("x06")


def x06_preserve_on_incoming_stage2(world: World) -> None:
    session, fd = world.incoming("x06"), world.memfd(b"x")
    for buf in (abi.pack_fd(1, fd), abi.pack_fd(1, -1), bytes(16)):  # before size, token and fd
        assert errno_of(world.ioctl, session, abi.PRESERVE_FD, buf) == errno.EINVAL
    world.kernel.finish(session)
    assert errno_of(world.ioctl, session, abi.PRESERVE_FD, abi.pack_fd(1, fd)) == errno.EINVAL
    assert world.kernel.session_name(session) == "x06"


def x14_retrieve_session_once_stage1(world: World) -> None:
    world.kept_session("x14")
    world.kernel.scratch("x14-closed-before")


def x14_retrieve_session_once_stage2(world: World) -> None:
    assert errno_of(world.kernel.retrieve_session, "x14-closed-before") == errno.ENOENT
    session = world.incoming("x14")
    assert errno_of(world.kernel.retrieve_session, "x14") == errno.EINVAL
    copy = world.own(os.dup(session))
    world.close(session)
    assert errno_of(world.kernel.retrieve_session, "x14") == errno.EINVAL
    world.close(copy)
    assert errno_of(world.kernel.retrieve_session, "x14") == errno.ENOENT


def x15_retrieve_fd_again_stage1(world: World) -> None:
    session = world.kept_session("x15")
    _carry(world, session, 1, b"0123456789")
    _carry(world, session, (1 << 64) - 1, b"last")


def x15_retrieve_fd_again_stage2(world: World) -> None:
    session = world.incoming("x15")
    with refused(errno.ENOENT):
        world.kernel.retrieve_fd(session, 2)
    with refused(errno.EINVAL):
        world.ioctl(session, abi.RETRIEVE_FD, struct.pack("<IiQ", 15, -1, 1))
    assert read_all(world.retrieved(session, (1 << 64) - 1)) == b"last"  # in any order
    first = world.retrieved(session, 1)
    second = world.retrieved(session, 1)
    assert first != second
    os.lseek(first, 4, os.SEEK_SET)
    assert os.read(second, 2) == b"45"  # one open file behind both
    world.close(first)
    world.close(second)
    assert os.read(world.retrieved(session, 1), 2) == b"67"
    world.kernel.finish(session)


def x16_after_finish_stage1(world: World) -> None:
    session = world.kept_session("x16")
    _carry(world, session, 1, b"x")
    _carry(world, session, 2, b"never retrieved")


def x16_after_finish_stage2(world: World) -> None:
    session = world.incoming("x16")
    fd = world.retrieved(session, 1)
    world.kernel.finish(session)
    world.kernel.finish(session)
    for token in (1, 2):
        assert errno_of(world.kernel.retrieve_fd, session, token) == errno.ENOENT
    assert world.kernel.session_name(session) == "x16"
    assert errno_of(world.kernel.retrieve_session, "x16") == errno.EINVAL
    world.close(session)
    assert errno_of(world.kernel.retrieve_session, "x16") == errno.ENOENT
    assert read_all(fd) == b"x"  # what was retrieved lives on
    os.ftruncate(fd, PAGE)


def x17_close_without_finish_stage1(world: World) -> None:
    session = world.kept_session("x17")
    _carry(world, session, 1, b"kept by its fd")
    _carry(world, session, 2, b"gone")


def x17_close_without_finish_stage2(world: World) -> None:
    session = world.incoming("x17")
    fd = world.retrieved(session, 1)
    world.close(session)
    assert errno_of(world.kernel.retrieve_session, "x17") == errno.ENOENT
    assert read_all(fd) == b"kept by its fd"
    again = world.session("x17")
    world.kernel.preserve_fd(again, 1, fd)  # finished by the close, so it may be preserved anew


def x17_holder_is_killed_stage1(world: World) -> None:
    world.kept_session("x17-killed")


def x17_holder_is_killed_stage2(world: World) -> None:
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        world.kernel.retrieve_session("x17-killed")
        os.write(tell, b"x")
        while True:
            signal.pause()
    os.close(tell)
    try:
        assert os.read(told, 1) == b"x"
        assert errno_of(world.kernel.retrieve_session, "x17-killed") == errno.EINVAL
    finally:
        os.close(told)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert errno_of(world.kernel.retrieve_session, "x17-killed") == errno.ENOENT


def x18_same_name_both_ways_stage1(world: World) -> None:
    _carry(world, world.kept_session("x18"), 1, b"incoming")


def x18_same_name_both_ways_stage2(world: World) -> None:
    unretrieved = world.session("x18")  # while the incoming one of that name is listed
    incoming = world.incoming("x18")
    world.close(unretrieved)
    outgoing = world.session("x18")
    _carry(world, outgoing, 1, b"outgoing")
    assert read_all(world.retrieved(incoming, 1)) == b"incoming"
    world.kernel.finish(incoming)
    assert world.kernel.session_name(outgoing) == "x18"


def x19_preserve_what_was_retrieved_stage1(world: World) -> None:
    session = world.kept_session("x19")
    _carry(world, session, 1, b"second journey")


def x19_preserve_what_was_retrieved_stage2(world: World) -> None:
    incoming = world.incoming("x19")
    fd = world.retrieved(incoming, 1)
    outgoing = world.kept_session("x19")
    with refused(errno.EBUSY):
        world.kernel.preserve_fd(outgoing, 5, fd)
    world.kernel.finish(incoming)
    world.kernel.preserve_fd(outgoing, 5, fd)
    os.pwrite(fd, b"SECOND", 0)


def x19_preserve_what_was_retrieved_stage3(world: World) -> None:
    session = world.incoming("x19")
    assert read_all(world.retrieved(session, 5)) == b"SECOND journey"
    assert errno_of(world.kernel.retrieve_fd, session, 1) == errno.ENOENT
    world.kernel.finish(session)


def x20_unretrieved_is_lost_stage1(world: World) -> None:
    _carry(world, world.kept_session("x20-untouched"), 1, b"x")
    _carry(world, world.kept_session("x20-retrieved"), 1, b"x")


def x20_unretrieved_is_lost_stage2(world: World) -> None:
    world.keep(world.incoming("x20-retrieved"))


def x20_unretrieved_is_lost_stage3(world: World) -> None:
    for name in ("x20-untouched", "x20-retrieved"):
        assert errno_of(world.kernel.retrieve_session, name) == errno.ENOENT


# -- memfds --------------------------------------------------------------------------------------------------------------------


def x21_offset_size_seals_stage1(world: World) -> None:
    session = world.kept_session("x21")
    fd = world.keep(world.memfd(b"0123456789"))
    os.lseek(fd, 2, os.SEEK_SET)
    fcntl.fcntl(fd, memfd.F_ADD_SEALS, memfd.F_SEAL_GROW)
    world.kernel.preserve_fd(session, 1, fd)
    os.lseek(fd, 7, os.SEEK_SET)  # the offset is taken at the reboot,
    fcntl.fcntl(fd, memfd.F_ADD_SEALS, memfd.F_SEAL_SHRINK)  # the seals were taken at PRESERVE_FD
    os.pwrite(fd, b"A", 0)  # and the content is that of the jump
    sealed = world.memfd(b"all seals")
    fcntl.fcntl(sealed, memfd.F_ADD_SEALS, memfd.KNOWN_SEALS & ~memfd.F_SEAL_EXEC)
    world.kernel.preserve_fd(session, 2, sealed)
    unsealable = world.memfd(b"no sealing", sealing=False)
    world.kernel.preserve_fd(session, 3, unsealable)


def x21_offset_size_seals_stage2(world: World) -> None:
    session = world.incoming("x21")
    fd = world.retrieved(session, 1)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 7
    assert os.read(fd, 10) == b"789"
    assert read_all(fd) == b"A123456789"
    assert fcntl.fcntl(fd, memfd.F_GET_SEALS) == memfd.F_SEAL_GROW
    os.ftruncate(fd, 9)
    assert errno_of(os.ftruncate, fd, 10) == errno.EPERM
    sealed = world.retrieved(session, 2)
    assert fcntl.fcntl(sealed, memfd.F_GET_SEALS) == memfd.KNOWN_SEALS & ~memfd.F_SEAL_EXEC
    assert errno_of(os.pwrite, sealed, b"x", 0) == errno.EPERM
    assert read_all(sealed) == b"all seals"
    unsealable = world.retrieved(session, 3)
    assert fcntl.fcntl(unsealable, memfd.F_GET_SEALS) == memfd.F_SEAL_SEAL
    assert os.pwrite(unsealable, b"x", 0) == 1
    world.kernel.finish(session)


def x22_sparse_stage1(world: World) -> None:
    session = world.kept_session("x22")
    fd = world.memfd(size=300 * PAGE)
    os.pwrite(fd, b"middle", 150 * PAGE + 7)
    world.kernel.preserve_fd(session, 1, fd)
    _carry(world, session, 2, b"", 10 * PAGE)
    _carry(world, session, 3, b"")


def x22_sparse_stage2(world: World) -> None:
    session = world.incoming("x22")
    fd = world.retrieved(session, 1)
    content = mapped(fd)
    assert content[150 * PAGE + 7 :][:6] == b"middle"
    assert content.count(0) == 300 * PAGE - 6
    assert os.fstat(fd).st_blocks * 512 >= 300 * PAGE
    empty = world.retrieved(session, 2)
    assert mapped(empty) == bytes(10 * PAGE)
    assert os.fstat(empty).st_blocks * 512 >= 10 * PAGE
    assert os.fstat(world.retrieved(session, 3)).st_size == 0
    world.kernel.finish(session)


def _pattern(number: int, size: int) -> bytes:
    return b"".join(struct.pack("<IQ", number, place) for place in range(size // 12 + 1))[:size]


def x22_odd_sizes_stage1(world: World) -> None:
    session = world.kept_session("x22-odd")
    for number, size in enumerate((1, PAGE - 1, PAGE + 1, 3 * (1 << 20) + 5)):
        _carry(world, session, number, _pattern(number, size))


def x22_odd_sizes_stage2(world: World) -> None:
    session = world.incoming("x22-odd")
    for number, size in enumerate((1, PAGE - 1, PAGE + 1, 3 * (1 << 20) + 5)):
        assert read_all(world.retrieved(session, number)) == _pattern(number, size), size
    world.kernel.finish(session)


def x24_unlinked_tmpfs_stage1(world: World) -> None:
    session, path = world.kept_session("x24"), world.tmpfs() / f"luod-x24-{os.getpid()}"
    fd = world.own(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600))
    path.unlink()
    os.write(fd, b"unlinked")
    world.kernel.preserve_fd(session, 1, fd)


def x24_unlinked_tmpfs_stage2(world: World) -> None:
    session = world.incoming("x24")
    fd = world.retrieved(session, 1)
    assert read_all(fd) == b"unlinked"
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
    world.kernel.finish(session)


def x25_noexec_seal_stage1(world: World) -> None:
    fd = world.own(os.memfd_create("noexec", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | memfd.MFD_NOEXEC_SEAL))
    os.write(fd, b"writable")
    world.kernel.preserve_fd(world.kept_session("x25"), 1, fd)
    assert any("write-sealed" in problem for problem in memfd.inspect(fd).problems)


def x25_noexec_seal_stage2(world: World) -> None:
    session = world.incoming("x25")
    fd = world.retrieved(session, 1)
    assert read_all(fd) == b"writable"
    assert fcntl.fcntl(fd, memfd.F_GET_SEALS) & memfd.F_SEAL_WRITE
    assert errno_of(os.pwrite, fd, b"x", 0) == errno.EPERM
    world.kernel.finish(session)


def x26_flags_and_mode_stage1(world: World) -> None:
    session, fd = world.kept_session("x26"), world.memfd(b"x")
    os.fchmod(fd, 0o600)
    readonly = world.own(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    world.kernel.preserve_fd(session, 1, readonly)


def x26_flags_and_mode_stage2(world: World) -> None:
    session = world.incoming("x26")
    assert fcntl.fcntl(session, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    fd = world.retrieved(session, 1)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    facts = os.fstat(fd)
    assert stat.S_IMODE(facts.st_mode) == 0o777
    assert facts.st_uid == os.geteuid()
    assert "contract" not in os.readlink(f"/proc/self/fd/{fd}")  # its name is lost
    world.kernel.finish(session)


def x29_healed_block_stage1(world: World) -> None:
    _fill_block(world)
    assert errno_of(world.kernel.create_session, "x29-0") == errno.EEXIST
    world.kernel.scratch("x29-scratch")


def x29_healed_block_stage2(world: World) -> None:
    world.kernel.finish(world.incoming("x29-0"))


def _fill_block(world: World) -> None:
    """Make the number of sessions a multiple of 51, which is what fits in one block of the kernel's records."""
    number = 0
    while number == 0 or len(world.kept_sessions) % 51:
        world.kept_session(f"x29-{number}")
        number += 1


def x31_out_of_fds_stage1(world: World) -> None:
    _carry(world, world.kept_session("x31"), 1, b"still here")


def x31_out_of_fds_stage2(world: World) -> None:
    device = world.device()
    with no_free_fd():
        got = errno_of(world.ioctl, device, abi.RETRIEVE_SESSION, abi.pack_session(b"x31"))
    assert got == errno.EMFILE
    world.close(device)
    session = world.incoming("x31")
    with no_free_fd():
        got = errno_of(world.ioctl, session, abi.RETRIEVE_FD, abi.pack_fd(1))
    assert got == errno.EMFILE
    assert read_all(world.retrieved(session, 1)) == b"still here"
    world.kernel.finish(session)


def x36_names_and_struct_stage1(world: World) -> None:
    device = world.device()
    for raw in (b"x36 a/b\n", b"x36 \xff\xfe", b"x36".ljust(63, b"n")):
        fd = abi.unpack_fd(world.ioctl(device, abi.CREATE_SESSION, abi.pack_session(raw)))
        world.kept_sessions.append(world.keep(fd))


def x36_names_and_struct_stage2(world: World) -> None:
    device = world.device()
    assert errno_of(world.ioctl, device, abi.RETRIEVE_SESSION, abi.pack_session(b"x36")) == errno.ENOENT
    assert errno_of(world.ioctl, device, abi.RETRIEVE_SESSION, abi.pack_session(b"X36 A/B\n")) == errno.ENOENT
    with refused(errno.E2BIG):
        tail = struct.pack("<Ii64sI", 76, -1, b"x36 a/b\n", 1)
        world.ioctl(device, abi.RETRIEVE_SESSION, tail)
    for raw in (b"x36 a/b\n", b"x36 \xff\xfe", b"x36".ljust(63, b"n")):
        session = world.own(abi.unpack_fd(world.ioctl(device, abi.RETRIEVE_SESSION, abi.pack_session(raw))))
        assert abi.unpack_name(world.ioctl(session, abi.GET_NAME, abi.pack_name())) == raw


def x37_everything_but_memory_is_new_stage1(world: World) -> None:
    session = world.kept_session("x37")
    _carry(world, session, 1, world.kernel.boot_id().encode("ascii"))
    assert world.kernel.loaded() in {True, False}


def x37_everything_but_memory_is_new_stage2(world: World) -> None:
    session = world.incoming("x37")
    assert read_all(world.retrieved(session, 1)).decode("ascii") != world.kernel.boot_id()
    assert not world.kernel.loaded()
    world.kernel.finish(session)


# -- last, since it counts the sessions of all the others ----------------------------------------------------------------------


def panic_empty_block_stage1(world: World) -> None:
    """The kernel bug itself: the next kernel panics. Only run when it is named."""
    _fill_block(world)
    assert errno_of(world.kernel.create_session, "x29-0") == errno.EEXIST


def panic_empty_block_stage2(world: World) -> None:
    raise AssertionError("the kernel came up; it was to panic")


STAGES = 3
BY_NAME_ONLY = frozenset({"panic_empty_block"})
LAST = ("x29_healed_block", "panic_empty_block")


def cases() -> dict[str, dict[int, Stage]]:
    """Every case with its stages, in the order they run in."""
    found: dict[str, dict[int, Stage]] = {}
    for name, value in globals().items():
        case, separator, stage = name.rpartition("_stage")
        if separator and stage.isdigit():
            found.setdefault(case, {})[int(stage)] = value
    return {
        case: found[case] for case in sorted(found, key=lambda case: LAST.index(case) if case in LAST else -1)
    }
