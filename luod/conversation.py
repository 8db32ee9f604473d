# SPDX-License-Identifier: Apache-2.0
"""A client's side of the protocol without any I/O: requests get numbers, replies find their request, events queue up.

`Client` and `AsyncClient` feed it what they receive. It owns every fd that has arrived and that nobody has taken yet: fds of a reply whose
caller has given up, of a message that carries none by the protocol, and of events left unread are closed here.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, cast

from . import wire
from .states.errors import LuodError

FD_EVENTS = frozenset({"START_PRESERVATION", "SESSION"})
"""Events that carry one session fd; in the plain luo-agent protocol they do not say so."""
FD_REPLIES = frozenset({"CLAIM"})
EVENT_LIMIT = 100_000


class ClientError(LuodError):
    """Luod refused. `code` is one of docs/protocol.md, `errno` symbolic ("EBUSY") or empty."""

    def __init__(self, code: str, message: str, *, hint: str = "", errno: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.errno = errno


class TransportError(LuodError):
    """Luod could not be asked."""

    exit_code = 3


class ConnectionLost(TransportError):
    """The connection has ended; whether luod obeyed an unanswered request is not known."""


class Timeout(TransportError):
    """Luod did not answer in time; whether it obeyed is not known. The connection stays usable unless it is `closed`."""


Why = Literal["missing", "refused", "denied", "busy", "invalid"]


class Unreachable(TransportError):
    """There is no way to luod. `why`: the socket is missing, refuses (nobody listens), is denied, is busy, or cannot be one."""

    def __init__(self, path: str, why: Why, detail: str) -> None:
        super().__init__(f"luod cannot be reached at {path}: {_WHY[why][0]} ({detail})", hint=_WHY[why][1])
        self.path = path
        self.why = why


_WHY: dict[Why, tuple[str, str]] = {
    "missing": ("there is no such socket", "start luod, or name its socket"),
    "refused": ("nobody listens on the socket", "luod has ended; start it again"),
    "denied": (
        "access is denied",
        "ask for the right to open the socket, or check the directory's permissions",
    ),
    "busy": ("its queue of new connections is full", "try again"),
    "invalid": ("that cannot be luod's socket", "check the path"),
}


def unreachable(path: str, error: OSError) -> Unreachable:
    """Return what a failed connect(2) means."""
    why: Why = "invalid"
    if isinstance(error, FileNotFoundError):
        why = "missing"
    elif isinstance(error, ConnectionRefusedError):
        why = "refused"
    elif isinstance(error, PermissionError):
        why = "denied"
    elif isinstance(error, (BlockingIOError, TimeoutError)):
        why = "busy"
    return Unreachable(path, why, error.strerror or str(error))


@dataclass(eq=False)
class Message:
    """What luod sent. Owns its `fds`: take them, or close it (it is a context manager)."""

    fields: dict[str, Any]
    fds: list[int] = field(default_factory=list[int])

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or `default` when it was not sent."""
        return self.fields.get(name, default)

    def take_fd(self) -> int:
        """Return the fd of the message; from now on the caller owns it. Raises `ConnectionLost` if there is none."""
        if not self.fds:
            raise ConnectionLost("luod sent no fd with a message that must have one")
        return self.fds.pop(0)

    def close(self) -> None:
        """Close the fds that were not taken."""
        while self.fds:
            os.close(self.fds.pop())

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(eq=False)
class Reply(Message):
    """The answer to a command; `fields` without `reply` and `ok`."""


@dataclass(eq=False)
class Event(Message):
    """Something luod says by itself; `fields` without `event`."""

    name: str = ""


class Conversation:
    """The state of one connection. Not safe for threads by itself."""

    def __init__(self) -> None:
        self._decoder = wire.Decoder(implied_fds)
        self._last = 0
        self._waiting: dict[int, str] = {}
        self._replies: dict[int, Reply | ClientError] = {}
        self._events: deque[Event] = deque()
        self._lost: ConnectionLost | None = None
        self._closed = False

    # -- asking

    def request(self, cmd: str, fds: Sequence[int], fields: dict[str, object]) -> tuple[int, bytes]:
        """Return the number of a new request and its line. Fields that are None are left out.

        Raises `ConnectionLost` when the connection has ended and `wire.ProtocolError` for a line that would be too long.
        """
        self.check()
        message: dict[str, Any] = {"cmd": cmd, "seq": self._last + 1}
        message.update({key: value for key, value in fields.items() if value is not None})
        if fds:
            message["fds"] = len(fds)
        line = wire.encode(message)
        self._last += 1
        self._waiting[self._last] = cmd
        return self._last, line

    def give_up(self, seq: int) -> None:
        """Nobody waits for this reply any more; when it comes it is dropped."""
        self._waiting.pop(seq, None)
        reply = self._replies.pop(seq, None)
        if isinstance(reply, Reply):
            reply.close()

    # -- hearing

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take what was received, empty bytes for the end of the connection. Owns the fds from here on."""
        if self._closed or not data:
            for fd in fds:
                os.close(fd)
            if not data:
                self.lose("luod has ended the connection")
            return
        for frame in self._decoder.feed(data, fds):
            if isinstance(frame, wire.ProtocolError):
                self.lose(f"luod broke the protocol: {frame.message}")
            else:
                self._take(frame)

    def _take(self, frame: wire.Frame) -> None:
        obj, fds = frame
        seq, name = obj.pop("reply", None), obj.pop("event", None)
        obj.pop("fds", None)
        if isinstance(seq, int) and (cmd := self._waiting.pop(seq, None)) is not None:
            if obj.pop("ok", False) is True:
                reply = Reply(obj, fds)
                if cmd not in FD_REPLIES:
                    reply.close()
                self._replies[seq] = reply
                return
            self._replies[seq] = error_of(obj)
        elif isinstance(name, str):
            event = Event(obj, fds, name)
            if name not in FD_EVENTS:
                event.close()
            self._events.append(event)
            if len(self._events) > EVENT_LIMIT:
                self.lose(f"{EVENT_LIMIT} events were left unread")
            return
        for fd in fds:
            os.close(fd)

    def lose(self, why: str) -> None:
        """The connection has ended; what has arrived already can still be taken."""
        if self._lost is None:
            last = self._events[-1] if self._events and self._events[-1].name == "ERROR" else None
            reason = error_of(last.fields) if last is not None else None
            self._lost = ConnectionLost(
                f"{why}: {reason.message}" if reason else why,
                hint=(reason.hint if reason else "")
                or "connect again; SUBSCRIBE or CLAIM takes a session up again",
            )
            self._decoder.close()

    def check(self) -> None:
        """Raise `ConnectionLost` when the connection has ended."""
        if self._lost is not None:
            raise ConnectionLost(self._lost.message, hint=self._lost.hint)

    def reply(self, seq: int) -> Reply | None:
        """Return the reply of a request, None when it has not come. Raises `ClientError`, or `ConnectionLost` if it never will."""
        found = self._replies.pop(seq, None)
        if isinstance(found, ClientError):
            raise found
        if found is None:
            self.check()
        return found

    def event(self, names: Collection[str] = ()) -> Event | None:
        """Return the oldest event, of those `names` if any are given, or None. Raises `ConnectionLost` if none will come."""
        for index, event in enumerate(self._events):
            if not names or event.name in names:
                del self._events[index]
                return event
        self.check()
        return None

    def close(self) -> None:
        """Let go of everything that was not taken."""
        self.lose("the connection was closed")
        self._closed = True
        self._decoder.close()
        for reply in self._replies.values():
            if isinstance(reply, Reply):
                reply.close()
        for event in self._events:
            event.close()
        self._replies.clear()
        self._events.clear()
        self._waiting.clear()


def implied_fds(obj: dict[str, Any]) -> int:
    """Say how many fds a message of the plain luo-agent protocol takes, which has no `fds` field."""
    return 1 if obj.get("event") in FD_EVENTS else 0


def error_of(fields: dict[str, Any]) -> ClientError:
    """Return the error of a refusal or of an ERROR event, whatever it lacks."""
    error: Any = fields.get("error")
    body = cast("dict[str, Any]", error if isinstance(error, dict) else {})
    return ClientError(
        str(body.get("code") or "UNKNOWN"),
        str(body.get("message") or "luod refused without saying why"),
        hint=str(body.get("hint") or ""),
        errno=str(body.get("errno") or ""),
    )
