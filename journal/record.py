# SPDX-License-Identifier: Apache-2.0
"""One row of the journal, and the chain that ties it to all rows before it.

The chain value of a row is BLAKE2b (16 bytes) over the chain value before it and every column of the row in a fixed encoding:
integers as 8 bytes little endian, a missing cause as a flag, each text and the body behind its length. So a row that was changed,
moved, dropped or renumbered no longer hashes to its value. The same encoding is what the black box holds.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import msgspec

from ..states import codec
from ..states.events import Event

CHAIN_SIZE = 16
_PERSON = b"luod.journal.1"
_FIXED = struct.Struct("<qqqqBq5I")


class Entry(msgspec.Struct, frozen=True):
    """An event on its way into the journal.

    `cause` is the id of the record that led to it. A negative number counts back within the same call: -1 is the entry before.
    """

    stream: str
    event: Event
    cause: int | None = None


class Record(msgspec.Struct, frozen=True):
    """One row: an event with its place, time and origin.

    `id` runs from 1 through the whole journal, `seq` from 1 within a stream. `wall_ns` is CLOCK_REALTIME, `boot_ns` CLOCK_BOOTTIME,
    both in nanoseconds. `body` is the JSON of the event, `chain` the chain value.
    """

    id: int
    stream: str
    seq: int
    type: str
    wall_ns: int
    boot_ns: int
    boot_id: str
    run_id: str
    cause: int | None
    body: bytes
    chain: bytes

    def event(self) -> Event:
        """Return the event; raises `UnknownEvent` or `BadEvent`."""
        return codec.decode(self.type, self.body)


COLUMNS = tuple(Record.__struct_fields__)


def payload(
    id: int,
    stream: str,
    seq: int,
    type: str,
    wall_ns: int,
    boot_ns: int,
    boot_id: str,
    run_id: str,
    cause: int | None,
    body: bytes,
) -> bytes:
    """Encode every column but the chain value; distinct rows give distinct bytes."""
    texts = [text.encode("utf-8", "surrogateescape") for text in (stream, type, boot_id, run_id)]
    fixed = _FIXED.pack(id, seq, wall_ns, boot_ns, cause is not None, cause or 0, *map(len, texts), len(body))
    return b"".join((fixed, *texts, body))


def payload_of(record: Record) -> bytes:
    """Encode every column of `record` but the chain value."""
    return payload(*[getattr(record, name) for name in COLUMNS[:-1]])


def parse_payload(data: bytes, chain: bytes) -> Record:
    """Turn what `payload` made back into a record; raises ValueError for anything else."""
    try:
        id, seq, wall_ns, boot_ns, flag, cause, *lengths = _FIXED.unpack_from(data)
        parts: list[bytes] = []
        at = _FIXED.size
        for length in lengths:
            parts.append(data[at : at + length])
            at += length
        if at != len(data) or flag > 1 or (not flag and cause):
            raise ValueError("lengths do not add up")
        stream, type, boot_id, run_id = (part.decode() for part in parts[:4])
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    return Record(
        id, stream, seq, type, wall_ns, boot_ns, boot_id, run_id, cause if flag else None, parts[4], chain
    )


def link(previous: bytes, data: bytes) -> bytes:
    """Return the chain value of a row with payload `data` that follows the chain value `previous`."""
    digest = hashlib.blake2b(previous, digest_size=CHAIN_SIZE, person=_PERSON)
    digest.update(data)
    return digest.digest()


def follows(previous: bytes, record: Record) -> bool:
    """Tell whether `record` hashes to its chain value after `previous`."""
    try:
        return link(previous, payload_of(record)) == record.chain
    except (struct.error, AttributeError, TypeError, UnicodeError):  # a damaged row may hold any type
        return False


def genesis(journal_id: str) -> bytes:
    """Return the chain value before the first row: it ties every row to this journal."""
    return link(bytes(CHAIN_SIZE), b"genesis " + journal_id.encode("utf-8", "surrogateescape"))


def to_json(record: Record) -> dict[str, Any]:
    """Return the record as a JSON object: the body as an object, the chain value in hex."""
    fields: dict[str, Any] = {name: getattr(record, name) for name in COLUMNS}
    fields["body"] = msgspec.Raw(record.body)
    fields["chain"] = record.chain.hex()
    return fields
