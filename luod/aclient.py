# SPDX-License-Identifier: Apache-2.0
"""The asynchronous client of luod, over anyio.

    async with await AsyncClient.connect("/run/luod/liveupdate.sock") as luod:
        await luod.hello()
        await luod.subscribe("vm1")
        event = await luod.next_event()

Tasks of one event loop may share a client: each call gets its own reply, an event goes to exactly one of those who wait for it. It may not
be used from other threads. A cancelled call leaves the connection usable, unless its request was sent in part: then it is closed.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

import anyio

from . import fdpass, wire
from .client import attempt, pauses, worth_retrying
from .conversation import (
    ClientError,
    ConnectionLost,
    Conversation,
    Event,
    Reply,
    Timeout,
    TransportError,
    Unreachable,
)
from .verbs import Verbs

T = TypeVar("T")


class AsyncClient(Verbs[Coroutine[Any, Any, Reply]]):
    """A connection to luod. Close it, or use it as an asynchronous context manager."""

    def __init__(self, sock: socket.socket, *, timeout: float = 30.0) -> None:
        """Take over a connected socket. `timeout` (seconds) is what a call may take, `math.inf` for ever."""
        sock.setblocking(False)
        self._sock = sock
        self._timeout = timeout
        self._conversation = Conversation()
        self._sending = anyio.Lock()
        self._reading = False
        self._changed = anyio.Event()
        self._closed = False

    @classmethod
    async def connect(
        cls, path: str | PathLike[str], timeout: float = 30.0, *, retry_until: float | None = None
    ) -> AsyncClient:
        """Connect to the socket of luod, as `Client.connect` does. Raises `Unreachable`."""
        name = os.fspath(path)
        busy_until = time.monotonic() + timeout
        for pause in pauses():
            try:
                return cls(attempt(name), timeout=timeout)
            except Unreachable as error:
                now = time.monotonic()
                if not worth_retrying(error, now, busy_until, retry_until):
                    raise
                await anyio.sleep(min(pause, max(0.0, (retry_until or busy_until) - now)))
        raise AssertionError("pauses never end")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the client was closed, by its user or because a request could only be sent in part."""
        return self._closed

    async def call(
        self, cmd: str, fds: Sequence[int] = (), *, timeout: float | None = None, **fields: object
    ) -> Reply:
        """Send a command with copies of `fds` and wait for its reply; see `Verbs.call`.

        Raises `ClientError` when luod refuses, `ConnectionLost`, `Timeout`, `wire.ProtocolError` for a message too long to send, and
        OSError for fds that cannot be sent.
        """
        seq, line = self._conversation.request(cmd, fds, fields)
        try:
            with anyio.move_on_after(self._timeout if timeout is None else timeout):
                await self._send(line, fds)
                return await self._wait(lambda: self._conversation.reply(seq))
        finally:
            self._conversation.give_up(seq)
        raise Timeout(f"the reply to {cmd} did not come in time", hint="see `luoctl status`")

    async def next_event(self, timeout: float | None = None, *, names: Collection[str] = ()) -> Event:
        """Wait for the next event, of those `names` if any are given; others stay for later.

        `timeout` in seconds, None waits for ever, 0 takes only what has been received. Raises `ConnectionLost` and `Timeout`.
        """
        if (event := self._conversation.event(names)) is not None:
            return event
        with anyio.move_on_after(math.inf if timeout is None else timeout):
            return await self._wait(lambda: self._conversation.event(names))
        what = f"an event {' or '.join(names)}" if names else "an event"
        raise Timeout(f"{what} did not come in time", hint="see `luoctl status`")

    def close(self) -> None:
        """End the connection and close every fd that was not taken. Whoever waits gets `ConnectionLost`."""
        if not self._closed:
            self._closed = True
            self._conversation.close()
            anyio.notify_closing(self._sock)
            self._sock.close()
            self._wake()

    # -- the socket

    async def _send(self, line: bytes, fds: Sequence[int]) -> None:
        async with self._sending:
            sent = 0
            try:
                while sent < len(line):
                    self._conversation.check()
                    try:
                        sent += fdpass.send(self._sock, line[sent:], fds if sent == 0 else ())
                    except BlockingIOError:
                        await anyio.wait_writable(self._sock)
            except (BrokenPipeError, ConnectionResetError):
                return  # what luod said before it hung up is worth more than EPIPE: the reader finds it
            except anyio.ClosedResourceError:
                self._conversation.check()
            finally:
                if 0 < sent < len(line):
                    self.close()  # luod has half a line; nothing can follow it

    async def _wait(self, ready: Callable[[], T | None]) -> T:
        """Return what `ready` gives; of all the tasks that wait, one reads for all."""
        while (found := ready()) is None:
            self._conversation.check()
            if self._reading:
                await self._changed.wait()
                continue
            self._reading = True
            try:
                await self._read()
            finally:
                self._reading = False
                self._wake()
        return found

    async def _read(self) -> None:
        """Receive once; nothing can be cancelled between receiving and taking in, so no fd gets lost."""
        try:
            await anyio.wait_readable(self._sock)
            data, fds = fdpass.receive(self._sock)
        except (BlockingIOError, anyio.ClosedResourceError):
            return
        except OSError as error:
            self._conversation.lose(f"the connection failed: {error.strerror or error}")
            return
        except wire.ProtocolError as error:
            self._conversation.lose(f"the connection failed: {error.message}")
            return
        self._conversation.feed(data, fds)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


__all__ = [
    "AsyncClient", "ClientError", "ConnectionLost", "Event", "Reply", "Timeout", "TransportError", "Unreachable",
]  # fmt: skip
