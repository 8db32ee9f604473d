# SPDX-License-Identifier: Apache-2.0
"""The seam under the kernel port: every call that reaches a kernel, and nothing else.

`Syscalls` is implemented twice: by `RealSyscalls` here and by the emulator's shim. What is above it (`device.LiveUpdate`) is
shared, so both backends run the same code from the first struct on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import sys
from pathlib import Path
from typing import NoReturn, Protocol

from ...engine.ports import DeviceStatus
from . import abi
from .diagnosis import diagnose

DEVICE = Path("/dev/liveupdate")
SYNC = "posix.sync()"
_ALONE = "import posix; posix.closerange(3, 1 << 20); "  # also what somebody else left inheritable


class Syscalls(Protocol):
    """What a kernel offers, one method a system call. Every failure is an OSError with the kernel's errno."""

    def open_device(self) -> int:
        """Open /dev/liveupdate and return the fd, close-on-exec. Fails with ENOENT, EBUSY, EIO, EACCES or EPERM."""
        ...

    def ioctl(self, fd: int, request: int, buf: bytearray) -> None:
        """Run one ioctl with `buf` as its argument, which the kernel may write to."""
        ...

    def boot_id(self) -> str:
        """Return the id of this boot, a UUID as in /proc/sys/kernel/random/boot_id."""
        ...

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        """Load the next kernel, or unload it (KEXEC_FILE_UNLOAD). `cmdline` ends with its NUL, or is empty."""
        ...

    def kexec_loaded(self) -> bool:
        """Whether an image is loaded, no matter by which system call."""
        ...

    def reboot_kexec(self) -> NoReturn:
        """Jump into the loaded image. It only comes back by an OSError, and then nothing was changed."""
        ...

    def sync(self) -> int:
        """Have all file systems written back, beside this process; return an fd that becomes readable when it has ended."""
        ...

    def synced(self, fd: int) -> None:
        """Take the outcome of a sync that has ended, once; an OSError when it failed."""
        ...

    def diagnose(self, error: OSError) -> DeviceStatus:
        """Say what an error of `open_device` means on this machine, and what to do about it."""
        ...

    def is_session(self, fd: int) -> bool:
        """Say whether an fd is a session of this kernel, without asking the fd anything: it may be somebody's trap."""
        ...

    def describe(self) -> str:
        """Name the device for messages."""
        ...


_REBOOT_MAGIC = (0xFEE1DEAD, 0x28121969)
_REBOOT_KEXEC = 0x45584543

_NUMBERS = {
    "x86_64": {"kexec_file_load": 320, "reboot": 169},
    "aarch64": {"kexec_file_load": 294, "reboot": 142},
}


def syscall_number(name: str, machine: str | None = None) -> int:
    """Return the number of kexec_file_load or reboot on this architecture; ENOSYS where kexec handover does not exist."""
    table = _NUMBERS.get(machine or platform.machine())
    if table is None:
        raise OSError(errno.ENOSYS, f"{name} is known for x86_64 and aarch64 only")
    return table[name]


def _syscall(name: str, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = int(libc.syscall(ctypes.c_long(syscall_number(name)), *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class RealSyscalls:
    """The running kernel. Needs root: the device node is 0600, and kexec needs CAP_SYS_BOOT."""

    def __init__(self, device: Path = DEVICE) -> None:
        self._device = device

    def open_device(self) -> int:
        """Open the device node."""
        return os.open(self._device, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, buf: bytearray) -> None:
        """Run the ioctl, again when a signal cuts in (fcntl.ioctl does not do that by itself)."""
        while True:
            try:
                fcntl.ioctl(fd, request, buf, True)
            except InterruptedError:
                continue
            return

    def boot_id(self) -> str:
        """Read the kernel's random boot id."""
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        """Load or unload by that system call; the older `kexec_load` is never used, since it loses every session."""
        _syscall(
            "kexec_file_load",
            ctypes.c_int(kernel_fd),
            ctypes.c_int(initrd_fd),
            ctypes.c_ulong(len(cmdline)),
            ctypes.c_char_p(cmdline),
            ctypes.c_ulong(flags),
        )

    def kexec_loaded(self) -> bool:
        """Read /sys/kernel/kexec/loaded, or its older name."""
        for path in ("/sys/kernel/kexec/loaded", "/sys/kernel/kexec_loaded"):
            try:
                return Path(path).read_text("ascii").strip() == "1"
            except FileNotFoundError:
                continue
        raise OSError(errno.ENOSYS, "this kernel has no kexec")

    def reboot_kexec(self) -> NoReturn:
        """Call reboot(2) with LINUX_REBOOT_CMD_KEXEC."""
        magic, magic2 = _REBOOT_MAGIC
        _syscall(
            "reboot", ctypes.c_int(magic - (1 << 32)), ctypes.c_int(magic2), ctypes.c_int(_REBOOT_KEXEC), None
        )
        raise OSError(errno.EIO, "reboot(KEXEC) came back without an error")

    def sync(self) -> int:
        """Start a process that writes all file systems back, and does nothing else; return its pidfd.

        A process and no thread: a sync that waits for a dead disk cannot even be killed, and as a thread it would keep every fd and
        every lock of this process from the next luod for as long.
        """
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _ALONE + SYNC],
            os.environ,
            file_actions=null,
            setsid=True,
        )
        return os.pidfd_open(pid)

    def synced(self, fd: int) -> None:
        """Reap the process. sync(2) itself cannot fail, but its process can be killed."""
        end = os.waitid(os.P_PIDFD, fd, os.WEXITED)
        if end is None or (end.si_code, end.si_status) != (os.CLD_EXITED, 0):
            raise OSError(errno.EINTR, f"the process that calls sync(2) was ended: {end}")

    def diagnose(self, error: OSError) -> DeviceStatus:
        """Look into /proc for the reason."""
        return diagnose(error, self._device)

    def is_session(self, fd: int) -> bool:
        """Look at the link that /proc shows: LUO names its anonymous inodes (kernel/liveupdate/luo_session.c)."""
        try:
            return os.readlink(f"/proc/self/fd/{fd}").startswith("anon_inode:[luo_session]")
        except OSError:
            return False

    def describe(self) -> str:
        """Name the device node."""
        return str(self._device)


__all__ = ["DEVICE", "RealSyscalls", "Syscalls", "abi", "syscall_number"]
