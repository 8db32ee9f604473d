# SPDX-License-Identifier: Apache-2.0
"""The judge of the Linux guests' words finds what it is there to find."""

from __future__ import annotations

import pytest
from linux_rig import LinuxLog

GOOD = [
    "boot aa log 0",
    "tick 1 mono 5 echo 0",
    "tick 2 mono 5 echo 1",
    "end log 2",
    "boot bb log 2",
    "tick 3 mono 5 echo 2",
]


def judged(*said: str) -> LinuxLog:
    log = LinuxLog()
    for line in said:
        log.feed(f"guest: {line}\r\n".encode())
    return log


def test_a_good_guest() -> None:
    log = judged(*GOOD)
    assert (log.findings, log.boots, log.last, log.end) == ([], 2, 3, None)
    assert judged(*GOOD, "end log 3").end == 3


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (2, "tick 3 mono 5 echo 1"),
        (2, "tick 1 mono 5 echo 1"),
        (2, "BUG: soft lockup"),
        (3, "end log 1"),
        (3, "end log -1"),
        (4, "boot bb log 1"),
    ],
)
def test_what_is_wrong_is_found(place: int, wrong: str) -> None:
    assert judged(*GOOD[:place], wrong, *GOOD[place + 1 :]).findings


def test_a_broken_log_is_an_end_and_no_silence() -> None:
    log = judged(*GOOD[:3], "end log -1")
    assert log.end == -1 != log.last
