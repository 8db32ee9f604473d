# SPDX-License-Identifier: Apache-2.0
"""The reader of the guest's serial port: a good log has no findings, and every fault in it has one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod.tinyguest.serial import SerialLog

GOOD = ["tinyguest boot seed 7 memory 65408 hz 10 chunk 256"] + [
    f"tick {number} pass {number // 4} bad 0 seed 7" for number in range(1, 9)
]


def read(lines: list[str], seed: int | None = 7) -> SerialLog:
    log = SerialLog(seed)
    log.feed("".join(line + "\n" for line in lines).encode())
    return log


def test_a_good_log() -> None:
    log = read(GOOD)
    assert log.findings == []
    assert (log.boots, log.first, log.last, log.ticks, log.passes, log.bad) == (1, 1, 8, 8, 2, 0)
    assert log.memory_kib == 65408


def test_a_log_that_begins_in_the_middle() -> None:
    log = read(GOOD[4:], seed=None)
    assert log.findings == []
    assert (log.boots, log.first, log.last, log.seed) == (0, 4, 8, 7)


@given(st.lists(st.integers(0, len("\r\n".join(GOOD))), max_size=20))
def test_it_does_not_matter_where_the_bytes_are_cut(cuts: list[int]) -> None:
    data = ("\r\n".join(GOOD) + "\r\n").encode()
    places = [0, *sorted(cuts), len(data)]
    log = SerialLog(7)
    for start, end in itertools.pairwise(places):
        log.feed(data[start:end])
    assert log == read(GOOD)


def test_half_a_line_does_not_count() -> None:
    log = read(GOOD)
    log.feed(b"tick 9 pass 2 bad 1")
    assert log.last == 8
    log.feed(b" seed 7\n")
    assert log.findings == ["tick 9: 1 more words of memory are wrong"]


@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        (GOOD[:5] + GOOD[6:], "tick 6 after tick 4: 1 lost"),
        ([*GOOD, GOOD[-1]], "tick 8 after tick 8: repeated"),
        ([*GOOD, GOOD[0]], "after tick 8: booted again"),
        (GOOD[3:] + GOOD[:1], "after tick 8: booted"),
        ([*GOOD[:1], "tick 5 pass 0 bad 0 seed 7"], "the first tick after the boot is 5"),
        ([*GOOD, "tick 9 pass 1 bad 0 seed 7"], "tick 9: pass 1 after pass 2"),
        ([*GOOD, "tick 9 pass 2 bad 3 seed 7"], "tick 9: 3 more words of memory are wrong"),
        ([*GOOD, "tick 9 pass 2 bad 0 seed 8"], "after tick 9: another guest, seed 8 instead of 7"),
        ([*GOOD, "trap"], "after tick 8: not a line of the guest: 'trap'"),
    ],
)
def test_every_fault_is_found(lines: list[str], finding: str) -> None:
    found = read(lines).findings
    # Another guest's first line is seen before its number is taken.
    assert [line.replace("after tick 8: another", "after tick 9: another") for line in found] == [finding]
