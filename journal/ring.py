# SPDX-License-Identifier: Apache-2.0
"""The black box: the last records in a fixed-size buffer that outlives the kernel.

The buffer is a memfd that luod preserves in a kernel session of its own. It cannot grow once it is preserved, but it can be written
up to the last instruction before the kexec. So it is a ring: a header, then frames, the oldest overwritten first.

    header, 128 bytes   magic, version, size of the frame area, id of the journal, base (id and chain value before the first frame)
    frame               magic, length, place (running byte count), CRC of all that, then payload and chain value

Frames stand behind each other by their running byte count modulo the size of the area, wrapping in the middle of a frame if need be.
Nothing points at the newest frame: a reader looks for frames whose place fits where they stand, and takes the longest run of ids, each
hashing to its chain value, that ends highest. A frame that was half written at the end fails its CRC and is not there.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from .errors import RingDivergence, RingError
from .record import CHAIN_SIZE, Record, follows, parse_payload, payload_of

MAGIC = b"luod.box"
VERSION = 1
HEADER_SIZE = 128
MINIMUM = 4096
_HEADER = struct.Struct("<8sIQ36sq16s")
_FRAME = struct.Struct("<IIQI")  # magic, length of what follows, place, crc
_FRAME_MAGIC = 0x786F6264
_CRC = struct.Struct("<I")


class Ring:
    """A black box on a writable buffer of bytes: an mmap, a bytearray. Not thread-safe; the journal calls it under its lock."""

    def __init__(self, view: memoryview, journal: str, base: tuple[int, bytes]) -> None:
        self._view = view
        self._area = view[HEADER_SIZE:]
        self.journal = journal
        self.base = base
        self.capacity = len(self._area)
        self._end = 0
        found = self._scan()
        if found:
            self._end = max(place + length for place, length, _ in found)

    @classmethod
    def format(cls, buffer: Any, journal: str, head: tuple[int, bytes]) -> Ring:
        """Make an empty black box of `buffer` for the journal with this id, whose last record is `head` (id, chain value)."""
        view = _view(buffer)
        if len(journal.encode()) != 36:
            raise RingError(f"{journal!r} is not the id of a journal", hint="give Journal.journal_id")
        view[:] = bytes(len(view))
        _write_header(view, journal, head)
        return cls(view, journal, head)

    @classmethod
    def attach(cls, buffer: Any) -> Ring:
        """Open the black box in `buffer`; raises `RingError` when there is none, or one of a newer version."""
        view = _view(buffer)
        raw = bytes(view[: _HEADER.size])
        magic, version, size, journal, base_id, base_chain = _HEADER.unpack(raw)
        (crc,) = _CRC.unpack_from(view, _HEADER.size)
        if magic != MAGIC or crc != zlib.crc32(raw):
            raise RingError(
                "this is not a black box, or its header is damaged",
                hint="the journal on disk is the authority",
            )
        if version != VERSION:
            raise RingError(
                f"the black box has version {version}, not {VERSION}",
                hint="read it with the luod that wrote it",
            )
        if size != len(view) - HEADER_SIZE:
            raise RingError(
                f"the black box was {size + HEADER_SIZE} bytes long and is {len(view)}", hint="it was cut"
            )
        return cls(view, journal.decode(), (base_id, base_chain))

    def append(self, records: Sequence[Record]) -> None:
        """Write records over the oldest ones; raises `RingError` for one that is larger than the whole box."""
        for record in records:
            data = payload_of(record) + record.chain
            total = _FRAME.size + len(data)
            if total > self.capacity:
                raise RingError(f"record {record.id} needs {total} bytes, the black box has {self.capacity}")
            head = struct.pack("<IIQ", _FRAME_MAGIC, len(data), self._end)
            frame = head + _CRC.pack(zlib.crc32(data, zlib.crc32(head))) + data
            self._put(self._end % self.capacity, frame)
            self._end += total

    def read(self) -> list[Record]:
        """Return the longest run of whole, chained records that ends with the highest id."""
        best: dict[int, Record] = {}
        for _, _, record in self._scan():
            best[record.id] = record  # a later place wins over an earlier one
        run: list[Record] = []
        for id in sorted(best, reverse=True):
            if run and (run[-1].id != id + 1 or not follows(best[id].chain, run[-1])):
                break
            run.append(best[id])
        return run[::-1]

    def release(self) -> None:
        """Let go of the buffer, so that an mmap can be closed."""
        self._area.release()
        self._view.release()

    def _put(self, at: int, data: bytes) -> None:
        first = min(len(data), self.capacity - at)
        self._area[at : at + first] = data[:first]
        if first < len(data):
            self._area[: len(data) - first] = data[first:]

    def _scan(self) -> list[tuple[int, int, Record]]:
        """Return place, length and record of every whole frame, by place."""
        flat = bytes(self._area)
        twice = flat + flat  # a frame may wrap around the end
        mark = struct.pack("<I", _FRAME_MAGIC)
        found: list[tuple[int, int, Record]] = []
        at = twice.find(mark)
        while 0 <= at < self.capacity:
            frame = self._frame(twice, at)
            if frame is not None:
                found.append(frame)
            at = twice.find(mark, at + (frame[1] if frame else 1))
        found.sort(key=lambda frame: frame[0])
        return found

    def _frame(self, twice: bytes, at: int) -> tuple[int, int, Record] | None:
        if at + _FRAME.size > len(twice):
            return None
        _, length, place, crc = _FRAME.unpack_from(twice, at)
        total = _FRAME.size + length
        if total > self.capacity or place % self.capacity != at or length <= CHAIN_SIZE:
            return None
        data = twice[at + _FRAME.size : at + total]
        if zlib.crc32(data, zlib.crc32(twice[at : at + 16])) != crc:
            return None
        try:
            return place, total, parse_payload(data[:-CHAIN_SIZE], data[-CHAIN_SIZE:])
        except ValueError:
            return None


def merge(
    head: tuple[int, bytes],
    records: Sequence[Record],
    *,
    chain_at: Callable[[int], bytes | None] | None = None,
) -> list[Record]:
    """Return the records of the black box that the disk does not have, for `Journal.adopt`.

    `head` is id and chain value of the last record on disk. With `chain_at` (`Journal.chain_at`) every record that both have is
    compared; without it only the one at the head. Raises `RingDivergence` when the two differ, or when the box begins too late to
    be tied to the disk.
    """
    for before, record in pairwise(records):
        if record.id != before.id + 1 or not follows(before.chain, record):
            raise RingDivergence(f"record {record.id} of the black box does not follow record {before.id}")
    if not records:
        return []
    for record in records:
        on_disk = (
            head[1]
            if record.id == head[0]
            else chain_at(record.id)
            if chain_at and record.id < head[0]
            else None
        )
        if on_disk is not None and on_disk != record.chain:
            raise RingDivergence(
                f"record {record.id} differs between the black box and the disk",
                hint="export both and decide which one to believe; luod does not act on either",
            )
    fresh = [record for record in records if record.id > head[0]]
    if fresh and (fresh[0].id != head[0] + 1 or not follows(head[1], fresh[0])):
        raise RingDivergence(
            f"the black box goes on with record {fresh[0].id}, the disk ends with record {head[0]}, and they do not meet",
            hint="the journal on disk is older than the box or another one; export both and decide which one to believe",
        )
    return fresh


def _view(buffer: Any) -> memoryview:
    view = memoryview(buffer).cast("B")
    if view.readonly or len(view) < MINIMUM:
        raise RingError(
            f"a black box needs {MINIMUM} writable bytes, not {len(view)}", hint="use a larger memfd"
        )
    return view


def _write_header(view: memoryview, journal: str, head: tuple[int, bytes]) -> None:
    raw = _HEADER.pack(MAGIC, VERSION, len(view) - HEADER_SIZE, journal.encode(), head[0], head[1])
    view[: _HEADER.size + _CRC.size] = raw + _CRC.pack(zlib.crc32(raw))
