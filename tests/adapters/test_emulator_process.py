# SPDX-License-Identifier: Apache-2.0
"""The emulator as a process: who dies at a reboot, what blocks, what the harness can order and see."""

from __future__ import annotations

import array
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luod.adapters import memfd
from luod.adapters.emulator.control import Control
from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate import abi
from luod.adapters.liveupdate.device import LiveUpdate
from luod.adapters.liveupdate.errors import (
    DeviceAbsent,
    DeviceBroken,
    DeviceBusy,
    DeviceDisabled,
    FinishBusy,
    KernelError,
    KexecRefused,
    RetrieveFailed,
    SessionGone,
    SessionUnknown,
)
from luod.engine.ports import KexecImage

CMDLINE = "liveupdate=on kho=on"


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    with Emulator.start(tmp_path / "emulator") as made:
        yield made


@pytest.fixture
def control(emulator: Emulator) -> Iterator[Control]:
    """The harness: this process outlives every reboot."""
    with emulator.control(timeout=30) as made:
        made.spare(os.getpid())
        yield made


@pytest.fixture
def kernel(emulator: Emulator) -> LiveUpdate:
    return open_kernel("emulated", directory=emulator.directory)


def load(emulator: Emulator, image: Path | None = None, cmdline: str = CMDLINE) -> None:
    kernel = open_kernel("emulated", directory=emulator.directory)
    kernel.load(KexecImage(image or stub_image(emulator.directory / "image"), None, cmdline))


class Child:
    """A forked process that runs `body(tell)` and then waits to be killed; `tell` reaches `heard`."""

    def __init__(self, body: Callable[[Callable[[bytes], None]], None]) -> None:
        self._told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                body(lambda data: void(os.write(tell, data)))
                while True:
                    signal.pause()
            finally:
                os._exit(3)
        os.close(tell)

    def heard(self) -> bytes:
        return os.read(self._told, 64)

    def is_silent(self) -> bool:
        return not select.select([self._told], [], [], 0)[0]

    def ended_by(self) -> int:
        """Wait for its end; the signal that ended it, or 0."""
        os.close(self._told)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) * -1

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.ended_by()


def void(_: object) -> None:
    return None


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run a call that may block; its result or its error is put in the list."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(call())
        except KernelError as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, result


# -- who dies ------------------------------------------------------------------------------------------------------------------


def test_a_kexec_kills_the_world_and_only_it(emulator: Emulator, control: Control) -> None:
    def caller(tell: Callable[[bytes], None]) -> None:
        open_kernel("emulated", directory=emulator.directory).create_session("caller")
        tell(b"x")

    def bystander(tell: Callable[[bytes], None]) -> None:
        open_kernel("emulated", directory=emulator.directory).boot_id()
        tell(b"x")

    inside, outside = Child(caller), Child(bystander)
    assert (inside.heard(), outside.heard()) == (b"x", b"x")
    assert control.state()["members"] == [inside.pid]
    load(emulator)
    before = control.boot_id()
    after = control.kexec()
    assert inside.ended_by() == signal.SIGKILL
    assert after != before
    assert control.boot_id() == after
    state = control.state()
    assert (state["boot"], state["members"], state["loaded"], state["outgoing"]) == (2, [], False, [])
    os.kill(outside.pid, 0)
    outside.kill()


def test_attached_processes_die_with_their_descendants(emulator: Emulator, control: Control) -> None:
    def body(tell: Callable[[bytes], None]) -> None:
        if os.fork() == 0:
            os.setsid()
            tell(b"grandchild %d" % os.getpid())
            while True:
                signal.pause()

    child = Child(body)
    grandchild = int(child.heard().split()[1])
    pidfd = os.pidfd_open(grandchild)
    control.attach(child.pid)
    control.cold_reboot()
    assert child.ended_by() == signal.SIGKILL
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_a_session_passed_on_makes_its_caller_a_member(kernel: LiveUpdate, control: Control) -> None:
    session = kernel.create_session("passed")

    def body(tell: Callable[[bytes], None]) -> None:
        assert kernel.session_name(session) == "passed"
        tell(b"x")

    child = Child(body)
    child.heard()
    assert control.state()["members"] == [child.pid]
    child.kill()
    os.close(session)


def test_the_dead_are_forgotten(emulator: Emulator, control: Control) -> None:
    child = Child(
        lambda tell: tell(b"%d" % open_kernel("emulated", directory=emulator.directory).create_session("x"))
    )
    child.heard()
    child.kill()
    open_kernel("emulated", directory=emulator.directory).scratch("x")  # its session went with it
    assert control.state()["members"] == []


def test_a_spared_process_keeps_dead_sessions(
    emulator: Emulator, control: Control, kernel: LiveUpdate
) -> None:
    session = kernel.create_session("dead")
    load(emulator)
    control.kexec()
    with pytest.raises(SessionGone) as caught:
        kernel.session_name(session)
    assert caught.value.errno == errno.ENODEV
    os.close(session)
    again = kernel.retrieve_session("dead")
    assert kernel.session_name(again) == "dead"
    os.close(again)


def test_reboot_by_a_member_kills_it(emulator: Emulator, control: Control) -> None:
    load(emulator)
    before = control.boot_id()
    child = Child(lambda _: open_kernel("emulated", directory=emulator.directory).kexec())
    assert control.wait_boot(before) != before
    assert child.ended_by() == signal.SIGKILL


# -- reboots that fail, and what they leave ------------------------------------------------------------------------------------


def test_reboot_without_an_image(kernel: LiveUpdate, control: Control) -> None:
    session = kernel.create_session("stays")
    with pytest.raises(KexecRefused, match="no image is loaded") as caught:
        kernel.kexec()
    assert caught.value.errno == errno.EINVAL
    assert kernel.session_name(session) == "stays"
    os.close(session)


def test_a_refused_freeze_changes_nothing(emulator: Emulator, kernel: LiveUpdate, control: Control) -> None:
    session, fd = kernel.create_session("vm"), memfd.create("ram", 4096)
    kernel.preserve_fd(session, 1, fd)
    load(emulator)
    control.inject("freeze", errno=errno.EBUSY, session="vm", token=1)
    boot = control.boot_id()
    with pytest.raises(OSError, match="busy") as caught:
        control.kexec()
    assert caught.value.errno == errno.EBUSY
    assert control.boot_id() == boot
    assert kernel.loaded()
    kernel.preserve_fd(session, 2, other := memfd.create("more", 1))
    assert control.kexec() != boot
    for leftover in (session, fd, other):
        os.close(leftover)
    again = kernel.retrieve_session("vm")
    os.close(kernel.retrieve_fd(again, 2))
    os.close(again)


def test_cold_reboot_loses_everything(emulator: Emulator, kernel: LiveUpdate, control: Control) -> None:
    session = kernel.create_session("gone")
    load(emulator)
    control.cold_reboot()
    assert not kernel.loaded()
    with pytest.raises(SessionUnknown):
        kernel.retrieve_session("gone")
    os.close(session)


# -- the next kernel -----------------------------------------------------------------------------------------------------------


def carried(emulator: Emulator, control: Control, **image: object) -> LiveUpdate:
    """Preserve "vm", and kexec into that image."""
    kernel = open_kernel("emulated", directory=emulator.directory)
    session, fd = kernel.create_session("vm"), memfd.create("ram", 4096)
    kernel.preserve_fd(session, 1, fd)
    cmdline = str(image.pop("cmdline", CMDLINE))
    load(emulator, stub_image(emulator.directory / "image", **image), cmdline)  # type: ignore[arg-type]
    try:
        control.kexec()
    finally:
        os.close(session)
        os.close(fd)
    return kernel


def test_another_luo_string_panics(emulator: Emulator, control: Control) -> None:
    with pytest.raises(OSError, match="luo-v6") as caught:
        carried(emulator, control, luo="luo-v6")
    assert caught.value.errno == errno.EHOSTDOWN
    kernel = open_kernel("emulated", directory=emulator.directory)
    with pytest.raises(DeviceAbsent, match="panicked"):
        kernel.create_session("x")
    assert kernel.status().state == "absent"
    control.cold_reboot()
    kernel.scratch("x")


def test_panic_option_turns_a_panic_into_a_cold_boot(emulator: Emulator, control: Control) -> None:
    kernel = carried(emulator, control, luo="luo-v6", cmdline=f"{CMDLINE} panic=-1")
    with pytest.raises(SessionUnknown):
        kernel.retrieve_session("vm")
    assert control.state()["boot"] == 3


@pytest.mark.parametrize(
    ("image", "note"),
    [
        ({"kho": "kho-v5"}, "disabling revival"),
        ({"config_kho": False, "cmdline": "liveupdate=on kho=on"}, "CONFIG_KEXEC_HANDOVER"),
        ({"config_liveupdate": False}, "CONFIG_LIVEUPDATE"),
        ({"cmdline": "liveupdate=on kho=off"}, "handover is off"),
        ({"cmdline": "liveupdate=on"}, "handover is off"),
        ({"cmdline": "kho=on"}, "live update is off"),
        ({"cmdline": "kho=on liveupdate=off"}, "live update is off"),
    ],
)
def test_kernels_that_lose_everything(
    emulator: Emulator, control: Control, image: dict[str, object], note: str
) -> None:
    kernel = carried(emulator, control, **image)
    state = control.state()
    assert note in " ".join(state["notes"])
    if state["liveupdate"]:
        with pytest.raises(SessionUnknown):
            kernel.retrieve_session("vm")
        return
    assert kernel.status().state == "disabled"
    with pytest.raises(DeviceDisabled) as caught:
        kernel.create_session("x")
    assert caught.value.errno == errno.ENOENT


def test_default_on_handover(emulator: Emulator, control: Control) -> None:
    kernel = carried(emulator, control, kho_default=True, cmdline="liveupdate=on")
    os.close(kernel.retrieve_session("vm"))


@pytest.mark.parametrize("string", ["memfd-v3", None])
def test_another_memfd_string_is_eio_for_ever(
    emulator: Emulator, control: Control, string: str | None
) -> None:
    kernel = carried(emulator, control, memfd=string)
    for _ in range(2):
        with pytest.raises(DeviceBroken):
            kernel.retrieve_session("vm")
    assert kernel.status().state == "broken"


def test_the_old_kexec_load_loses_everything(
    emulator: Emulator, control: Control, kernel: LiveUpdate
) -> None:
    session = kernel.create_session("vm")
    with open(stub_image(emulator.directory / "image"), "rb") as image:
        control.kexec_load_legacy(image.fileno(), CMDLINE)
    assert kernel.loaded()
    control.kexec()
    os.close(session)
    with pytest.raises(SessionUnknown):
        kernel.retrieve_session("vm")


def test_what_kexec_file_load_refuses(
    emulator: Emulator, control: Control, kernel: LiveUpdate, tmp_path: Path
) -> None:
    image = stub_image(tmp_path / "image")
    (tmp_path / "text").write_text("no kernel")
    (tmp_path / "broken").write_bytes(image.read_bytes()[:-10])
    (tmp_path / "bzImage").write_bytes(bytes(0x202) + b"HdrS" + bytes(100))
    for name, code in (
        ("text", errno.ENOEXEC),
        ("broken", errno.ENOEXEC),
        ("none", errno.ENOENT),
        (".", errno.EISDIR),
    ):
        with pytest.raises(KexecRefused) as caught:
            kernel.load(KexecImage(tmp_path / name, None, CMDLINE))
        assert caught.value.errno == code, name
    with pytest.raises(KexecRefused) as caught:
        kernel.load(KexecImage(image, tmp_path / "no-initrd", CMDLINE))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(KexecRefused, match="NUL"):
        kernel.load(KexecImage(image, None, "a\0b"))
    assert not kernel.loaded()
    calls = kernel.syscalls
    with open(image, "rb") as file:
        fd = file.fileno()
        cases = [
            (fd, -1, b"no NUL", abi.KEXEC_FILE_NO_INITRAMFS, errno.EINVAL),
            (fd, -1, b"x\0", 0x40, errno.EINVAL),
            (fd, -1, b"x\0", 0, errno.EBADF),
            (-1, -1, b"x\0", abi.KEXEC_FILE_NO_INITRAMFS, errno.EBADF),
            (1 << 20, -1, b"x\0", abi.KEXEC_FILE_NO_INITRAMFS, errno.EBADF),
            (fd, -1, b"x\0", abi.KEXEC_FILE_ON_CRASH | abi.KEXEC_FILE_NO_INITRAMFS, errno.EADDRNOTAVAIL),
        ]
        for kernel_fd, initrd_fd, cmdline, flags, code in cases:
            with pytest.raises(OSError) as refused:  # noqa: PT011 (the errno is what counts)
                calls.kexec_file_load(kernel_fd, initrd_fd, cmdline, flags)
            assert refused.value.errno == code
    kernel.unload()
    kernel.load(KexecImage(tmp_path / "bzImage", image, ""))
    assert kernel.loaded()
    kernel.unload()
    assert not kernel.loaded()
    control.inject("load", errno=errno.EADDRNOTAVAIL)
    with pytest.raises(KexecRefused, match="kho_scratch"):
        kernel.load(KexecImage(image, None, CMDLINE))


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


# -- the process ---------------------------------------------------------------------------------------------------------------


def test_no_emulator(tmp_path: Path) -> None:
    kernel = open_kernel("emulated", directory=tmp_path)
    assert kernel.status().state == "absent"
    with pytest.raises(DeviceAbsent, match="no emulator is running") as caught:
        kernel.create_session("x")
    assert caught.value.errno == errno.ENOENT
    with Emulator.start(tmp_path) as emulator, emulator.control() as control:
        control.shutdown()
    assert kernel.status().state == "absent"


def test_a_killed_emulator_leaves_no_caller_waiting(tmp_path: Path) -> None:
    with Emulator.start(tmp_path) as emulator, emulator.control(timeout=30) as control:
        kernel = open_kernel("emulated", directory=tmp_path)
        session = kernel.create_session("x")
        fault = control.inject("call", op="GET_NAME")
        thread, result = in_thread(lambda: kernel.session_name(session))
        control.wait_hit(fault)
        os.kill(emulator.pid, signal.SIGKILL)
        thread.join(30)
        assert isinstance(result[0], SessionGone)
        os.close(session)
    assert open_kernel("emulated", directory=tmp_path).status().state == "absent"


def test_start_reports_a_bad_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("no kernel")
    with pytest.raises(DeviceAbsent, match="ended at once"):
        Emulator.start(tmp_path, image=tmp_path / "image")


def test_the_emulator_ends_with_its_starter(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from luod.adapters.emulator.process import Emulator;"
        "print(Emulator.start(Path(sys.argv[1])).pid, flush=True); sys.stdin.read()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert starter.stdout is not None
    pidfd = os.pidfd_open(int(starter.stdout.readline()))
    starter.kill()
    starter.communicate()
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_a_directory_longer_than_a_socket_path(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    with Emulator.start(directory) as emulator:
        open_kernel("emulated", directory=emulator.directory).scratch("x")


def test_first_kernel_without_live_update(tmp_path: Path) -> None:
    with Emulator.start(tmp_path, cmdline="quiet") as emulator, emulator.control() as control:
        kernel = open_kernel("emulated", directory=tmp_path)
        assert kernel.status().state == "disabled"
        load(emulator)
        control.kexec()
        kernel.scratch("x")


def test_terminate(tmp_path: Path) -> None:
    with Emulator.start(tmp_path) as emulator:
        os.kill(emulator.pid, signal.SIGTERM)
        emulator.stop()
    assert not (tmp_path / "liveupdate").exists()
    assert not (tmp_path / "control").exists()
