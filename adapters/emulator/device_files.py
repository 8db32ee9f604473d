# SPDX-License-Identifier: Apache-2.0
"""The seam of device files on the emulator: `DeviceFiles` spoken to an emulator process instead of a kernel."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ..chardev import NO_POINTERS
from . import wire
from .control import Control
from .device_calls import DEVICES_SOCKET, CallReply, CallRequest, encode

_decode = msgspec.msgpack.Decoder(CallReply).decode
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class EmulatedDeviceFiles:
    """The device files of an emulated machine, for a process of its world: a caller ends with the machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, path: str) -> int:
        """Have the emulator open a device node."""
        try:
            with wire.connect(self._directory, DEVICES_SOCKET, socket.SOCK_SEQPACKET) as sock:
                sock.send(path.encode())
                answer, fds, _ = wire.receive(sock)
        except ConnectionError as error:
            raise _error(errno.ENXIO) from error
        _check(answer)
        if len(fds) != 1:
            raise _error(errno.EMFILE)
        return fds[0]

    def ioctl(
        self,
        fd: int,
        request: int,
        argument: bytearray | int = 0,
        *,
        fds: Sequence[int] = (),
        pointers: Mapping[int, bytearray] = NO_POINTERS,
    ) -> int:
        """Send the struct, the files that it names and the memory it points to, and take back what the kernel wrote."""
        data = b"" if isinstance(argument, int) else bytes(argument)
        named = [at for at in fds if _is_open(int(struct.unpack_from("<i", data, at)[0]))]
        call = CallRequest(
            "ioctl", request, data, named, {at: bytes(memory) for at, memory in pointers.items()}
        )
        files = [int(struct.unpack_from("<i", data, at)[0]) for at in named]
        reply = self._call(fd, call, files, argument if isinstance(argument, bytearray) else None)
        for at, memory in pointers.items():
            memory[:] = reply.pointers.get(at, bytes(memory))
        return reply.result

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Read from a device file."""
        return self._call(fd, CallRequest("pread", offset=offset, length=length)).argument

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write to a device file."""
        return self._call(fd, CallRequest("pwrite", argument=bytes(data), offset=offset)).result

    def mmap(self, fd: int, length: int, offset: int) -> mmap.mmap:
        """Refuse: no region of an emulated device can be mapped, and none says that it can."""
        raise _error(errno.EINVAL)

    def speaks_proposed(self) -> bool:
        """Ask whether the running kernel has the plug-ins of `passthrough`."""
        try:
            with Control(self._directory) as control:
                return control.speaks_proposed()
        except ConnectionError as error:
            raise _error(errno.ENXIO) from error

    def _call(
        self, fd: int, call: CallRequest, files: Sequence[int] = (), argument: bytearray | None = None
    ) -> CallReply:
        os.fstat(fd)  # EBADF must mean the fd of the call, never one in the argument
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                body = encode(call)
                head = wire.REQUEST.pack(wire.MAGIC, call.request, len(files), len(body))
                _send(fd, head + body, [theirs.fileno(), *files])
            try:
                answer, fds, _ = wire.receive(ours)
            except ConnectionError:
                answer, fds = b"", []
        for given in fds:
            os.close(given)
        if argument is not None and len(answer) > wire.REPLY.size:
            # What was written before a refusal is seen, as in the kernel.
            argument[:] = _decode(answer[wire.REPLY.size :]).argument
        _check(answer)
        return _decode(answer[wire.REPLY.size :])


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except (OSError, ValueError):
        return False
    return True


def _check(answer: bytes) -> None:
    if len(answer) < wire.REPLY.size:
        raise _error(errno.ENODEV)
    code = wire.REPLY.unpack_from(answer)[0]
    if code:
        raise _error(code)


def _send(fd: int, data: bytes, rights: list[int]) -> None:
    try:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        try:
            wire.send_with_fds(channel, data, rights)
        finally:
            channel.detach()
    except OSError as error:
        if error.errno in {errno.ENOTSOCK, errno.EPROTOTYPE, errno.EOPNOTSUPP, errno.EDESTADDRREQ}:
            raise _error(errno.ENOTTY) from error
        raise _error(errno.ENODEV if error.errno in _GONE else (error.errno or errno.EIO)) from error
