# SPDX-License-Identifier: Apache-2.0
"""Telling whoever started a daemon that it serves."""

from __future__ import annotations

import contextlib
import os
import socket


def tell_ready(fd: int | None) -> None:
    """Write a byte to `fd` and close it, and send READY=1 to $NOTIFY_SOCKET, where they are given (sd_notify(3)).

    That nobody listens any more is no reason for a daemon to end: errors are not raised.
    """
    with contextlib.suppress(OSError):
        if fd is not None:
            os.write(fd, b"\n")
            os.close(fd)
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
