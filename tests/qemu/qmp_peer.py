# SPDX-License-Identifier: Apache-2.0
"""The package qemu.qmp as a judge: what it makes of a stream, and in the same terms what the codec makes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from qemu.qmp import QMPClient
from qemu.qmp.error import ProtocolError
from qemu.qmp.models import ErrorResponse, Greeting

from luod.adapters.qemu import codec
from luod.adapters.qemu.errors import QmpGarbled

GARBLED = ("garbled",)
Seen = tuple[Any, ...]


def exactly(value: Any) -> str:
    """Return a value as text, so that 1, 1.0 and true differ and NaN is itself."""
    return json.dumps(value, sort_keys=True)


async def _theirs(stream: bytes, pending: set[str]) -> list[Seen]:
    client = QMPClient()
    reader = asyncio.StreamReader(limit=codec.MAX_LINE)
    reader.feed_data(stream)
    reader.feed_eof()
    client._reader = reader
    seen: list[Seen] = []
    while True:
        try:
            message = dict(await client._do_recv())
        except EOFError:
            return seen
        except (ProtocolError, ValueError, RecursionError):
            # A ValueError is one of Python's JSON that they let through: bad UTF-8, or a number of thousands of digits.
            return [*seen, GARBLED]
        said = _judge(message, pending, greeted=bool(seen))
        if said is not None:
            seen.append(said)
        if said is GARBLED:
            return seen


def _judge(message: dict[str, Any], pending: set[str], *, greeted: bool) -> Seen | None:
    """What QMPClient does with a message, read off `_get_greeting`, `_on_message` and `execute_msg`."""
    try:
        if not greeted:
            theirs = Greeting(message).QMP
            return ("greeting", exactly(list(map(str, theirs.capabilities))))
        if "event" in message:
            return ("event", exactly(message["event"]), exactly(message.get("data", {})))
        if "error" in message and "id" not in message:
            return GARBLED
        number = message.get("id")
        if not isinstance(number, str) or number not in pending:
            return None
        pending.discard(number)
        if "error" in message:
            error = ErrorResponse(message).error
            return ("error", number, error.class_, error.desc)
        return ("return", number, exactly(message["return"]))
    except (KeyError, TypeError):
        return GARBLED


def theirs(stream: bytes, pending: set[str]) -> list[Seen]:
    """Return what qemu.qmp reads in a stream, up to the first thing that is not QMP."""
    return asyncio.run(_theirs(stream, set(pending)))


def ours(chunks: Sequence[bytes], pending: set[str]) -> list[Seen]:
    """Return what the codec reads in a stream that comes in chunks."""
    judged = codec.Codec()
    judged.pending = set(pending)
    seen: list[Seen] = []
    for chunk in chunks:
        for message in judged.feed(chunk):
            match message:
                case codec.Greeting():
                    seen.append(("greeting", exactly(list(message.capabilities))))
                case codec.Event():
                    seen.append(("event", exactly(message.name), exactly(message.data)))
                case codec.Return():
                    seen.append(("return", message.id, exactly(message.value)))
                case codec.Failure():
                    seen.append(("error", message.id, message.error_class, message.desc))
                case QmpGarbled():
                    seen.append(GARBLED)
    return seen
