# SPDX-License-Identifier: Apache-2.0
"""File descriptors over Unix sockets: sent with bytes, received close-on-exec, never lost in silence.

`socket.recv_fds` and its kin give inheritable fds and drop what does not fit without a word; here every receive asks for as many as the
kernel can send in one message (SCM_MAX_FD, include/net/scm.h) and a truncated control message is an error.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

from .wire import Decoder, Frame, ProtocolError

SCM_MAX_FD = 253
_INT = array.array("i").itemsize
_SPACE = socket.CMSG_SPACE(SCM_MAX_FD * _INT)


class FdsTruncated(OSError):
    """The kernel had more fds than this process could take; what arrived of them has been closed."""


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> int:
    """Send bytes and, with their first byte, fds; return how many bytes were taken. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def send_all(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send all bytes on a blocking socket; the fds go with the first byte. Raises OSError."""
    sent = send(sock, data, fds)
    while sent < len(data):
        sent += send(sock, data[sent:])


def receive(sock: socket.socket, size: int = 65536) -> tuple[bytes, list[int]]:
    """Receive bytes and the fds that came with them, which the caller then owns. Empty bytes mean the end.

    Raises `FdsTruncated` when fds were dropped by the kernel, and OSError otherwise. The bytes are lost then: who must not lose them
    uses `receive_frames`.
    """
    data, fds, truncated = _receive(sock, size)
    if truncated:
        _close(fds)
        raise FdsTruncated("fds were lost in a truncated control message")
    return data, fds


def receive_frames(
    sock: socket.socket, decoder: Decoder, size: int = 65536
) -> list[Frame | ProtocolError] | None:
    """Receive once and decode; None at the end. Raises OSError.

    Fds that the kernel dropped cost the message that names them, and no other.
    """
    data, fds, truncated = _receive(sock, size)
    if truncated:
        _close(fds)
        fds = []
    if not data:
        _close(fds)
        return None
    return decoder.feed(data, fds, truncated=truncated)


def _receive(sock: socket.socket, size: int) -> tuple[bytes, list[int], bool]:
    data, ancillary, flags, _ = sock.recvmsg(size, _SPACE, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _INT])
    return data, list(fds), bool(flags & socket.MSG_CTRUNC)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
