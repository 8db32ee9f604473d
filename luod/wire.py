# SPDX-License-Identifier: Apache-2.0
"""The wire format, without any I/O: lines of JSON in, messages out, and the fds that belong to them.

One JSON object a line, at most `MAX_LINE` bytes with its newline, at most `MAX_DEPTH` levels deep; of equal keys the last one counts. On
a stream socket fds arrive with some bytes, not with a message: a message that says `"fds": n` takes the next n of those that came with
its own bytes, from its first to its newline, and never one that came before or after. What no message takes is closed.

A bad line costs itself and nothing else: it becomes a `ProtocolError` in the list, in its place among the good ones.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import msgspec

from .states.errors import LuodError

MAX_LINE = 65536
MAX_DEPTH = 16
MAX_FDS = 253
MAX_SEQ = (1 << 53) - 1
"""The largest request number: what every JSON reader keeps exactly."""

_encoder = msgspec.json.Encoder()
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_BRACKET = re.compile(r"[\[{\]}]")


class ProtocolError(LuodError):
    """The other end broke the wire format; `code` is stable and listed in docs/protocol.md.

    `seq` is the number of the request at fault, where the line could be read that far.
    """

    def __init__(self, code: str, message: str, *, hint: str = "", seq: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.seq = seq


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

    `implied` may say how many fds a message without an `fds` field takes; the plain luo-agent protocol needs that. The decoder owns the
    fds it is fed until a frame takes them; `close` lets go of the rest.
    """

    def __init__(self, implied: Callable[[dict[str, Any]], int] | None = None) -> None:
        self._buffer = bytearray()
        self._skipping = False
        self._implied = implied
        self._fds: deque[tuple[int, int]] = deque()  # (the feed it came with, the fd)
        self._feeds = 0
        self._began = 0  # the feed that brought the first byte of the line being read
        self._cut = -1  # the last feed that the kernel dropped fds from

    def feed(
        self, data: bytes, fds: Sequence[int] = (), *, truncated: bool = False
    ) -> list[Frame | ProtocolError]:
        """Take bytes and fds; return the messages and faults that they complete, in order.

        `truncated` says that the kernel dropped fds which should have come along (MSG_CTRUNC).
        """
        out: list[Frame | ProtocolError] = []
        self._feeds += 1
        if truncated:
            self._cut = self._feeds
        self._fds.extend((self._feeds, fd) for fd in fds)
        if len(self._fds) > MAX_FDS:
            out.append(
                ProtocolError(
                    "TOO_MANY_FDS", f"{len(self._fds)} fds wait for a message", hint="send fewer at once"
                )
            )
            self._drop(self._feeds)
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            if not self._skipping:
                self._take(data[start:end], out)
            if not self._skipping and self._buffer.strip():
                out.append(self._line(bytes(self._buffer)))
            self._skipping = False
            self._buffer.clear()
            start = end + 1
        if not self._skipping and start < len(data):
            self._take(data[start:], out)
        pending = bool(self._buffer) and not self._skipping
        self._drop(self._began - 1 if pending else self._feeds)
        return out

    def _take(self, part: bytes, out: list[Frame | ProtocolError]) -> None:
        """Add to the line being read; one that grows too long is reported and skipped."""
        if not self._buffer:
            self._began = self._feeds
        if len(self._buffer) + len(part) < MAX_LINE:
            self._buffer += part
            return
        out.append(
            ProtocolError(
                "LINE_TOO_LONG", f"a line is longer than {MAX_LINE} bytes",
                hint="it was dropped; the next line is read",
            )
        )  # fmt: skip
        self._skipping = True
        self._buffer.clear()

    def _line(self, line: bytes) -> Frame | ProtocolError:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            return ProtocolError("BAD_UTF8", f"a line is not UTF-8 at byte {error.start}")
        if _too_deep(text):
            return ProtocolError("TOO_DEEP", f"a message is nested deeper than {MAX_DEPTH} levels")
        try:
            obj: Any = msgspec.json.decode(text)
        except (ValueError, RecursionError) as error:
            return ProtocolError("BAD_JSON", f"a line is not JSON: {error}", hint="one JSON object a line")
        if not isinstance(obj, dict):
            return ProtocolError("NOT_OBJECT", f"a line holds a {type(obj).__name__}, not an object")
        return self._frame(cast("dict[str, Any]", obj))

    def _frame(self, obj: dict[str, Any]) -> Frame | ProtocolError:
        seq = obj.get("seq")
        if seq is not None and not _is_number(seq, MAX_SEQ):
            return ProtocolError("BAD_SEQ", f"seq must be a number from 0 to {MAX_SEQ}")
        wanted: Any = obj.get("fds", self._implied(obj) if self._implied else 0)
        if not _is_number(wanted, MAX_FDS):
            return ProtocolError("BAD_FDS", f"fds must be a number from 0 to {MAX_FDS}", seq=seq)
        self._drop(self._began - 1)
        if wanted <= len(self._fds):
            return Frame(obj, [self._fds.popleft()[1] for _ in range(wanted)])
        came = len(self._fds)
        if self._cut >= self._began:
            return ProtocolError(
                "FDS_TRUNCATED", f"of {wanted} fds only {came} could be received",
                hint="the receiver is out of file descriptors: raise its RLIMIT_NOFILE", seq=seq,
            )  # fmt: skip
        return ProtocolError(
            "FDS_MISSING", f"a message names {wanted} fds and {came} came",
            hint="send the fds by SCM_RIGHTS with the bytes of their message", seq=seq,
        )  # fmt: skip

    def _drop(self, until: int) -> None:
        """Close the fds that came with a feed up to `until`."""
        while self._fds and self._fds[0][0] <= until:
            os.close(self._fds.popleft()[1])

    def close(self) -> None:
        """Close the fds that no message has taken, and forget the line being read."""
        self._drop(self._feeds)
        self._buffer.clear()


def _is_number(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _too_deep(text: str) -> bool:
    """Say whether brackets nest too deep, those inside strings left out. Cheap for the messages that are not meant as an attack."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if match[0] in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False
