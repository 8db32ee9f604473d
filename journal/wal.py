# SPDX-License-Identifier: Apache-2.0
"""Looks at a write-ahead log without SQLite, to tell an unfinished end from damage.

SQLite reads a log up to the first frame that does not fit and forgets the rest without a word. That is right for a crash in the
middle of a write and wrong for a flipped bit, which would take acknowledged events with it. A transaction is synced before the next
one is written; so a bad frame is damage, not an unfinished end, when frames of a later transaction stand behind it.

Format: https://www.sqlite.org/fileformat2.html section 4, "The Write-Ahead Log". The checksum there is a pair of running sums
s0 += w0 + s1, s1 += w1 + s0 over 32-bit words; that is one Fibonacci-like recurrence, so a frame is a dot product with fixed weights.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from operator import mul
from pathlib import Path

import msgspec

from .damage import Damage, Torn

HEADER = struct.Struct(">8I")
FRAME = struct.Struct(">6I")
_MAGIC = 0x377F0682  # the lowest bit says whether the checksum words are big endian
_VERSION = 3007000
_MASK = 0xFFFFFFFF
Sums = tuple[int, int]


class WalScan(msgspec.Struct, frozen=True):
    """What stands in a log: `frames` that SQLite will read, `end` of them in bytes, and what is wrong behind them."""

    frames: int = 0
    end: int = 0
    torn: Torn | None = None
    damage: tuple[Damage, ...] = ()


@cache
def _weights(words: int) -> tuple[Sequence[int], Sequence[int]]:
    fibonacci = [1, 1]
    while len(fibonacci) < words + 2:
        fibonacci.append((fibonacci[-1] + fibonacci[-2]) & _MASK)
    last = fibonacci[words - 1 :: -1]  # weight of word j in the last value: F(words - j)
    return [*last[1:], 0], last


def checksum(sums: Sums, data: bytes, *, big: bool) -> Sums:
    """Run SQLite's log checksum over `data`, a multiple of 8 bytes."""
    count = len(data) // 4
    words = struct.unpack(f"{'>' if big else '<'}{count}I", data)
    older, last = _weights(count)
    s0, s1 = sums
    # what went before counts like two words in front of the first one
    first0, first1 = (older[0], last[0]), (last[0], (last[0] + older[0]) & _MASK)
    return (
        (sum(map(mul, words, older)) + s0 * first0[0] + s1 * first0[1]) & _MASK,
        (sum(map(mul, words, last)) + s0 * first1[0] + s1 * first1[1]) & _MASK,
    )


def scan_file(path: Path) -> WalScan:
    """Scan the log at `path`; a missing file is an empty log. Raises OSError."""
    try:
        return scan(path.read_bytes(), path.name)
    except FileNotFoundError:
        return WalScan()


def scan(data: bytes, name: str = "journal.db-wal") -> WalScan:
    """Scan the bytes of a log. `name` is what places are told with."""
    head = data[: HEADER.size]
    if not head.strip(b"\0"):
        if data[HEADER.size :].strip(b"\0"):
            return WalScan(damage=(_damage(name, 0, "the header of the log is empty, but frames follow it"),))
        return WalScan()
    if len(head) < HEADER.size:
        return WalScan(torn=Torn(name, 0, 0, "the log ends within its header"))
    magic, version, page, _, salt0, salt1, *sums = HEADER.unpack(head)
    big = bool(magic & 1)
    fits = (
        magic | 1 == _MAGIC | 1
        and version == _VERSION
        and tuple(sums) == checksum((0, 0), head[:24], big=big)
    )
    if not fits:
        if data[HEADER.size :].strip(b"\0"):
            return WalScan(damage=(_damage(name, 0, "the header of the log does not fit its checksum"),))
        return WalScan(torn=Torn(name, 0, 0, "the header of the log is unfinished"))
    return _Frames(data, name, page, (salt0, salt1), big).scan((sums[0], sums[1]))


def _damage(name: str, offset: int, what: str) -> Damage:
    return Damage("wal", what, file=name, offset=offset)


class _Frames:
    """The frames behind a good header."""

    def __init__(self, data: bytes, name: str, page: int, salts: Sums, big: bool) -> None:
        self.data, self.name, self.size, self.salts, self.big = data, name, FRAME.size + page, salts, big
        self.count = (len(data) - HEADER.size) // self.size

    def at(self, index: int) -> int:
        return HEADER.size + index * self.size

    def head(self, index: int) -> tuple[int, int, Sums, Sums]:
        page, commit, salt0, salt1, sum0, sum1 = FRAME.unpack_from(self.data, self.at(index))
        return page, commit, (salt0, salt1), (sum0, sum1)

    def mine(self, index: int) -> bool:
        return self.head(index)[2] == self.salts

    def sums(self, index: int, before: Sums) -> Sums:
        at = self.at(index)
        frame = self.data[at : at + 8] + self.data[at + FRAME.size : at + self.size]
        return checksum(before, frame, big=self.big)

    def scan(self, sums: Sums) -> WalScan:
        good = committed = 0
        while good < self.count:
            page, commit, salts, stored = self.head(good)
            if salts != self.salts or not page or self.sums(good, sums) != stored:
                break
            sums = stored
            good += 1
            if commit:
                committed = good
        damage = self._behind(good, sums)
        torn = None
        rest = self.data[self.at(self.count) :]
        left = sum(1 for index in range(committed, self.count) if index < good or self.mine(index))
        partial = (
            rest[8:16] == struct.pack(">2I", *self.salts) if len(rest) >= 16 else bool(rest.strip(b"\0"))
        )
        if damage is None and (left or (partial and committed == self.count)):
            what = "a transaction is unfinished" if left else "the log ends within a frame"
            torn = Torn(self.name, self.at(committed), left + partial, what)
        return WalScan(committed, self.at(committed), torn, (damage,) if damage else ())

    def _behind(self, bad: int, sums: Sums) -> Damage | None:
        """Look for proof that the frame `bad`, reached with `sums`, was once a good one with others behind it."""
        if bad >= self.count or not self.head(bad)[0]:
            return None
        computed = self.sums(bad, sums)
        if not self.mine(bad) and computed == self.head(bad)[3]:
            return _damage(self.name, self.at(bad), f"frame {bad + 1} has the wrong salt")
        if (
            self.mine(bad)
            and bad + 1 < self.count
            and self.mine(bad + 1)
            and self.sums(bad + 1, computed) == self.head(bad + 1)[3]
        ):
            return _damage(self.name, self.at(bad), f"frame {bad + 1} does not have its checksum")
        for index in range(bad, self.count - 1):
            _, commit, salts, stored = self.head(index)
            if salts != self.salts and index > bad:
                break
            if not commit or not self.mine(index + 1):
                continue
            if self.sums(index + 1, stored) == self.head(index + 1)[3]:
                what = f"frame {bad + 1} is damaged, and later transactions stand behind it"
                return _damage(self.name, self.at(bad), what)
        return None
