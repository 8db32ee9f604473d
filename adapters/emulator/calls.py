# SPDX-License-Identifier: Apache-2.0
"""A call on its way through the emulator: where it came from, what it asks, and what goes back.

Whoever has a `Call` owns its reply socket and the files that came with it, until it is sent an answer or abandoned.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import dataclass, field

from ..liveupdate import abi
from . import device_calls, wire
from .core import Session
from .faults import Fault
from .handlers import File
from .open_file import OpenFile, Reference


@dataclass(eq=False)
class Channel:
    """An open /dev/liveupdate, an open session, or an open file of another device: our end of its socket."""

    sock: socket.socket
    session: Session | None = None
    opened: OpenFile | None = None
    waiting: bool = False
    """A call on it is held, or its last close sleeps: nothing more is read."""


@dataclass(eq=False)
class Answer:
    """What goes back to a caller. `lent` is sent and stays ours; `given` is sent and closed here."""

    code: int = 0
    body: bytes = b""
    lent: int = -1
    given: socket.socket | Reference | None = None


@dataclass(eq=False)
class Call:
    """One ioctl on its way: the raw request, the socket for the answer, and the file that came with it."""

    channel: Channel
    request: int
    buf: bytes
    reply: socket.socket
    file: File | None
    pid: int
    answer: Answer | None = None
    device: device_calls.CallRequest | None = None
    files: dict[int, File] = field(default_factory=dict[int, File])
    """On a device file: the call, and the files it names."""

    @property
    def operation(self) -> str | None:
        """The name of the ioctl."""
        if self.channel.opened is not None:
            return self.channel.opened.requests.get(self.request, (None, None))[0]
        return abi.OPERATIONS.get(self.request)

    @property
    def token(self) -> int | None:
        """The token of PRESERVE_FD and RETRIEVE_FD."""
        if (
            self.channel.opened is None
            and self.request in (abi.PRESERVE_FD, abi.RETRIEVE_FD)
            and len(self.buf) >= abi.S_FD.size
        ):
            return int.from_bytes(self.buf[8:16], "little")
        return None

    @property
    def session_name(self) -> bytes | None:
        """The session it is about, as far as the caller said."""
        if self.channel.session is not None:
            return self.channel.session.name
        if self.channel.opened is not None:
            return None
        return self.buf[8:72].split(b"\0", 1)[0] if len(self.buf) >= abi.S_SESSION.size else None


@dataclass(eq=False)
class Held:
    """A call that a fault holds."""

    fault: Fault
    call: Call


def send_answer(call: Call) -> None:
    """Send a call's answer, EIO where it has none, and let go of it."""
    send(call.reply, call.answer or Answer(errno.EIO))


def send(reply: socket.socket, answer: Answer) -> None:
    """Send an answer to a caller, and close both."""
    fds = [answer.given.fileno()] if answer.given else [answer.lent] if answer.lent >= 0 else []
    with contextlib.suppress(
        OSError
    ):  # the caller was killed meanwhile; a session it was to get hangs up at once
        wire.send_with_fds(
            reply, wire.REPLY.pack(answer.code, bool(fds)) + answer.body, fds, socket.MSG_DONTWAIT
        )
    if answer.given:
        answer.given.close()
    reply.close()


def abandon(call: Call) -> None:
    """Let go of a call whose caller is gone or whose world has ended."""
    call.reply.close()
    for file in (call.file, *call.files.values()):
        if file is not None:
            file.close()
    if call.answer is not None and call.answer.given is not None:
        call.answer.given.close()
