# SPDX-License-Identifier: Apache-2.0
"""Finds out which column of a damaged row is wrong: tries every single flipped bit against the chain value."""

from __future__ import annotations

from .damage import Damage
from .record import COLUMNS, Record, link, parse_payload, payload_of

_LIMIT = 4096  # bytes of a row that are tried: about 30 ms


def explain(previous: bytes, record: Record) -> tuple[Damage, bytes]:
    """Describe the damage to `record`, which does not follow `previous`; also return the chain value to go on with."""
    try:
        data = payload_of(record)
    except Exception:  # a number out of range: SQLite never stores one, a damaged file may
        return Damage("row", "holds values that no row can have", record.id), record.chain
    right = link(previous, data)
    difference = int.from_bytes(right) ^ int.from_bytes(record.chain)
    if difference.bit_count() == 1:
        what = f"one bit of the chain value is flipped: it was {right.hex()}"
        return Damage("row", what, record.id, column="chain"), right
    if len(data) <= _LIMIT:
        found = _flipped(previous, data, record)
        if found is not None:
            return found, record.chain
    return Damage("row", "the row does not hash to its chain value", record.id), record.chain


def _flipped(previous: bytes, data: bytes, record: Record) -> Damage | None:
    trial = bytearray(data)
    for at in range(len(trial)):
        for bit in range(8):
            trial[at] ^= 1 << bit
            if link(previous, bytes(trial)) == record.chain:
                return _describe(record, bytes(trial))
            trial[at] ^= 1 << bit
    return None


def _describe(record: Record, data: bytes) -> Damage | None:
    try:
        was = parse_payload(data, record.chain)
    except ValueError:
        return None
    for name in COLUMNS:
        old, new = getattr(was, name), getattr(record, name)
        if old != new:
            what = f"one bit is flipped: it reads {_show(new)} and was {_show(old)}"
            return Damage("row", what, record.id, column=name)
    return None


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
