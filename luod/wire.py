# SPDX-License-Identifier: Apache-2.0
"""The wire format, without any I/O: lines of JSON in, messages out, and the fds that belong to them.

One JSON object a line, at most `MAX_LINE` bytes with its newline, at most `MAX_DEPTH` levels deep. On a stream socket fds arrive with
some bytes, not with a message, so they are queued: a message that says `"fds": n` takes the next n. A fd that no message of the bytes it
came with asks for is closed as soon as no unfinished line is left that could still ask.

A bad line costs itself and nothing else: it becomes a `ProtocolError` in the list, in its place among the good ones.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from .states.errors import LuodError

MAX_LINE = 65536
MAX_DEPTH = 16
MAX_FDS = 253

_encoder = msgspec.json.Encoder()


class ProtocolError(LuodError):
    """The other end broke the wire format; `code` is stable and listed in docs/protocol.md."""

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class Frame(NamedTuple):
    """One message, and the fds that it owns."""

    obj: dict[str, Any]
    fds: list[int]


def encode(obj: dict[str, Any]) -> bytes:
    """Return a message as a line. Raises `ProtocolError` when it would be longer than a line may be."""
    line = _encoder.encode(obj) + b"\n"
    if len(line) > MAX_LINE:
        raise ProtocolError(
            "LINE_TOO_LONG", f"a message of {len(line)} bytes does not fit in a line of {MAX_LINE}",
            hint="send less at once",
        )  # fmt: skip
    return line


class Decoder:
    """Turns bytes and fds, in whatever pieces they come, into messages.

    `implied` may say how many fds a message without an `fds` field takes; the plain luo-agent protocol needs that.
    """

    def __init__(self, implied: Callable[[dict[str, Any]], int] | None = None) -> None:
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._skipping = False
        self._implied = implied

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Frame | ProtocolError]:
        """Take bytes and fds; return the messages and faults that they complete, in order."""
        out: list[Frame | ProtocolError] = []
        self._fds.extend(fds)
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._buffer += data[start:end]
            start = end + 1
            if self._skipping:
                self._skipping = False
            elif len(self._buffer) >= MAX_LINE:
                out.append(self._too_long())
            elif self._buffer.strip():
                out.append(self._line(bytes(self._buffer)))
            self._buffer.clear()
        if not self._skipping:
            self._buffer += data[start:]
            if len(self._buffer) >= MAX_LINE:
                out.append(self._too_long())
                self._skipping = True
                self._buffer.clear()
        if len(self._fds) > MAX_FDS:
            out.append(
                ProtocolError(
                    "TOO_MANY_FDS", f"{len(self._fds)} fds wait for a message", hint="send one at a time"
                )
            )
            self._drop_fds()
        elif self._fds and not self._buffer and not self._skipping:
            self._drop_fds()
        return out

    def _too_long(self) -> ProtocolError:
        return ProtocolError(
            "LINE_TOO_LONG",
            f"a line is longer than {MAX_LINE} bytes",
            hint="it was dropped; the next line is read",
        )

    def _line(self, line: bytes) -> Frame | ProtocolError:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            return ProtocolError("BAD_UTF8", f"a line is not UTF-8 at byte {error.start}")
        if _depth(text) > MAX_DEPTH:
            return ProtocolError("TOO_DEEP", f"a message is nested deeper than {MAX_DEPTH} levels")
        try:
            obj = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            return ProtocolError("BAD_JSON", f"a line is not JSON: {error}", hint="one JSON object a line")
        if not isinstance(obj, dict):
            return ProtocolError("NOT_OBJECT", f"a line holds a {type(obj).__name__}, not an object")
        wanted = obj.get("fds", self._implied(obj) if self._implied else 0)
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 0 <= wanted <= MAX_FDS:
            return ProtocolError("BAD_FDS", f"fds must be a number from 0 to {MAX_FDS}")
        if wanted > len(self._fds):
            return ProtocolError(
                "FDS_MISSING", f"a message names {wanted} fds and {len(self._fds)} came",
                hint="send the fds by SCM_RIGHTS with the bytes of their message",
            )  # fmt: skip
        return Frame(obj, [self._fds.popleft() for _ in range(wanted)])

    def _drop_fds(self) -> None:
        while self._fds:
            os.close(self._fds.popleft())

    def close(self) -> None:
        """Close the fds that no message has taken."""
        self._drop_fds()
        self._buffer.clear()


def _depth(text: str) -> int:
    """Return how deep brackets nest, those inside strings left out."""
    depth = deepest = 0
    inside = escaped = False
    for char in text:
        if inside:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                inside = False
        elif char == '"':
            inside = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest
