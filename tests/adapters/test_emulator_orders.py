# SPDX-License-Identifier: Apache-2.0
"""What the harness can order of the emulator and see in it: held calls, errnos, the audit, other kinds of files."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated_world import Child, in_thread, load, void

from luod.adapters import memfd
from luod.adapters.emulator.control import Control
from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate import abi
from luod.adapters.liveupdate.device import LiveUpdate
from luod.adapters.liveupdate.errors import (
    DeviceBroken,
    DeviceBusy,
    FinishBusy,
    KernelError,
    RetrieveFailed,
    SessionGone,
)

# -- orders --------------------------------------------------------------------------------------------------------------------


def test_calls_block_between_freeze_and_jump(
    emulator: Emulator, control: Control, kernel: LiveUpdate
) -> None:
    session = kernel.create_session("vm")
    load(emulator)
    fault = control.inject("jump")

    def body(tell: Callable[[bytes], None]) -> None:
        os.close(kernel.syscalls.open_device())  # the device opens and closes all the same
        tell(b"called")
        kernel.session_name(session)
        tell(b"answered")

    with emulator.control(timeout=30) as rebooter:
        thread, result = in_thread(rebooter.kexec)
        control.wait_hit(fault)
        assert control.state()["frozen"]
        arrival = control.inject("call", op="GET_NAME")
        child = Child(body)
        assert child.heard() == b"called"
        control.wait_hit(arrival)
        control.release(arrival)
        assert control.state()["blocked"] == 1
        assert child.is_silent()
        blocked, answers = in_thread(lambda: kernel.session_name(session))
        with pytest.raises(OSError) as refused:  # noqa: PT011 (what needs no lock is still refused)
            kernel.syscalls.ioctl(session, abi.RETRIEVE_FD, abi.pack_fd(1))
        assert refused.value.errno == errno.EINVAL
        control.release(fault)
        thread.join(30)
        assert result == [control.boot_id()]
    assert child.ended_by() == signal.SIGKILL
    blocked.join(30)
    assert isinstance(answers[0], SessionGone)
    os.close(session)


def test_content_is_that_of_the_jump(emulator: Emulator, control: Control, kernel: LiveUpdate) -> None:
    session, fd = kernel.create_session("vm"), memfd.create("ram", 4096)
    kernel.preserve_fd(session, 1, fd)
    load(emulator)
    fault = control.inject("jump")
    with emulator.control(timeout=30) as rebooter:
        thread, _ = in_thread(rebooter.kexec)
        control.wait_hit(fault)
        os.pwrite(fd, b"after the freeze", 0)
        os.lseek(fd, 100, os.SEEK_SET)  # the offset is taken at the freeze, not at the jump
        control.release(fault)
        thread.join(30)
    os.close(session)
    os.close(fd)
    again = kernel.retrieve_session("vm")
    fd = kernel.retrieve_fd(again, 1)
    assert os.read(fd, 16) == b"after the freeze"
    os.close(fd)
    os.close(again)


@pytest.mark.parametrize("point", ["call", "reply"])
def test_a_call_can_be_held(control: Control, kernel: LiveUpdate, point: str) -> None:
    session, other, fd = kernel.create_session("vm"), kernel.create_session("other"), memfd.create("ram", 1)
    fault = control.inject(point, op="PRESERVE_FD", session="vm")
    thread, result = in_thread(lambda: kernel.preserve_fd(session, 1, fd))
    control.wait_hit(fault)
    assert kernel.session_name(other) == "other"  # nobody else waits
    done = [call["op"] for call in control.audit() if call["op"] == "PRESERVE_FD"]
    assert done == ([] if point == "call" else ["PRESERVE_FD"])
    assert not result
    queued, name = in_thread(lambda: kernel.session_name(session))
    control.release(fault)
    thread.join(30)
    queued.join(30)
    assert (result, name) == ([None], ["vm"])
    assert kernel.token_preserved(session, 1)
    for open_fd in (session, other, fd):
        os.close(open_fd)


def test_a_caller_killed_in_the_call(emulator: Emulator, control: Control) -> None:
    """The call is done and its caller dies before it hears of it: with it, the only holder of the session."""
    fault = control.inject("reply", op="CREATE_SESSION")
    child = Child(
        lambda _: void(open_kernel("emulated", directory=emulator.directory).create_session("doubt"))
    )
    control.wait_hit(fault)
    assert [session["name"] for session in control.state()["outgoing"]] == ["doubt"]
    child.kill()
    control.release(fault)
    kernel = open_kernel("emulated", directory=emulator.directory)
    kernel.scratch("doubt")
    assert control.state()["outgoing"] == []


def test_ordered_errnos(emulator: Emulator, control: Control, kernel: LiveUpdate) -> None:
    control.inject("create", errno=errno.ENOMEM)
    with pytest.raises(KernelError, match="ENOMEM"):
        kernel.create_session("vm")
    session, fd = kernel.create_session("vm"), memfd.create("ram", 10)
    for token in (1, 2):
        control.inject("preserve", errno=errno.EOPNOTSUPP, token=token)
        with pytest.raises(KernelError, match=f"token 0x{token}: EOPNOTSUPP"):
            kernel.preserve_fd(session, token, fd)
    kernel.preserve_fd(session, 1, fd)
    load(emulator)
    control.kexec()
    os.close(session)
    os.close(fd)
    session = kernel.retrieve_session("vm")
    control.inject("can_finish", errno=errno.EBUSY)
    with pytest.raises(FinishBusy):
        kernel.finish(session)
    control.inject("retrieve", errno=errno.ENOMEM, session="vm")
    for _ in range(2):
        with pytest.raises(RetrieveFailed, match="for ever"):
            kernel.retrieve_fd(session, 1)
    kernel.finish(session)
    os.close(session)


def test_bad_orders(control: Control) -> None:
    for call in (
        lambda: control.inject("nowhere"),
        lambda: control.inject("freeze"),
        lambda: control.release(99),
        lambda: control.wait_hit(99),
        lambda: control.call("NONSENSE"),
        lambda: control.call("ATTACH", pid="x"),
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011 (any errno will do)
            call()
        assert caught.value.errno
    control.clear_faults()


# -- other kinds of files ------------------------------------------------------------------------------------------------------


def test_another_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe: it will not freeze while it holds data, and cannot be finished before it was retrieved."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with (
        Emulator.start(tmp_path, handlers=["pipe_kind:add"]) as emulator,
        emulator.control(timeout=30) as control,
    ):
        control.spare(os.getpid())
        kernel = open_kernel("emulated", directory=tmp_path)
        session, (read_end, write_end) = kernel.create_session("pipes"), os.pipe()
        kernel.preserve_fd(session, 1, write_end)
        os.write(write_end, b"x")
        load(emulator)
        with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno is what counts)
            control.kexec()
        assert caught.value.errno == errno.EINVAL
        os.read(read_end, 1)
        control.kexec()
        for fd in (session, read_end, write_end):
            os.close(fd)
        session = kernel.retrieve_session("pipes")
        with pytest.raises(FinishBusy):
            kernel.finish(session)
        write_end = kernel.retrieve_fd(session, 1)
        assert os.readlink(f"/proc/self/fd/{write_end}").startswith("pipe:")
        kernel.finish(session)
        os.close(write_end)
        session2 = kernel.create_session("pipes")
        read_end, write_end = os.pipe()
        kernel.preserve_fd(session2, 1, read_end)
        load(emulator, stub_image(tmp_path / "image", handlers={"pipe": None}))
        control.kexec()
        with pytest.raises(DeviceBroken):
            kernel.retrieve_session("pipes")
        for fd in (session, session2, read_end, write_end):
            os.close(fd)


# -- what there is to see ------------------------------------------------------------------------------------------------------


def test_the_audit_names_every_effect(emulator: Emulator, control: Control, kernel: LiveUpdate) -> None:
    session, fd = kernel.create_session("vm"), memfd.create("ram", 10)
    kernel.preserve_fd(session, 0x1A, fd)
    with pytest.raises(KernelError):
        kernel.preserve_fd(session, 0x1A, fd)
    assert kernel.token_preserved(session, 0x1A)
    assert kernel.session_name(session) == "vm"
    load(emulator)
    control.kexec()
    os.close(session)
    os.close(fd)
    session = kernel.retrieve_session("vm")
    os.close(kernel.retrieve_fd(session, 0x1A))
    kernel.finish(session)
    os.close(session)
    kernel.status()  # a round trip: the hang-up was seen before it
    got = [(call["boot"], call["op"], call["session"], call["token"]) for call in control.audit()]
    assert got == [
        (1, "CREATE_SESSION", "vm", None),
        (1, "PRESERVE_FD", "vm", "0x1a"),
        (1, "KEXEC_LOAD", None, None),
        (1, "REBOOT_KEXEC", None, None),
        (2, "RETRIEVE_SESSION", "vm", None),
        (2, "RETRIEVE_FD", "vm", "0x1a"),
        (2, "FINISH", "vm", None),
        (2, "CLOSE", "vm", None),
    ]
    assert {call["pid"] for call in control.audit()} == {os.getpid(), 0}


def test_a_size_that_changed_is_reported(emulator: Emulator, control: Control, kernel: LiveUpdate) -> None:
    session = kernel.create_session("vm")
    for token, size in ((1, 5), (2, 20)):
        fd = memfd.create("ram", 10)
        os.pwrite(fd, b"0123456789", 0)
        kernel.preserve_fd(session, token, fd)
        os.ftruncate(fd, size)
        os.close(fd)
    assert control.state()["deviations"] == []
    load(emulator)
    control.kexec()
    assert len(control.state()["deviations"]) == 2
    assert "from 10 to 20 bytes" in control.state()["deviations"][1]
    os.close(session)
    session = kernel.retrieve_session("vm")
    for token, content in ((1, b"01234" + bytes(5)), (2, b"0123456789")):
        fd = kernel.retrieve_fd(session, token)
        assert os.pread(fd, 100, 0) == content
        os.close(fd)
    os.close(session)


def test_the_kernel_lets_go_of_every_fd(emulator: Emulator, control: Control, kernel: LiveUpdate) -> None:
    def open_fds() -> int:
        kernel.status()
        control.state()  # every hang-up before this call is in the same batch of events as the call,
        control.state()  # and this one is in a later batch
        return len(os.listdir(f"/proc/{emulator.pid}/fd"))

    before = open_fds()
    for _ in range(3):
        sessions = [kernel.create_session(f"s{number}") for number in range(20)]
        for token, session in enumerate(sessions):
            fd = memfd.create("ram", 10)
            kernel.preserve_fd(session, token, fd)
            with pytest.raises(KernelError):
                kernel.preserve_fd(session, token, fd)
            with pytest.raises(KernelError), open("/dev/null", "rb") as null:
                kernel.preserve_fd(session, 99, null.fileno())
            os.close(fd)
        load(emulator)
        control.kexec()
        for session in sessions:
            os.close(session)
        for number in range(10):
            session = kernel.retrieve_session(f"s{number}")
            if number % 2:
                os.close(kernel.retrieve_fd(session, number))
            if number % 3:
                kernel.finish(session)
            os.close(session)
        load(emulator)
        control.kexec()  # with ten sessions that nobody retrieved
    assert open_fds() == before


def test_two_holders_never_see_each_others_answers(control: Control, kernel: LiveUpdate) -> None:
    session = kernel.create_session("shared")
    copy = os.dup(session)
    wrong: list[object] = []

    def tokens(fd: int, first: int) -> None:
        for token in range(first, first + 100):
            ram = memfd.create("ram", 1)
            kernel.preserve_fd(fd, token, ram)
            os.close(ram)
            if not kernel.token_preserved(fd, token) or kernel.token_preserved(fd, token + 1):
                wrong.append(token)

    threads = [
        threading.Thread(target=tokens, args=(fd, first))
        for fd, first in ((session, 0), (copy, 1000), (session, 2000))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    os.close(session)
    os.close(copy)
    assert control.state()["liveupdate"]


def test_slow_callers_hold_up_nobody(emulator: Emulator, kernel: LiveUpdate, control: Control) -> None:
    """A caller that is stopped in the middle of its call, and one that opens the device and says nothing."""
    stopped = Child(lambda tell: (kernel.scratch("warm"), tell(b"x"), void(0))[2])
    stopped.heard()
    os.kill(stopped.pid, signal.SIGSTOP)
    silent = kernel.syscalls.open_device()
    with pytest.raises(DeviceBusy):
        open_kernel("emulated", directory=emulator.directory, busy_deadline=0).create_session("x")
    os.close(silent)
    kernel.scratch("x")
    stopped.kill()


def test_nonsense_on_a_session_is_ignored(control: Control, kernel: LiveUpdate) -> None:
    session = kernel.create_session("noise")
    channel = socket.socket(fileno=os.dup(session))
    with channel, open("/dev/null", "rb") as null:
        for message in (b"x", b"luo1" + bytes(11), b"luo1" + bytes(12), b"luo1" + bytes(8) + b"\xff" * 4):
            channel.send(message)
        channel.sendmsg(
            [b"luo1" + bytes(12)],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()] * 30))],
        )
    assert kernel.session_name(session) == "noise"
    os.close(session)
