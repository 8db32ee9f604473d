# SPDX-License-Identifier: Apache-2.0
"""The seam on the emulator: `Syscalls` spoken to an emulator process instead of a kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import NoReturn

from ...engine.ports import DeviceStatus
from ..liveupdate import abi
from . import wire
from .control import Control

_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class EmulatedSyscalls:
    """A process of the emulated world. Opening the device or calling on a session makes the caller part of it, and so mortal."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open_device(self) -> int:
        """Connect to D/liveupdate; the first message says whether the device let us in."""
        try:
            sock = wire.connect(self._directory, wire.DEVICE_SOCKET, socket.SOCK_SEQPACKET)
        except ConnectionError as error:
            raise _error(errno.ENXIO) from error
        try:
            answer = sock.recv(wire.REPLY.size)
            if len(answer) != wire.REPLY.size:
                raise _error(errno.ENXIO)
            code = wire.REPLY.unpack(answer)[0]
            if code:
                raise _error(code)
            return sock.detach()
        except ConnectionError as error:
            raise _error(errno.ENXIO) from error
        finally:
            sock.close()

    def ioctl(self, fd: int, request: int, buf: bytearray) -> None:
        """Send the struct to the kernel process and wait for its answer, without limit, as a system call does."""
        os.fstat(fd)  # EBADF must mean the fd of the call, never the one in the argument
        attached = _argument_fd(request, buf)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                head = wire.REQUEST.pack(wire.MAGIC, request, attached is not None, len(buf))
                rights = [theirs.fileno()] + ([] if attached is None else [attached])
                _send(fd, head + bytes(buf), rights)
            try:
                answer, fds, _ = wire.receive(ours)
            except ConnectionError:
                answer, fds = b"", []
        _take_answer(answer, fds, buf)

    def boot_id(self) -> str:
        """Ask for the emulated boot id."""
        with self._control() as control:
            return control.boot_id()

    def kexec_file_load(self, kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> None:
        """Load or unload the image of the emulated machine."""
        with self._control() as control:
            control.kexec_file_load(kernel_fd, initrd_fd, cmdline, flags)

    def kexec_loaded(self) -> bool:
        """Ask whether an image is loaded."""
        with self._control() as control:
            return control.kexec_loaded()

    def reboot_kexec(self) -> NoReturn:
        """Jump: this process is killed with its world, or the errno comes back. A spared process learns of the jump by ECHILD."""
        with self._control() as control:
            control.attach(os.getpid())
            control.kexec()
        raise OSError(errno.ECHILD, "the emulated machine was rebooted and this process was spared")

    def sync(self) -> int:
        """Tell the emulated kernel, which notes it; the disks of this machine are left alone."""
        with self._control() as control:
            control.ask("SYNC")
            return control.detach()

    def synced(self, fd: int) -> None:
        """Read the answer."""
        with Control.on(os.dup(fd)) as control:
            control.answer()

    def diagnose(self, error: OSError) -> DeviceStatus:
        """Say what the error means for an emulator."""
        where = str(self._directory)
        code = error.errno or errno.EIO
        if code == errno.EBUSY:
            return DeviceStatus(
                "busy", f"the emulated device in {where} is open elsewhere", "wait, or stop its holder"
            )
        if code == errno.EIO:
            return DeviceStatus(
                "broken",
                "the emulated kernel could not rebuild the sessions that its predecessor handed over",
                "only a reboot ends this; the incoming sessions are lost",
            )
        if code in {errno.EACCES, errno.EPERM}:
            return DeviceStatus(
                "denied", f"the emulator in {where} belongs to another user", "run as the user who started it"
            )
        try:
            with self._control() as control:
                state = control.state()
        except OSError:
            return DeviceStatus(
                "absent",
                f"no emulator is running in {where}",
                "start one: python -m luod.adapters.emulator --dir DIRECTORY",
            )
        if state.get("panic"):
            return DeviceStatus(
                "absent", f"the emulated kernel has panicked: {state['panic']}", "reboot it cold"
            )
        return DeviceStatus(
            "disabled",
            "the emulated kernel was booted without live update",
            "put liveupdate=on kho=on on the command line of the next kernel",
        )

    def is_session(self, fd: int) -> bool:
        """Look at who made the other end of the socket: a session's is the emulator's own. A device file answers as one that is none."""
        with wire.connect(self._directory, wire.CONTROL_SOCKET, socket.SOCK_STREAM) as control:
            kernel = _peer(control.fileno())
        return kernel is not None and _peer(fd) == kernel

    def describe(self) -> str:
        """Name the socket that stands for the device."""
        return str(self._directory / wire.DEVICE_SOCKET)

    def _control(self) -> Control:
        return Control(self._directory)


def _peer(fd: int) -> tuple[int, ...] | None:
    """Return the credentials of the other end of a socket; None for what is no socket."""
    copy = os.dup(fd)
    try:
        sock = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    with sock:
        try:
            data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, wire.CREDENTIALS.size)
        except OSError:
            return None
        return wire.CREDENTIALS.unpack(data)


def _send(fd: int, data: bytes, rights: list[int]) -> None:
    try:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        try:
            wire.send_with_fds(channel, data, rights)
        finally:
            channel.detach()
    except OSError as error:
        raise _error(_sending_error(error)) from error


def _argument_fd(request: int, buf: bytearray) -> int | None:
    """Return the fd in the argument of PRESERVE_FD if it is open in this process, else None."""
    if request != abi.PRESERVE_FD or len(buf) < abi.FD_OFFSET + 4:
        return None
    fd = int(struct.unpack_from("<i", buf, abi.FD_OFFSET)[0])
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except (OSError, ValueError):
        return None
    return fd


def _sending_error(error: OSError) -> int:
    if error.errno in {errno.ENOTSOCK, errno.EPROTOTYPE, errno.EOPNOTSUPP, errno.EDESTADDRREQ}:
        return errno.ENOTTY
    return errno.ENODEV if error.errno in _GONE else (error.errno or errno.EIO)


def _take_answer(answer: bytes, fds: list[int], buf: bytearray) -> None:
    if len(answer) < wire.REPLY.size:
        raise _error(errno.ENODEV)
    code, has_fd = wire.REPLY.unpack_from(answer)
    if code:
        raise _error(code)
    body = answer[wire.REPLY.size :]
    buf[: len(body)] = body
    if has_fd:
        if len(fds) != 1:
            raise _error(
                errno.EMFILE
            )  # another thread took the last free slot: the kernel reserves it beforehand
        struct.pack_into("<i", buf, abi.FD_OFFSET, fds[0])
