# SPDX-License-Identifier: Apache-2.0
"""QMP without I/O: bytes in, messages out.

QMP is one JSON object a line (docs/interop/qmp-spec.rst in QEMU's tree). The server greets, the client negotiates capabilities, and
from then on requests with ids are answered by a return or an error with that id, in between of which events come.

The package `qemu.qmp` speaks the same and is what this codec is tested against. It is not used to drive a QEMU because it sends a
descriptor in a message of its own, apart from the command that needs it (`send_fd_scm`). QEMU hands a command the descriptor that came
with it or last before it, so two threads that each pass one would get each other's. Here who sends has the bytes of one request in
hand and can put the descriptors on them.
"""

from __future__ import annotations

import itertools
import json
from typing import Any, cast

import msgspec

from .errors import QmpGarbled

MAX_LINE = 16 << 20
"""The longest line taken, in bytes. `query-qmp-schema`, the longest answer there is, has 0.3 MB."""


class Greeting(msgspec.Struct, frozen=True):
    """The first message: QEMU's version as text ("10.0.2"), its packager's words, and the QMP capabilities it offers."""

    version: str
    package: str
    capabilities: tuple[str, ...]


class Return(msgspec.Struct, frozen=True):
    """A request succeeded: its id and what it returned."""

    id: str
    value: Any


class Failure(msgspec.Struct, frozen=True):
    """A request failed: its id, the class of the error ("GenericError") and its description."""

    id: str
    error_class: str
    desc: str


class Event(msgspec.Struct, frozen=True):
    """Something happened: the event's name, its data and when, in seconds since the epoch (0 where QEMU could not tell)."""

    name: str
    data: dict[str, Any] = {}
    at: float = 0.0


Message = Greeting | Return | Failure | Event


class Codec:
    """One conversation, seen from the client.

    `feed` takes bytes as they come and returns the messages that they complete. The first thing that is not QMP is returned as a
    `QmpGarbled` in the place of a message, as the last one: nothing after it is read.
    """

    def __init__(self, *, max_line: int = MAX_LINE) -> None:
        self.greeting: Greeting | None = None
        self.pending: set[str] = set()
        self._rest = bytearray()
        self._seen = 0
        self._max = max_line
        self._numbers = itertools.count(1)
        self._garbled = False

    def request(self, command: str, arguments: dict[str, Any] | None = None) -> tuple[str, bytes]:
        """Return a new id and the line that asks for `command`. Raises TypeError for arguments that JSON cannot carry."""
        number = f"luod-{next(self._numbers)}"
        body: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            body["arguments"] = arguments
        line = json.dumps(body, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self.pending.add(number)
        return number, line

    def negotiate(self) -> tuple[str, bytes]:
        """Return the request that ends the negotiation; no capability is asked for."""
        return self.request("qmp_capabilities")

    def feed(self, data: bytes) -> list[Message | QmpGarbled]:
        """Take bytes; return what they complete, in order."""
        if self._garbled:
            return []
        found: list[Message | QmpGarbled] = []
        self._rest += data
        try:
            while (end := self._rest.find(b"\n", self._seen)) >= 0:
                line = bytes(self._rest[:end])
                del self._rest[: end + 1]
                self._seen = 0
                self._check_length(len(line))
                message = self._message(line)
                if message is not None:
                    found.append(message)
            self._seen = len(self._rest)
            self._check_length(self._seen)
        except QmpGarbled as error:
            found.append(error)
            self._garbled = True
            self._rest.clear()
        return found

    def _check_length(self, length: int) -> None:
        if length > self._max:
            raise QmpGarbled(f"the monitor sent a line of more than {self._max} bytes", hint=_NOT_QMP)

    def _message(self, line: bytes) -> Message | None:
        try:
            body = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QmpGarbled(f"the monitor sent no JSON: {error}: {line[:80]!r}", hint=_NOT_QMP) from None
        if not isinstance(body, dict):
            raise _odd("something that is no object", line)
        fields = cast("dict[str, Any]", body)
        if self.greeting is None:
            self.greeting = _greeting(fields, line)
            return self.greeting
        if "event" in fields:
            return _event(fields, line)
        return self._answer(fields, line)

    def _answer(self, fields: dict[str, Any], line: bytes) -> Message | None:
        number = fields.get("id")
        if "id" not in fields and "error" in fields:
            # QEMU answers so when it could not even parse what it was sent: whose answer it is, is lost.
            raise _odd("an error that belongs to no request", line)
        if not isinstance(number, str) or number not in self.pending:
            return None  # "Clients should drop all the responses that have an unknown id field"
        self.pending.discard(number)
        if "error" in fields:
            error = fields["error"]
            match error:
                case {"class": str(error_class), "desc": str(desc)}:
                    return Failure(number, error_class, desc)
                case _:
                    raise _odd("an error without class and desc", line)
        if "return" not in fields:
            raise _odd("an answer with neither return nor error", line)
        return Return(number, fields["return"])


_NOT_QMP = "is the socket the one of `-qmp unix:PATH,server=on,wait=off`?"


def _odd(what: str, line: bytes) -> QmpGarbled:
    return QmpGarbled(f"the monitor sent {what}: {line[:200]!r}", hint=_NOT_QMP)


class _Offer(msgspec.Struct):
    version: dict[str, Any]
    capabilities: list[Any]


class _Hello(msgspec.Struct):
    QMP: _Offer


def _greeting(fields: dict[str, Any], line: bytes) -> Greeting:
    try:
        offer = msgspec.convert(fields, _Hello).QMP
    except msgspec.ValidationError:
        raise _odd("something else than a greeting", line) from None
    return Greeting(
        _version(offer.version), str(offer.version.get("package", "")), tuple(map(str, offer.capabilities))
    )


def _version(version: dict[str, Any]) -> str:
    match version:
        case {"qemu": {"major": int(major), "minor": int(minor), "micro": int(micro)}}:
            return f"{major}.{minor}.{micro}"
        case _:
            return ""


def _event(fields: dict[str, Any], line: bytes) -> Event:
    name, data, stamp = fields["event"], fields.get("data", {}), fields.get("timestamp")
    if not isinstance(name, str) or not isinstance(data, dict):
        raise _odd("an event without a name or with strange data", line)
    match stamp:
        case {"seconds": int(seconds), "microseconds": int(micros)} if seconds >= 0:
            at = seconds + micros / 1e6
        case _:
            at = 0.0  # the specification has -1 for a clock that could not be read
    return Event(name, cast("dict[str, Any]", data), at)
