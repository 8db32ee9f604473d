# SPDX-License-Identifier: Apache-2.0
"""One connection: bytes and fds in, lines and fds out, and who is at the other end.

Sending never waits for the other end: what does not fit into the socket is kept, in order, with its fds, up to a limit at which a
peer that does not read is cut off. A fd is duplicated when it is queued, so the caller keeps its own.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio

from .. import fdpass, wire
from ..engine.errors import EffectFailed
from .peers import Peer


class Connection:
    """A client, an observer or an admin on the socket."""

    def __init__(self, sock: socket.socket, outbox_limit: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.peer = Peer.of(sock)
        self.decoder = wire.Decoder()
        self.features: frozenset[str] = frozenset()
        self.hello = False
        self.clients: list[str] = []
        self.watching = False
        self.since = 0.0
        self.closed = False
        self.on_close: list[Callable[[], None]] = []
        self._limit = outbox_limit
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        self._pending = 0
        self._more = anyio.Event()

    def send(self, message: dict[str, Any], fd: int | None = None) -> None:
        """Queue a message, with a copy of `fd`. Raises `EffectFailed` when the connection has ended."""
        if self.closed:
            raise EffectFailed("the client has disconnected", errno="EPIPE")
        data = wire.encode(message)
        self._outbox.append((data, [os.dup(fd)] if fd is not None else []))
        self._pending += len(data)
        self._flush()
        if self._pending > self._limit:
            self.close()
            raise EffectFailed("the client does not read; it was cut off", errno="EPIPE")
        if self._outbox:
            self._more.set()

    def push(self, message: dict[str, Any]) -> None:
        """Queue a message for a peer whose end is its own affair."""
        with suppress(EffectFailed):
            self.send(message)

    def _flush(self) -> None:
        while self._outbox:
            data, fds = self._outbox[0]
            try:
                sent = fdpass.send(self.sock, data, fds)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            for fd in fds:
                os.close(fd)
            self._pending -= sent
            if sent < len(data):
                self._outbox[0] = (data[sent:], [])
                return
            self._outbox.popleft()

    async def pump(self) -> None:
        """Send what is queued whenever the socket takes more; ends with the connection."""
        while not self.closed:
            if not self._outbox:
                self._more = anyio.Event()
                await self._more.wait()
                continue
            try:
                await anyio.wait_writable(self.sock)
            except (OSError, anyio.ClosedResourceError):
                break
            self._flush()

    async def receive(self) -> list[wire.Frame | wire.ProtocolError] | None:
        """Wait for bytes; return the messages and the faults that they complete, or None at the end."""
        while not self.closed:
            try:
                await anyio.wait_readable(self.sock)
                return fdpass.receive_frames(self.sock, self.decoder)
            except BlockingIOError:
                continue
            except (OSError, anyio.ClosedResourceError):
                return None
        return None

    def close(self) -> None:
        """End the connection and let go of everything it owns, except the pidfd of the peer."""
        if self.closed:
            return
        self.closed = True
        for _, fds in self._outbox:
            for fd in fds:
                os.close(fd)
        self._outbox.clear()
        self.decoder.close()
        anyio.notify_closing(self.sock)
        self.sock.close()
        self._more.set()
        for callback in self.on_close:
            callback()
        self.on_close.clear()
