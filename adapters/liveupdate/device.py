# SPDX-License-Identifier: Apache-2.0
"""`LiveUpdate`: the kernel port over the seam, the same code for the real device and for the emulator.

The device is opened for one ioctl and closed again, because systemd and luod need it at the same time and the kernel lets it be
open once only; sessions do not depend on it. `held=True` keeps it open, for hosts where nobody else wants it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import NoReturn

from ...engine.ports import DeviceStatus, KexecImage
from . import abi
from .errors import (
    BadName,
    DeviceAbsent,
    DeviceBroken,
    DeviceBusy,
    DeviceDenied,
    DeviceDisabled,
    DeviceError,
    KernelError,
    KexecRefused,
    SessionGone,
    kernel_error,
)
from .syscalls import Syscalls

_DEVICE_ERRORS: dict[str, type[DeviceError]] = {
    "absent": DeviceAbsent,
    "disabled": DeviceDisabled,
    "busy": DeviceBusy,
    "broken": DeviceBroken,
    "denied": DeviceDenied,
}

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.1


def hex_token(token: int) -> str:
    """Write a token the way messages and the journal do."""
    return f"{token:#x}"


class LiveUpdate:
    """One kernel's Live Update Orchestrator and kexec, as `engine.ports.Kernel` wants it. Safe to share between threads.

    `busy_deadline` is how long, in seconds, opening is tried again while someone else has the device open; `clock`, `sleep` and
    `jitter` (a factor in 0..1 for each pause) are there for tests.
    """

    def __init__(
        self,
        syscalls: Syscalls,
        *,
        held: bool = False,
        busy_deadline: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.syscalls = syscalls
        self._held = held
        self._busy_deadline = busy_deadline
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._lock = threading.Lock()
        self._device: int | None = None

    def __enter__(self) -> LiveUpdate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the device if it is held. Sessions are not touched."""
        with self._lock:
            if self._device is not None:
                os.close(self._device)
                self._device = None

    # -- the device ------------------------------------------------------------------------------------------------------------

    def status(self) -> DeviceStatus:
        """Try to open the device, once, and say how that went.

        Opening is not free of effect: the first open after a boot makes the kernel rebuild what was handed over, with the file
        handlers it knows at that moment.
        """
        with self._lock:
            if self._device is not None:
                return DeviceStatus("ok", f"{self.syscalls.describe()} is held open")
            try:
                fd = self.syscalls.open_device()
            except OSError as error:
                return self.syscalls.diagnose(error)
            os.close(fd)
        return DeviceStatus("ok", f"{self.syscalls.describe()} answers")

    def _open(self) -> int:
        deadline = self._clock() + self._busy_deadline
        pause = _FIRST_PAUSE
        while True:
            try:
                return self.syscalls.open_device()
            except OSError as error:
                left = deadline - self._clock()
                if error.errno != errno.EBUSY or left <= 0:
                    raise self._device_error(error) from error
            self._sleep(min(left, pause * (0.5 + self._jitter() / 2)))
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _device_error(self, error: OSError) -> KernelError:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            return kernel_error("open", self.syscalls.describe(), error)
        status = self.syscalls.diagnose(error)
        kind = _DEVICE_ERRORS.get(status.state, DeviceError)
        return kind(
            "open", self.syscalls.describe(), error.errno or errno.EIO, detail=status.detail, hint=status.hint
        )

    @contextlib.contextmanager
    def _opened(self) -> Generator[int]:
        with self._lock:
            if self._device is not None:
                yield self._device
                return
            fd = self._open()
            if self._held:
                self._device = fd
                yield fd
                return
            try:
                yield fd
            finally:
                os.close(fd)

    def _device_call(self, request: int, name: str) -> int:
        operation = abi.OPERATIONS[request]
        raw = name.encode("utf-8", "surrogateescape")
        if not raw or len(raw) >= abi.NAME_LENGTH or b"\0" in raw:
            # The kernel would cut at a NUL, and so quietly use another session than the one that was meant.
            raise BadName(operation, repr(name), errno.EINVAL, hint="names are 1 to 63 bytes without NUL")
        buf = abi.pack_session(raw)
        with self._opened() as device:
            try:
                self.syscalls.ioctl(device, request, buf)
            except OSError as error:
                raise kernel_error(operation, repr(name), error) from error
        return abi.unpack_fd(buf)

    def create_session(self, name: str) -> int:
        """Make an outgoing session and return its fd. Closing the last copy of that fd undoes all of it."""
        return self._device_call(abi.CREATE_SESSION, name)

    def retrieve_session(self, name: str) -> int:
        """Take an incoming session and return its fd: once a boot. Closing the last copy finishes it and drops what is left."""
        return self._device_call(abi.RETRIEVE_SESSION, name)

    def scratch(self, name: str) -> None:
        """Create and close a session: it puts right what a failed CREATE_SESSION can leave behind in the kernel."""
        os.close(self.create_session(name))

    # -- sessions --------------------------------------------------------------------------------------------------------------

    def _session_call(self, session_fd: int, request: int, buf: bytearray, token: int | None = None) -> None:
        try:
            self.syscalls.ioctl(session_fd, request, buf)
        except OSError as error:
            raise self._refusal(session_fd, request, token, error) from error

    def _refusal(self, session_fd: int, request: int, token: int | None, error: OSError) -> KernelError:
        operation, subject = abi.OPERATIONS[request], self._subject(session_fd, token)
        if error.errno == errno.EBADF and not self._is_open(session_fd):
            # PRESERVE_FD says EBADF of its argument, too: tell the two apart.
            return SessionGone(operation, subject, errno.EBADF, hint="the session fd is closed")
        return kernel_error(operation, subject, error)

    def _subject(self, session_fd: int, token: int | None) -> str:
        buf = abi.pack_name()
        try:
            self.syscalls.ioctl(session_fd, abi.GET_NAME, buf)
            session = repr(abi.unpack_name(buf).decode("utf-8", "surrogateescape"))
        except OSError:
            session = f"fd {session_fd}"
        return session if token is None else f"{session} token {hex_token(token)}"

    def preserve_fd(self, session_fd: int, token: int, fd: int) -> None:
        """Keep the file behind `fd` for the next kernel, under `token` (any u64, unique in the session).

        The work is linear in the size of the file, and fills its holes. From here on its size is frozen.
        """
        self._session_call(session_fd, abi.PRESERVE_FD, abi.pack_fd(token, fd), token)

    def token_preserved(self, session_fd: int, token: int) -> bool:
        """Ask whether `token` is preserved in this outgoing session, without any effect.

        PRESERVE_FD looks at the token before it looks at the fd, so fd -1 gives EEXIST for a used token and EBADF for a free one.
        """
        try:
            self.syscalls.ioctl(session_fd, abi.PRESERVE_FD, abi.pack_fd(token, -1))
        except OSError as error:
            if error.errno == errno.EEXIST:
                return True
            if error.errno == errno.EBADF and self._is_open(session_fd):
                return False
            raise self._refusal(session_fd, abi.PRESERVE_FD, token, error) from error
        raise KernelError(
            "PRESERVE_FD",
            self._subject(session_fd, token),
            errno.EINVAL,
            detail="the kernel preserved fd -1",
            hint="report this",
        )

    @staticmethod
    def _is_open(fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    def retrieve_fd(self, session_fd: int, token: int) -> int:
        """Rebuild the file under `token` and return a new fd of it. Again: another fd of the same open file.

        A failure is for ever and costs the content. The memory is charged to the cgroup of the caller.
        """
        buf = abi.pack_fd(token)
        self._session_call(session_fd, abi.RETRIEVE_FD, buf, token)
        return abi.unpack_fd(buf)

    def finish(self, session_fd: int) -> None:
        """End an incoming session: what was retrieved lives on in its fds, what was not is destroyed. Again: no effect."""
        self._session_call(session_fd, abi.FINISH, abi.pack_finish())

    def is_session(self, fd: int) -> bool:
        """Say whether an fd is a session of this kernel; nothing is asked of the fd itself."""
        return self.syscalls.is_session(fd)

    def session_name(self, session_fd: int) -> str:
        """Return the name of the session behind an fd; it tells a session fd from any other."""
        buf = abi.pack_name()
        self._session_call(session_fd, abi.GET_NAME, buf)
        return abi.unpack_name(buf).decode("utf-8", "surrogateescape")

    # -- kexec -----------------------------------------------------------------------------------------------------------------

    def boot_id(self) -> str:
        """Return the id of this boot."""
        return self.syscalls.boot_id()

    def load(self, image: KexecImage) -> None:
        """Load the next kernel with kexec_file_load(2); it replaces the one loaded before."""
        cmdline = image.cmdline.encode("utf-8", "surrogateescape")
        if b"\0" in cmdline:
            raise KexecRefused(
                "kexec_file_load", str(image.kernel), errno.EINVAL, hint="the command line has a NUL in it"
            )
        flags = abi.KEXEC_FILE_NO_INITRAMFS if image.initrd is None else 0
        with contextlib.ExitStack() as stack:
            files = [-1, -1]
            for place, path in enumerate((image.kernel, image.initrd)):
                if path is None:
                    continue
                try:
                    files[place] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise kernel_error("kexec_file_load", str(path), error) from error
                stack.callback(os.close, files[place])
            try:
                self.syscalls.kexec_file_load(files[0], files[1], cmdline + b"\0", flags)
            except OSError as error:
                raise kernel_error("kexec_file_load", str(image.kernel), error) from error

    def unload(self) -> None:
        """Forget the loaded image; without one this does nothing."""
        try:
            self.syscalls.kexec_file_load(-1, -1, b"", abi.KEXEC_FILE_UNLOAD)
        except OSError as error:
            raise kernel_error("kexec_file_unload", "", error) from error

    def loaded(self) -> bool:
        """Whether an image is loaded."""
        return self.syscalls.kexec_loaded()

    def kexec(self) -> NoReturn:
        """Freeze the sessions and jump into the loaded image.

        It comes back only as a KexecRefused (with the errno of the file that would not freeze, or of reboot(2) itself), and then
        every session is as it was. Stop every writer first: what is in memory at the jump is what the next kernel sees.
        """
        try:
            self.syscalls.reboot_kexec()
        except OSError as error:
            raise kernel_error("reboot", "KEXEC", error) from error

    # -- file systems ----------------------------------------------------------------------------------------------------------

    def sync(self) -> int:
        """Begin to write every file system back; return an fd that becomes readable at the end, and that the caller closes."""
        try:
            return self.syscalls.sync()
        except OSError as error:
            raise kernel_error("sync", "", error) from error

    def synced(self, fd: int) -> None:
        """Take the outcome of a sync whose fd has become readable."""
        try:
            self.syscalls.synced(fd)
        except OSError as error:
            raise kernel_error("sync", "", error) from error
