# SPDX-License-Identifier: Apache-2.0
"""Finds out which column of a damaged row is wrong: tries every single flipped bit against the chain value."""

from __future__ import annotations

import struct

from msgspec.structs import replace

from .damage import Damage
from .record import COLUMNS, Record, link, parse_payload, payload_of

_LIMIT = 4096  # bytes of a row that are tried: about 30 ms


def explain(previous: bytes, record: Record, *, search: bool = True) -> tuple[Damage, Record | None]:
    """Describe the damage to `record`, which does not follow `previous`; also return the row as it was, when that can be proved."""
    try:
        data = payload_of(record)
    except (struct.error, TypeError, UnicodeError):  # values that no row can have, a damaged file may
        return Damage("row", "holds values that no row can have", record.id), None
    right = link(previous, data)
    difference = int.from_bytes(right, "big") ^ int.from_bytes(record.chain, "big")
    if difference.bit_count() == 1:
        what = f"one bit of the chain value is flipped: it was {right.hex()}"
        return Damage("row", what, record.id, column="chain"), replace(record, chain=right)
    was = _flipped(previous, data, record.chain) if search and len(data) <= _LIMIT else None
    if was is None:
        return Damage("row", "the row does not hash to its chain value", record.id), None
    return _describe(record, was), was


def _flipped(previous: bytes, data: bytes, chain: bytes) -> Record | None:
    trial = bytearray(data)
    for at in range(len(trial)):
        for bit in range(8):
            trial[at] ^= 1 << bit
            if link(previous, bytes(trial)) == chain:
                try:
                    return parse_payload(bytes(trial), chain)
                except ValueError:
                    return None
            trial[at] ^= 1 << bit
    return None


def _describe(record: Record, was: Record) -> Damage:
    for name in COLUMNS:
        old, new = getattr(was, name), getattr(record, name)
        if old != new:
            what = f"one bit is flipped: it reads {_show(new)} and was {_show(old)}"
            return Damage("row", what, record.id, column=name)
    return Damage("row", "the row does not hash to its chain value", record.id)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
