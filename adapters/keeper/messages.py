# SPDX-License-Identifier: Apache-2.0
"""One request or answer of the keeper: a JSON object in one SOCK_SEQPACKET message, with at most a few fds."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

REQUEST_SIZE = 4096
ANSWER_SIZE = 1 << 20
_INT = array.array("i").itemsize


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, size: int) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message and its fds, close-on-exec; None at the end. Raises OSError, and ValueError for what is no message."""
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(16 * _INT), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _INT])
    if not data:
        return None, list(fds)
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("a message was truncated")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("a message is no object")
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
    return message, list(fds)
