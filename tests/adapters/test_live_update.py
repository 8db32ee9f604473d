# SPDX-License-Identifier: Apache-2.0
"""The port over the seam: retries, what it says when the kernel refuses, and the calls under it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate import abi, syscalls
from luod.adapters.liveupdate.device import LiveUpdate
from luod.adapters.liveupdate.errors import (
    DeviceAbsent,
    DeviceBroken,
    DeviceBusy,
    DeviceDenied,
    DeviceDisabled,
    KernelError,
    KexecRefused,
    SessionGone,
    errno_name,
    kernel_error,
)
from luod.adapters.liveupdate.syscalls import RealSyscalls, syscall_number
from luod.engine.ports import DeviceStatus, Kernel, KexecImage

STATES = {
    errno.EBUSY: "busy",
    errno.EIO: "broken",
    errno.ENOENT: "absent",
    errno.EACCES: "denied",
    errno.ENXIO: "disabled",
}


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Scripted:
    """Syscalls that answer as they are told: errnos of the next opens and of the next ioctls."""

    def __init__(self) -> None:
        self.opens: list[int] = []
        self.ioctls: list[int] = []
        self.requests: list[tuple[int, bytes]] = []
        self.cmdlines: list[tuple[bytes, int]] = []
        self.opened = 0
        self.always_busy = False

    def open_device(self) -> int:
        code = errno.EBUSY if self.always_busy else self.opens.pop(0) if self.opens else 0
        if code:
            raise OSError(code, os.strerror(code))
        self.opened += 1
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, buf: bytearray) -> None:
        os.fstat(fd)
        self.requests.append((request, bytes(buf)))
        code = self.ioctls.pop(0) if self.ioctls else 0
        if code:
            raise OSError(code, os.strerror(code))
        if request != abi.GET_NAME:
            buf[4:8] = (77).to_bytes(4, "little")
        else:
            buf[8:16] = b"vm1\0####"

    def boot_id(self) -> str:
        return "boot"

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        self.cmdlines.append((cmdline, flags))

    def kexec_loaded(self) -> bool:
        return bool(self.cmdlines)

    def reboot_kexec(self) -> NoReturn:
        raise OSError(errno.EPERM, "no")

    def diagnose(self, error: OSError) -> DeviceStatus:
        return DeviceStatus(STATES[error.errno or 0], "the detail", "the hint")  # type: ignore[arg-type]

    def describe(self) -> str:
        return "/dev/scripted"


@pytest.fixture
def calls() -> Scripted:
    return Scripted()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kernel(calls: Scripted, clock: Clock) -> Iterator[LiveUpdate]:
    with LiveUpdate(calls, clock=clock, sleep=clock.sleep, jitter=lambda: 1.0) as made:
        yield made


def test_it_is_the_port(kernel: LiveUpdate) -> None:
    port: Kernel = kernel
    assert port.boot_id() == "boot"


# -- opening -------------------------------------------------------------------------------------------------------------------


def test_busy_is_tried_again(kernel: LiveUpdate, calls: Scripted, clock: Clock) -> None:
    calls.opens = [errno.EBUSY] * 8
    assert kernel.create_session("vm1") == 77
    assert clock.pauses == [0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.1, 0.1]
    assert calls.opened == 1


def test_busy_ends_at_the_deadline(calls: Scripted, clock: Clock) -> None:
    calls.always_busy = True
    kernel = LiveUpdate(calls, busy_deadline=1.0, clock=clock, sleep=clock.sleep, jitter=lambda: 0.0)
    with pytest.raises(DeviceBusy) as caught:
        kernel.create_session("vm1")
    assert (caught.value.errno, caught.value.hint, caught.value.exit_code) == (errno.EBUSY, "the hint", 3)
    assert sum(clock.pauses) == pytest.approx(1.0)
    assert clock.pauses[0] == pytest.approx(0.001)  # jitter halves a pause at most
    assert max(clock.pauses) <= 0.1


def test_no_retry_without_a_deadline(calls: Scripted, clock: Clock) -> None:
    calls.always_busy = True
    with pytest.raises(DeviceBusy):
        LiveUpdate(calls, busy_deadline=0, clock=clock, sleep=clock.sleep).retrieve_session("vm1")
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EIO, DeviceBroken),
        (errno.ENOENT, DeviceAbsent),
        (errno.EACCES, DeviceDenied),
        (errno.ENXIO, DeviceDisabled),
    ],
)
def test_other_failures_are_not(
    kernel: LiveUpdate, calls: Scripted, clock: Clock, code: int, kind: type[KernelError]
) -> None:
    calls.opens = [code]
    with pytest.raises(kind, match="the detail"):
        kernel.create_session("vm1")
    assert clock.pauses == []
    calls.opens = [code]
    assert kernel.status() == DeviceStatus(STATES[code], "the detail", "the hint")  # type: ignore[arg-type]


def test_out_of_fds_is_not_the_devices_fault(kernel: LiveUpdate, calls: Scripted) -> None:
    calls.opens = [errno.EMFILE]
    with pytest.raises(KernelError, match="RLIMIT_NOFILE") as caught:
        kernel.create_session("vm1")
    assert caught.value.errno == errno.EMFILE


def test_the_device_is_closed_after_each_call(kernel: LiveUpdate, calls: Scripted) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kernel.create_session("a")
    calls.ioctls = [errno.EEXIST]
    with pytest.raises(KernelError):
        kernel.create_session("a")
    assert kernel.status().state == "ok"
    assert len(os.listdir("/proc/self/fd")) == before
    assert calls.opened == 3


def test_a_held_device_is_opened_once(calls: Scripted) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with LiveUpdate(calls, held=True) as kernel:
        kernel.create_session("a")
        kernel.retrieve_session("a")
        assert kernel.status().state == "ok"
        assert calls.opened == 1
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
    kernel.create_session("a")  # closed is not the end of it
    assert calls.opened == 2
    kernel.close()


def test_threads_take_turns(calls: Scripted) -> None:
    """Two threads of one process must not make each other busy."""
    inside: list[int] = []
    most: list[int] = []
    real = calls.open_device

    def open_device() -> int:
        inside.append(1)
        most.append(len(inside))
        return real()

    def ioctl(fd: int, request: int, buf: bytearray) -> None:
        Scripted.ioctl(calls, fd, request, buf)
        inside.pop()

    calls.open_device = open_device  # type: ignore[method-assign]
    calls.ioctl = ioctl  # type: ignore[method-assign]
    kernel = LiveUpdate(calls)
    threads = [
        threading.Thread(target=lambda: [kernel.create_session("x") for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


# -- what a refusal says -------------------------------------------------------------------------------------------------------


def test_an_error_names_session_token_errno_and_remedy(kernel: LiveUpdate, calls: Scripted) -> None:
    with open("/dev/null", "rb") as session:
        calls.ioctls = [errno.EBUSY]
        with pytest.raises(KernelError) as caught:
            kernel.preserve_fd(session.fileno(), 0x1A, 5)
    error = caught.value
    assert str(error).startswith("PRESERVE_FD 'vm1' token 0x1a: EBUSY: ")
    assert "FINISH that one first" in error.hint
    assert (error.operation, error.subject, error.errno, error.errno_name) == (
        "PRESERVE_FD",
        "'vm1' token 0x1a",
        errno.EBUSY,
        "EBUSY",
    )


def test_an_error_on_a_nameless_fd(kernel: LiveUpdate, calls: Scripted) -> None:
    with open("/dev/null", "rb") as file:
        calls.ioctls = [errno.ENOTTY, errno.ENOTTY]
        with pytest.raises(SessionGone, match=f"FINISH fd {file.fileno()}: ENOTTY"):
            kernel.finish(file.fileno())


def test_the_probe(kernel: LiveUpdate, calls: Scripted) -> None:
    with open("/dev/null", "rb") as file:
        calls.ioctls = [errno.EEXIST, errno.EBADF, errno.EINVAL, 0]
        assert kernel.token_preserved(file.fileno(), 3)
        assert not kernel.token_preserved(file.fileno(), 3)
        with pytest.raises(KernelError, match="EINVAL"):
            kernel.token_preserved(file.fileno(), 3)
    assert calls.requests[0] == (abi.PRESERVE_FD, bytes(abi.pack_fd(3, -1)))
    with pytest.raises(SessionGone) as caught:  # a closed session must not pass for a free token
        kernel.token_preserved(1 << 20, 3)
    assert caught.value.errno == errno.EBADF


def test_a_kernel_that_preserves_nothing_at_all(kernel: LiveUpdate) -> None:
    with open("/dev/null", "rb") as file, pytest.raises(KernelError, match="preserved fd -1"):
        kernel.token_preserved(file.fileno(), 3)


def test_every_operation_says_something_for_every_errno() -> None:
    for operation in [*abi.OPERATIONS.values(), "open", "reboot", "kexec_file_load", "kexec_file_unload"]:
        for code in errno.errorcode:
            error = kernel_error(operation, "it", OSError(code, "text"))
            assert error.hint
            assert (error.errno, error.operation) == (code, operation)
            assert errno_name(code) in str(error)
    assert errno_name(95) == "EOPNOTSUPP"
    assert errno_name(9999) == "9999"


def test_load(kernel: LiveUpdate, calls: Scripted, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x")
    kernel.load(KexecImage(image, None, "liveupdate=on"))
    kernel.load(KexecImage(image, image, ""))
    kernel.unload()
    assert calls.cmdlines == [
        (b"liveupdate=on\0", abi.KEXEC_FILE_NO_INITRAMFS),
        (b"\0", 0),
        (b"", abi.KEXEC_FILE_UNLOAD),
    ]
    assert kernel.loaded()
    with pytest.raises(KexecRefused, match="CAP_SYS_BOOT"):
        kernel.kexec()


def test_open_kernel(tmp_path: Path) -> None:
    assert open_kernel("device").syscalls.describe() == "/dev/liveupdate"
    assert open_kernel("emulated", directory=tmp_path).syscalls.describe() == str(tmp_path / "liveupdate")
    with pytest.raises(ValueError, match="directory"):
        open_kernel("emulated")
    with pytest.raises(ValueError, match="directory"):
        open_kernel("device", directory=tmp_path)


# -- the real calls, as far as they can be made anywhere -----------------------------------------------------------------------


def test_open_is_close_on_exec(tmp_path: Path) -> None:
    (tmp_path / "device").touch()
    fd = RealSyscalls(tmp_path / "device").open_device()
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    os.close(fd)


def test_an_interrupted_ioctl_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | None] = [
        InterruptedError(errno.EINTR, "x"),
        InterruptedError(errno.EINTR, "x"),
        None,
    ]
    seen: list[tuple[object, ...]] = []

    def ioctl(*args: object) -> int:
        seen.append(args)
        answer = answers.pop(0)
        if answer:
            raise answer
        return 0

    monkeypatch.setattr(syscalls.fcntl, "ioctl", ioctl)
    buf = abi.pack_name()
    RealSyscalls().ioctl(3, abi.GET_NAME, buf)
    assert seen == [(3, abi.GET_NAME, buf, True)] * 3


def test_real_ioctl_on_a_file_that_is_no_session() -> None:
    with open("/dev/null", "rb") as file, pytest.raises(OSError) as caught:  # noqa: PT011 (the errno is what counts)
        RealSyscalls().ioctl(file.fileno(), abi.GET_NAME, abi.pack_name())
    assert caught.value.errno == errno.ENOTTY


def test_real_boot_id() -> None:
    assert len(RealSyscalls().boot_id()) == 36


def test_syscall_numbers() -> None:
    assert (syscall_number("kexec_file_load", "x86_64"), syscall_number("reboot", "x86_64")) == (320, 169)
    assert (syscall_number("kexec_file_load", "aarch64"), syscall_number("reboot", "aarch64")) == (294, 142)
    with pytest.raises(OSError, match="x86_64 and aarch64 only"):
        syscall_number("reboot", "m68k")


class FakeLibc:
    """libc.syscall that only writes down its arguments; nothing here may ever reach the kernel of this machine."""

    def __init__(self, result: int, code: int = 0) -> None:
        self.args: tuple[object, ...] = ()
        self._result, self._code = result, code
        self.syscall = self._make()

    def _make(self) -> Callable[..., int]:
        def syscall(*args: object) -> int:
            self.args = tuple(getattr(arg, "value", arg) for arg in args)
            ctypes.set_errno(self._code)
            return self._result

        return syscall


def test_real_kexec_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = FakeLibc(0)
    monkeypatch.setattr(syscalls.ctypes, "CDLL", lambda *_, **__: libc)
    monkeypatch.setattr(syscalls.platform, "machine", lambda: "x86_64")
    RealSyscalls().kexec_file_load(5, -1, b"quiet\0", abi.KEXEC_FILE_NO_INITRAMFS)
    assert libc.args == (320, 5, -1, 6, b"quiet", 4)  # the length counts the NUL
    with pytest.raises(OSError, match="came back"):
        RealSyscalls().reboot_kexec()
    assert [value & 0xFFFFFFFF for value in libc.args[1:4] if isinstance(value, int)] == [
        0xFEE1DEAD,
        0x28121969,
        0x45584543,
    ]
    assert libc.args[0] == 169


def test_real_kexec_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls.ctypes, "CDLL", lambda *_, **__: FakeLibc(-1, errno.EPERM))
    with pytest.raises(KexecRefused) as caught:
        LiveUpdate(RealSyscalls()).kexec()
    assert caught.value.errno == errno.EPERM
