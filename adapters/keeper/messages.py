# SPDX-License-Identifier: Apache-2.0
"""What goes over the keeper's two sockets.

`keeper.sock`: requests and answers, each a JSON object in one SOCK_SEQPACKET message with at most a few fds.
`keeper.notify`: sd_notify(3) datagrams for the fd store, as systemd's service manager takes them.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

REQUEST_SIZE = 4096
ANSWER_SIZE = 65536
PAGE_BYTES = 60000
"""How much of an answer may be names: it must fit in one message, and in the buffer of a socket."""
NAME_MAX = 255
SCM_MAX_FD = 253
_INT = array.array("i").itemsize


class Received(NamedTuple):
    """Bytes, the fds that came with them (close-on-exec, the caller's), and whether the kernel dropped some of either."""

    data: bytes
    fds: list[int]
    cut: bool


def take(sock: socket.socket, size: int, fds: int = SCM_MAX_FD) -> Received:
    """Receive one message with at most so many fds. Raises OSError."""
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(fds * _INT), socket.MSG_CMSG_CLOEXEC)
    came = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            came.frombytes(payload[: len(payload) - len(payload) % _INT])
    return Received(data, list(came), bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)))


def let_go(fds: Sequence[int]) -> None:
    """Close fds."""
    for fd in fds:
        os.close(fd)


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message, separators=(",", ":")).encode()], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, size: int) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message and its fds; None at the end. Raises OSError, and ValueError for what is no message."""
    data, fds, cut = take(sock, size)
    try:
        if not data:
            let_go(fds)
            return None, []
        if cut:
            raise ValueError("a message was truncated, or this process is out of file descriptors")
        message: Any = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("a message is no object")
    except (ValueError, RecursionError) as error:
        let_go(fds)
        raise ValueError(str(error)) from None
    return cast("dict[str, Any]", message), fds


class Notice(NamedTuple):
    """What a datagram asks of the fd store."""

    store: bool
    remove: bool
    name: str
    watched: bool


def notice(data: bytes) -> Notice:
    """Read an sd_notify datagram: lines of KEY=VALUE, of which only those of the fd store count.

    A name that systemd would not take (over 255 characters, a colon, a control character) becomes "stored", as there.
    """
    fields = dict(line.split("=", 1) for line in data.decode(errors="replace").split("\n") if "=" in line)
    name = fields.get("FDNAME", "stored")
    if not fit_name(name):
        name = "stored"
    return Notice(
        store=fields.get("FDSTORE") == "1",
        remove=fields.get("FDSTOREREMOVE") == "1",
        name=name,
        watched=fields.get("FDPOLL") != "0",
    )


def fit_name(name: object) -> bool:
    """Say whether the store takes a name: 1 to 255 printable ASCII characters without a colon (fdname_is_valid of systemd)."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= NAME_MAX
        and name.isascii()
        and name.isprintable()
        and ":" not in name
    )
