# SPDX-License-Identifier: Apache-2.0
"""The synchronous client of luod.

    with Client.connect("/run/luod/liveupdate.sock") as luod:
        luod.hello(["freeze", "inventory"])
        luod.subscribe("vm1")
        with luod.next_event(names=["START_PRESERVATION"]) as start:
            session = start.take_fd()

Threads may share a client: calls and `next_event` can wait at the same time, each gets its own answer, and an event goes to exactly one
of those who wait for it. `close` may be called from any thread and wakes the others. A client does not survive fork(2): the child must
connect for itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

from . import fdpass, wire
from .conversation import (
    ClientError,
    ConnectionLost,
    Conversation,
    Event,
    Reply,
    Timeout,
    TransportError,
    Unreachable,
    unreachable,
)
from .verbs import Verbs

T = TypeVar("T")
FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.5


def pauses() -> Iterator[float]:
    """Return how long to wait between attempts to connect, in seconds: doubling, up to half a second."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(pause * 2, LONGEST_PAUSE_S)


def attempt(path: str) -> socket.socket:
    """Connect once, without waiting. Raises `Unreachable`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except (OSError, ValueError) as error:
        sock.close()
        raise unreachable(path, error if isinstance(error, OSError) else OSError(str(error))) from None
    return sock


def worth_retrying(error: Unreachable, now: float, busy_until: float, retry_until: float | None) -> bool:
    """Say whether another attempt makes sense at the monotonic time `now`."""
    if error.why == "invalid":
        return False
    return now < (-math.inf if retry_until is None else retry_until) or (
        error.why == "busy" and now < busy_until
    )


class Client(Verbs[Reply]):
    """A connection to luod. Close it, or use it as a context manager."""

    def __init__(self, sock: socket.socket, *, timeout: float = 30.0) -> None:
        """Take over a connected socket. `timeout` (seconds) is what a call may take, `math.inf` for ever."""
        sock.setblocking(False)
        self._sock = sock
        self._timeout = timeout
        self._conversation = Conversation()
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._reading = False
        self._users = 0
        self._closed = False

    @classmethod
    def connect(
        cls, path: str | PathLike[str], timeout: float = 30.0, *, retry_until: float | None = None
    ) -> Client:
        """Connect to the socket of luod.

        `timeout` (seconds) is what a call may take. With `retry_until` (a `time.monotonic()` time) a socket that is missing, refuses or
        is denied is tried again until then, which is how a client waits for luod after a restart or a reboot. Raises `Unreachable`.
        """
        name = os.fspath(path)
        busy_until = time.monotonic() + timeout
        for pause in pauses():
            try:
                return cls(attempt(name), timeout=timeout)
            except Unreachable as error:
                now = time.monotonic()
                if not worth_retrying(error, now, busy_until, retry_until):
                    raise
                time.sleep(min(pause, max(0.0, (retry_until or busy_until) - now)))
        raise AssertionError("pauses never end")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the client was closed, by its user or because a request could only be sent in part."""
        return self._closed

    def call(
        self, cmd: str, fds: Sequence[int] = (), *, timeout: float | None = None, **fields: object
    ) -> Reply:
        """Send a command with copies of `fds` and wait for its reply; see `Verbs.call`.

        Raises `ClientError` when luod refuses, `ConnectionLost`, `Timeout`, `wire.ProtocolError` for a message too long to send, and
        OSError for fds that cannot be sent.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        with self._changed:
            seq, line = self._conversation.request(cmd, fds, fields)
        try:
            self._send(line, fds, deadline, cmd)
            return self._wait(lambda: self._conversation.reply(seq), deadline, f"the reply to {cmd}")
        except BaseException:
            with self._changed:
                self._conversation.give_up(seq)
            raise

    def next_event(self, timeout: float | None = None, *, names: Collection[str] = ()) -> Event:
        """Wait for the next event, of those `names` if any are given; others stay for later.

        `timeout` in seconds, None waits for ever, 0 takes only what has arrived. Raises `ConnectionLost` and `Timeout`.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        what = f"an event {' or '.join(names)}" if names else "an event"
        return self._wait(lambda: self._conversation.event(names), deadline, what)

    def records(self, after: int = 0, stream: str | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over the records of the journal that the caller may see, page by page."""
        while page := self.journal(after, stream=stream)["records"]:
            yield from page
            after = int(page[-1]["id"])

    def close(self) -> None:
        """End the connection and close every fd that was not taken. Whoever waits gets `ConnectionLost`."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._conversation.close()
                with contextlib.suppress(OSError):  # the other end may have been first
                    self._sock.shutdown(socket.SHUT_RDWR)  # wakes who waits for the socket
                self._changed.notify_all()
            self._finish()

    def _finish(self) -> None:
        if self._closed and self._users == 0:
            self._sock.close()

    # -- the socket

    def _send(self, line: bytes, fds: Sequence[int], deadline: float, cmd: str) -> None:
        if not self._sending.acquire(timeout=_lock_wait(deadline)):
            raise Timeout(f"{cmd} could not be sent in time: other requests are still being sent")
        sent = 0
        try:
            self._enter()
        except BaseException:
            self._sending.release()
            raise
        try:
            while sent < len(line):
                try:
                    sent += fdpass.send(self._sock, line[sent:], fds if sent == 0 else ())
                except BlockingIOError:
                    if not self._ready(select.POLLOUT, deadline):
                        raise Timeout(
                            f"{cmd} could not be sent in time: luod does not read", hint="see `luoctl status`"
                        ) from None
        except (BrokenPipeError, ConnectionResetError):
            return  # what luod said before it hung up is worth more than EPIPE: the reader finds it
        finally:
            self._leave()
            self._sending.release()
            if 0 < sent < len(line):
                self.close()  # luod has half a line; nothing can follow it

    def _ready(self, event: int, deadline: float) -> bool:
        """Wait until the socket can be used; return whether it can before the deadline."""
        poll = select.poll()
        poll.register(self._sock.fileno(), event)
        left = deadline - time.monotonic()
        return bool(poll.poll(None if left == math.inf else max(0, math.ceil(left * 1000))))

    def _wait(self, ready: Callable[[], T | None], deadline: float, what: str) -> T:
        """Return what `ready` gives; of all the threads that wait, one reads for all."""
        with self._changed:
            while True:
                if (found := ready()) is not None:
                    return found
                self._conversation.check()
                if self._reading:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._changed.wait(_lock_wait(deadline)):
                        if (found := ready()) is not None:
                            return found
                        raise _timeout(what)
                    continue
                if not self._read(deadline):
                    if (found := ready()) is not None:
                        return found
                    raise _timeout(what)

    def _read(self, deadline: float) -> bool:
        """Receive once and take it in, with `_changed` held on entry and exit; return False at the deadline."""
        self._reading = True
        self._users += 1
        data, fds, failed, arrived = b"", list[int](), "", False
        self._changed.release()
        try:
            while not arrived and self._ready(select.POLLIN, deadline):
                try:
                    data, fds = fdpass.receive(self._sock)
                    arrived = True
                except BlockingIOError:
                    continue
                except OSError as error:
                    failed, arrived = error.strerror or str(error), True
                except wire.ProtocolError as error:
                    failed, arrived = error.message, True
        finally:
            self._changed.acquire()
            self._reading = False
            self._users -= 1
            if failed:
                self._conversation.lose(f"the connection failed: {failed}")
            elif arrived:
                self._conversation.feed(data, fds)
            self._changed.notify_all()
            self._finish()
        return arrived

    def _enter(self) -> None:
        with self._changed:
            if self._closed:
                self._conversation.check()
            self._users += 1

    def _leave(self) -> None:
        with self._changed:
            self._users -= 1
            self._finish()


def _lock_wait(deadline: float) -> float:
    left = deadline - time.monotonic()
    return threading.TIMEOUT_MAX if left == math.inf else max(0.0, min(left, threading.TIMEOUT_MAX))


def _timeout(what: str) -> Timeout:
    return Timeout(f"{what} did not come in time", hint="see `luoctl status`")


__all__ = [
    "Client", "ClientError", "ConnectionLost", "Event", "Reply", "Timeout", "TransportError", "Unreachable",
]  # fmt: skip
