# SPDX-License-Identifier: Apache-2.0
"""The contract within one boot: K01-K15 are what the kernel's own selftests assert, the X cases what its code says besides."""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import select
import socket
import struct

import pytest
from contract_world import PAGE, World, errno_of, mapped, no_free_fd, read_all, refused

from luod.adapters import memfd
from luod.adapters.emulator.control import Control
from luod.adapters.liveupdate import abi
from luod.adapters.liveupdate.errors import (
    BadDescriptor,
    BadName,
    DeviceBroken,
    NotPreservable,
    ObjectBusy,
    SessionExists,
    SessionUnknown,
    TokenExists,
    WrongDirection,
)


def test_k01_basic_open_close(world: World) -> None:
    fd = world.syscalls.open_device()
    assert fd >= 0
    os.close(fd)


def test_k02_exclusive_open(world: World) -> None:
    first = world.device()
    with refused(errno.EBUSY):
        world.syscalls.open_device()
    copy = world.own(os.dup(first))
    world.close(first)
    with refused(errno.EBUSY):  # the same open file: the copy holds it
        world.syscalls.open_device()
    world.close(copy)
    world.device()


def test_k03_create_duplicate_session(world: World) -> None:
    world.session("duplicate")
    with pytest.raises(SessionExists) as caught:
        world.session("duplicate")
    assert caught.value.errno == errno.EEXIST
    world.kernel.scratch("heal")


def test_k04_create_distinct_sessions(world: World) -> None:
    one, two = world.session("one"), world.session("two")
    assert one != two
    world.close(one)
    world.close(two)


def test_k05_preserve_memfd(world: World) -> None:
    session, fd = world.session("preserve"), world.memfd(b"data to keep")
    world.preserve_raw(session, 0x1234, fd)
    world.close(session)
    os.lseek(fd, 0, os.SEEK_SET)
    assert os.read(fd, 64) == b"data to keep"


def test_k06_preserve_multiple_memfds(world: World) -> None:
    session = world.session("several")
    first, second = world.memfd(b"first"), world.memfd(b"second")
    world.kernel.preserve_fd(session, 0xAAAA, first)
    world.kernel.preserve_fd(session, 0xBBBB, second)
    assert (read_all(first), read_all(second)) == (b"first", b"second")


def test_k07_preserve_complex_scenario(world: World) -> None:
    for name in ("left", "right"):
        session = world.session(name)
        data, empty = world.memfd(name.encode()), world.memfd()
        world.kernel.preserve_fd(session, 1, data)
        world.kernel.preserve_fd(session, 2, empty)
        assert read_all(data) == name.encode()
        assert os.read(empty, 1) == b""


def test_k08_preserve_unsupported_fd(world: World) -> None:
    session = world.session("unsupported")
    with open("/dev/null", "rb") as null, pytest.raises(NotPreservable) as caught:
        world.kernel.preserve_fd(session, 0xDEAD, null.fileno())
    assert caught.value.errno == errno.ENOENT


def test_k09_prevent_double_preservation(world: World) -> None:
    one, two, fd = world.session("one"), world.session("two"), world.memfd(b"x")
    world.kernel.preserve_fd(one, 1, fd)
    with pytest.raises(ObjectBusy):
        world.kernel.preserve_fd(two, 1, fd)
    with pytest.raises(ObjectBusy):
        world.kernel.preserve_fd(one, 2, fd)


def test_k10_create_session_no_null_termination(world: World) -> None:
    with refused(errno.EINVAL):
        world.ioctl(world.device(), abi.CREATE_SESSION, abi.pack_session(b"X" * 64))


def test_k11_create_session_empty_name(world: World) -> None:
    with refused(errno.EINVAL):
        world.ioctl(world.device(), abi.CREATE_SESSION, abi.pack_session(b""))


def test_k12_get_session_name(world: World) -> None:
    assert world.kernel.session_name(world.session("what's my name")) == "what's my name"


def test_k13_get_session_name_max_length(world: World) -> None:
    assert world.kernel.session_name(world.session("A" * 63)) == "A" * 63


def test_k14_preserve_many_sessions(world: World) -> None:
    device = world.device()
    fds = [
        world.own(
            abi.unpack_fd(world.ioctl(device, abi.CREATE_SESSION, abi.pack_session(b"many-%d" % number)))
        )
        for number in range(2000)
    ]
    assert len(set(fds)) == 2000
    assert abi.unpack_name(world.ioctl(fds[1999], abi.GET_NAME, abi.pack_name())) == b"many-1999"


def test_k15_preserve_many_files(world: World) -> None:
    session = world.session("many-files")
    for token in range(500):
        world.kernel.preserve_fd(session, token, world.memfd(b"file %d" % token))
    assert world.kernel.token_preserved(session, 499)


def test_x01_wrong_numbers(world: World) -> None:
    session, device = world.session("numbers"), world.device()
    for request in (abi.PRESERVE_FD, abi.GET_NAME, 0xBA02, 0xBAFF):
        assert errno_of(world.ioctl, device, request, bytes(72)) == errno.EINVAL, hex(request)
    for request in (abi.CREATE_SESSION, abi.RETRIEVE_SESSION, 0xBA3F, 0xBA44):
        assert errno_of(world.ioctl, session, request, bytes(72)) == errno.EINVAL, hex(request)
    for fd, request in ((device, 0xBB00), (device, 0x1BA01), (session, 0xBB40), (session, 0xBB43)):
        assert errno_of(world.ioctl, fd, request, bytes(72)) == errno.ENOTTY, hex(request)


def test_x02_size_too_small(world: World) -> None:
    session, device, fd = world.session("small"), world.device(), world.memfd(b"x")
    name = bytearray(abi.pack_session(b"never"))
    for size in (0, 4, 71):
        struct.pack_into("<I", name, 0, size)
        for request in (abi.CREATE_SESSION, abi.RETRIEVE_SESSION):
            assert errno_of(world.ioctl, device, request, name) == errno.EINVAL
    arg = bytearray(abi.pack_fd(1, fd))
    for size in (0, 8, 15):
        struct.pack_into("<I", arg, 0, size)
        assert errno_of(world.ioctl, session, abi.PRESERVE_FD, arg) == errno.EINVAL
    for size in (0, 8, 71):
        assert (
            errno_of(world.ioctl, session, abi.GET_NAME, struct.pack("<II64s", size, 0, b"")) == errno.EINVAL
        )
    assert not world.kernel.token_preserved(session, 1)


def test_x03_larger_struct(world: World) -> None:
    device, fd = world.device(), world.memfd(b"x")
    known = struct.Struct("<Ii64s")
    for size in (80, 4096):
        tail = bytes(size - 72)
        made = world.ioctl(device, abi.CREATE_SESSION, known.pack(size, -1, b"larger") + tail)
        session = world.own(abi.unpack_fd(made))
        assert struct.unpack_from("<I", made)[0] == size
        assert made[8:] == known.pack(size, -1, b"larger")[8:] + tail
        world.close(session)
        with refused(errno.E2BIG):
            world.ioctl(device, abi.CREATE_SESSION, known.pack(size, -1, b"larger") + tail[:-1] + b"\1")
    session = world.own(abi.unpack_fd(world.ioctl(device, abi.CREATE_SESSION, abi.pack_session(b"larger"))))
    with refused(errno.E2BIG):
        world.ioctl(session, abi.PRESERVE_FD, struct.pack("<IiQQ", 24, fd, 5, 1 << 63))
    world.ioctl(session, abi.PRESERVE_FD, struct.pack("<IiQQ", 24, fd, 5, 0))
    assert world.kernel.token_preserved(session, 5)


def test_x04_get_name_reserved(world: World) -> None:
    session = world.session("reserved")
    with refused(errno.EINVAL):
        world.ioctl(session, abi.GET_NAME, abi.pack_name(reserved=1))


def test_x05_retrieve_and_finish_on_outgoing(world: World) -> None:
    session = world.session("outgoing")
    world.kernel.preserve_fd(session, 1, world.memfd(b"x"))
    with pytest.raises(WrongDirection):
        world.kernel.retrieve_fd(session, 1)
    with pytest.raises(WrongDirection):
        world.kernel.finish(session)
    for request in (abi.RETRIEVE_FD, abi.FINISH):  # the direction is looked at before the size
        assert errno_of(world.ioctl, session, request, bytes(16)) == errno.EINVAL
    assert world.kernel.token_preserved(session, 1)


def test_x07_duplicate_token(world: World) -> None:
    session = world.session("tokens")
    world.kernel.preserve_fd(session, 7, world.memfd(b"x"))
    with pytest.raises(TokenExists):
        world.kernel.preserve_fd(session, 7, world.memfd(b"y"))
    with refused(errno.EEXIST):  # the token is looked at before the fd
        world.preserve_raw(session, 7, -1)
    with open("/dev/null", "rb") as null, refused(errno.EEXIST):
        world.preserve_raw(session, 7, null.fileno())


def test_x07_tokens_belong_to_their_session(world: World) -> None:
    for name in ("one", "two"):
        session = world.session(name)
        for token in (0, 1 << 63, (1 << 64) - 1):
            world.kernel.preserve_fd(session, token, world.memfd(b"x"))
            assert world.kernel.token_preserved(session, token)


def test_x08_closed_and_path_fds(world: World) -> None:
    session, fd = world.session("closed"), world.memfd(b"x")
    path = world.own(os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC))
    with pytest.raises(BadDescriptor):
        world.kernel.preserve_fd(session, 1, path)
    null = world.own(os.open("/dev/null", os.O_PATH | os.O_CLOEXEC))
    with refused(errno.EBADF):  # not open comes before not preservable
        world.preserve_raw(session, 1, null)
    world.close(fd)
    with pytest.raises(BadDescriptor):
        world.kernel.preserve_fd(session, 1, fd)
    for number in (-1, -100, 1 << 30):
        with refused(errno.EBADF):
            world.preserve_raw(session, 1, number)
    assert not world.kernel.token_preserved(session, 1)


def test_x08_a_failure_leaves_nothing(world: World) -> None:
    session, fd = world.session("nothing"), world.memfd(b"x")
    with open("/dev/null", "rb") as null:
        assert errno_of(world.preserve_raw, session, 1, null.fileno()) == errno.ENOENT
    assert errno_of(world.preserve_raw, session, 1, -1) == errno.EBADF
    world.kernel.preserve_fd(session, 1, fd)
    assert errno_of(world.preserve_raw, session, 2, fd) == errno.EBUSY
    world.kernel.preserve_fd(session, 2, world.memfd(b"y"))


def test_x09_same_memfd_by_second_open(world: World) -> None:
    session, fd = world.session("twice"), world.memfd(b"x")
    world.kernel.preserve_fd(session, 1, fd)
    for flags in (os.O_RDWR, os.O_RDONLY):
        again = world.own(os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC))
        with pytest.raises(ObjectBusy):
            world.kernel.preserve_fd(session, 2, again)


def test_x10_close_frees_name_and_object(world: World) -> None:
    fd = world.memfd(b"x")
    for _ in range(3):
        session = world.session("again")
        world.kernel.preserve_fd(session, 1, fd)
        world.close(session)


def test_x10_closing_the_device_changes_nothing(world: World) -> None:
    device = world.device()
    session = world.own(abi.unpack_fd(world.ioctl(device, abi.CREATE_SESSION, abi.pack_session(b"stays"))))
    world.close(device)
    world.kernel.preserve_fd(session, 1, world.memfd(b"x"))
    assert world.kernel.session_name(session) == "stays"
    assert errno_of(world.kernel.create_session, "stays") == errno.EEXIST
    world.kernel.scratch("heal")


def test_x11_preserved_after_its_owner_closed_it(world: World) -> None:
    session, fd = world.session("owner"), world.memfd(b"x")
    world.kernel.preserve_fd(session, 1, fd)
    world.close(fd)
    assert world.kernel.token_preserved(session, 1)


def _pass_on(fd: int) -> socket.socket:
    """Put the fd in flight, and return the end of the pair it waits at."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left:
        left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    return right


def test_x12_passed_fd_keeps_the_session(world: World) -> None:
    session = world.session("passed")
    with _pass_on(session) as right:
        world.close(session)
        assert errno_of(world.kernel.create_session, "passed") == errno.EEXIST  # it lives on in flight
        world.kernel.scratch("heal")
        _, ancillary, _, _ = right.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        (received,) = array.array("i", ancillary[0][2])
        world.own(received)
    assert world.kernel.session_name(received) == "passed"
    world.kernel.preserve_fd(received, 1, world.memfd(b"x"))
    world.close(received)
    world.session("passed")


def test_x12_dropped_in_flight(world: World) -> None:
    session = world.session("in-flight")
    right = _pass_on(session)
    world.close(session)
    right.close()
    world.session("in-flight")


def test_x12_copies_and_children(world: World) -> None:
    session = world.session("copies")
    copy = world.own(os.dup(session))
    world.close(session)
    go, went = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(went)
        os.read(go, 1)  # until the parent has let go of its copy
        os._exit(0 if world.kernel.session_name(copy) == "copies" else 1)
    os.close(go)
    world.close(copy)
    os.close(went)
    assert os.waitpid(child, 0)[1] == 0
    world.session("copies")


def test_x13_writes_inside(world: World) -> None:
    session, fd = world.session("writes"), world.memfd(b"before", PAGE)
    world.kernel.preserve_fd(session, 1, fd)
    assert os.pwrite(fd, b"after!", 0) == 6
    with mmap.mmap(fd, PAGE) as view:
        view[100:103] = b"abc"
    os.ftruncate(fd, PAGE)
    assert read_all(fd)[:6] == b"after!"
    world.close(session)
    os.ftruncate(fd, 2 * PAGE)
    os.posix_fallocate(fd, 0, 3 * PAGE)
    assert os.pwrite(fd, b"end", 4 * PAGE) == 3


def test_x13_size_is_frozen(world: World) -> None:
    session, fd = world.session("frozen"), world.memfd(b"x", PAGE)
    world.kernel.preserve_fd(session, 1, fd)
    for size in (0, PAGE - 1, PAGE + 1):
        assert errno_of(os.ftruncate, fd, size) == errno.EPERM
    assert errno_of(os.posix_fallocate, fd, 0, PAGE) == errno.EPERM
    assert errno_of(os.pwrite, fd, b"xx", PAGE) == errno.EPERM


def test_x13_write_seal_is_busy(world: World) -> None:
    session, fd = world.session("sealing"), world.memfd(b"x", PAGE)
    world.kernel.preserve_fd(session, 1, fd)
    assert errno_of(fcntl.fcntl, fd, memfd.F_ADD_SEALS, memfd.F_SEAL_WRITE) == errno.EBUSY


def test_x14_retrieve_unknown(world: World) -> None:
    world.session("outgoing")
    for name in ("never-made", "outgoing"):
        with pytest.raises(SessionUnknown):
            world.kernel.retrieve_session(name)
    device = world.device()
    for raw in (b"", b"X" * 64):
        assert errno_of(world.ioctl, device, abi.RETRIEVE_SESSION, abi.pack_session(raw)) == errno.ENOENT


def test_x14_names_the_kernel_would_cut(world: World) -> None:
    for name in ("", "a\0b", "n" * 64):
        with pytest.raises(BadName):
            world.kernel.create_session(name)
        with pytest.raises(BadName):
            world.kernel.retrieve_session(name)


def test_x22_preserve_fills_holes(world: World) -> None:
    session, fd = world.session("holes"), world.memfd(size=64 * PAGE)
    os.pwrite(fd, b"x", 32 * PAGE)
    assert os.fstat(fd).st_blocks * 512 < 64 * PAGE
    world.kernel.preserve_fd(session, 1, fd)
    assert os.fstat(fd).st_blocks * 512 >= 64 * PAGE
    assert mapped(fd) == bytes(32 * PAGE) + b"x" + bytes(32 * PAGE - 1)


def test_x23_hugetlb_memfd(world: World) -> None:
    fd = world.own(os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB))
    session = world.session("huge")
    with pytest.raises(NotPreservable):
        world.kernel.preserve_fd(session, 1, fd)


def test_x24_tmpfs_files(world: World) -> None:
    session, path = world.session("tmpfs"), world.tmpfs() / f"luod-contract-{os.getpid()}"
    fd = world.own(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        os.write(fd, b"tmpfs")
        with pytest.raises(NotPreservable):
            world.kernel.preserve_fd(session, 1, fd)
    finally:
        path.unlink()
    world.kernel.preserve_fd(session, 1, fd)
    assert world.kernel.token_preserved(session, 1)


def test_x26_session_fd_is_cloexec(world: World) -> None:
    assert fcntl.fcntl(world.session("cloexec"), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert fcntl.fcntl(world.device(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_x27_link_text(world: World) -> None:
    session = world.session("link text")
    assert os.readlink(f"/proc/self/fd/{session}") == "anon_inode:[luo_session] link text"


def test_x28_eio_is_for_ever(world: World) -> None:
    assert world.directory is not None
    with Control(world.directory) as control:
        control.cold_reboot()  # the first open of a boot is the one that deserializes
        control.inject("deserialize", errno=errno.ENOMEM)
    try:
        for _ in range(3):
            with pytest.raises(DeviceBroken) as caught:
                world.kernel.create_session("never")
            assert caught.value.errno == errno.EIO
        assert world.kernel.status().state == "broken"
    finally:
        with Control(world.directory) as control:
            control.cold_reboot()
    assert world.kernel.status().state == "ok"


def test_x30_get_name_keeps_the_callers_tail(world: World) -> None:
    session = world.session("short")
    got = world.ioctl(session, abi.GET_NAME, struct.pack("<II64s", 72, 0, b"#" * 64))
    assert got[8:] == b"short\0\0\0" + b"#" * 56  # in words of 8 bytes
    session = world.session("8 bytes!")
    got = world.ioctl(session, abi.GET_NAME, struct.pack("<II64s", 72, 0, b"#" * 64))
    assert got[8:] == b"8 bytes!" + bytes(8) + b"#" * 48
    session = world.session("n" * 63)
    got = world.ioctl(session, abi.GET_NAME, struct.pack("<II64s", 72, 0, b"#" * 64))
    assert got[8:] == b"n" * 63 + b"\0"


def test_x30_any_byte_but_nul(world: World) -> None:
    device = world.device()
    for raw in (b"a/b", b"line\nbreak", b"\xff\xfe", b"vm 1", b"."):
        session = world.own(abi.unpack_fd(world.ioctl(device, abi.CREATE_SESSION, abi.pack_session(raw))))
        assert abi.unpack_name(world.ioctl(session, abi.GET_NAME, abi.pack_name())) == raw
    made = world.ioctl(device, abi.CREATE_SESSION, abi.pack_session(b"cut\0what follows"))
    session = world.own(abi.unpack_fd(made))
    assert abi.unpack_name(world.ioctl(session, abi.GET_NAME, abi.pack_name())) == b"cut"
    assert errno_of(world.ioctl, device, abi.CREATE_SESSION, abi.pack_session(b"cut")) == errno.EEXIST
    world.close(device)
    world.kernel.scratch("heal")


def test_x30_errors_leave_the_struct_alone(world: World) -> None:
    device = world.device()
    buf = bytearray(struct.pack("<Ii64s", 72, 12345, b""))
    before = bytes(buf)
    with refused(errno.EINVAL):
        world.syscalls.ioctl(device, abi.CREATE_SESSION, buf)
    assert bytes(buf) == before


def test_x31_out_of_fds(world: World) -> None:
    device = world.device()
    with no_free_fd():
        got = errno_of(world.ioctl, device, abi.CREATE_SESSION, abi.pack_session(b"no-fd"))
    assert got == errno.EMFILE
    world.own(abi.unpack_fd(world.ioctl(device, abi.CREATE_SESSION, abi.pack_session(b"no-fd"))))


def test_x32_fd_is_no_file(world: World) -> None:
    session = world.session("no-file")
    poller = select.epoll()
    try:
        assert errno_of(poller.register, session, select.EPOLLIN) == errno.EPERM
    finally:
        poller.close()
    assert errno_of(os.read, session, 1) == errno.EINVAL
    assert errno_of(os.write, session, b"x") == errno.EINVAL
    assert errno_of(mmap.mmap, session, PAGE) == errno.ENODEV


def test_x33_what_is_never_preservable(world: World) -> None:
    session, other = world.session("never"), world.session("other")
    device = world.device()
    left, right = socket.socketpair()
    read_end, write_end = os.pipe()
    with left, right, open(__file__, "rb") as regular:
        fds = [session, other, device, left.fileno(), read_end, write_end, regular.fileno()]
        got = {fd: errno_of(world.preserve_raw, session, 1, fd) for fd in fds}
    os.close(read_end)
    os.close(write_end)
    assert set(got.values()) == {errno.ENOENT}, got
    world.close(other)
    world.close(device)
    world.session("other")  # no reference was left behind


def test_x33_what_is_always_preservable(world: World) -> None:
    session, rw = world.session("always"), world.memfd(b"x")
    readonly = world.own(os.open(f"/proc/self/fd/{rw}", os.O_RDONLY | os.O_CLOEXEC))
    world.kernel.preserve_fd(session, 1, readonly)
    sealed = world.memfd(b"sealed", PAGE)
    fcntl.fcntl(sealed, memfd.F_ADD_SEALS, memfd.KNOWN_SEALS & ~memfd.F_SEAL_EXEC)
    world.kernel.preserve_fd(session, 2, sealed)
    world.kernel.preserve_fd(session, 3, world.memfd())
    shared = world.memfd(b"mapped", PAGE)
    with mmap.mmap(shared, PAGE) as view:
        world.kernel.preserve_fd(session, 4, shared)
        view[0:6] = b"MAPPED"
    assert read_all(shared)[:6] == b"MAPPED"


def test_x34_probe_has_no_effect(world: World) -> None:
    session = world.session("probe")
    for _ in range(3):
        assert not world.kernel.token_preserved(session, 9)
    world.kernel.preserve_fd(session, 9, world.memfd(b"x"))
    for _ in range(3):
        assert world.kernel.token_preserved(session, 9)


def test_x35_ioctl_on_other_files(world: World) -> None:
    with open("/dev/null", "rb") as null:
        assert errno_of(world.ioctl, null.fileno(), abi.GET_NAME, abi.pack_name()) == errno.ENOTTY
    assert errno_of(world.ioctl, 1 << 20, abi.GET_NAME, abi.pack_name()) == errno.EBADF
