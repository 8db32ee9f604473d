# SPDX-License-Identifier: Apache-2.0
"""`luoctl demo` as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from luod.journal.replay import Replay
from luod.timeline import MAX_BARS, draw

KEYS = [
    "kernel", "sessions", "finished", "lost", "failed", "bytes_verified", "crash_points", "recoveries", "blackout_ms", "journal",
]  # fmt: skip
pytestmark = pytest.mark.timeout(180)


def demo(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "luod.cli", "demo", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )


def test_the_object(disk_path: Path) -> None:
    done = demo("--sessions", "8", "--mib", "1", "--json", "--keep", str(disk_path / "kept"))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert list(shown)[: len(KEYS)] == KEYS
    assert (shown["sessions"], shown["finished"], shown["lost"], shown["failed"]) == (8, 8, 0, 0)
    assert shown["bytes_verified"] == 8 << 20
    assert shown["blackout_ms"] > 0
    assert Path(shown["journal"]).exists()


def test_sixty_four_sessions(disk_path: Path) -> None:
    done = demo("--sessions", "64", "--mib", "0.25", "--keep", str(disk_path / "kept"))
    assert done.returncode == 0, done.stderr
    assert "every byte is right" in done.stdout
    assert "48 more" in done.stdout
    with Replay(disk_path / "kept" / "state" / "journal.db") as replay:
        records = list(replay)
    for width in (80, 120):
        for color in (False, True):
            picture = draw(records, width=width, color=color)
            plain = [line for line in picture.splitlines() if "\x1b" not in line]
            assert max(map(len, plain)) <= max(width, 110)
            assert picture.count(" ms\n") >= MAX_BARS
            assert ("\x1b[" in picture) is color


def test_one_crash_point_and_one_that_is_none(disk_path: Path) -> None:
    one = demo("--crash", "vm0.1/retrieve:after_call", "--json")
    assert one.returncode == 0, one.stderr
    assert json.loads(one.stdout)["recoveries"] == 1
    none = demo("--crash", "vm0.1/teleport:after_call", "--json", "--keep", str(disk_path / "kept"))
    assert none.returncode == 1
    assert "--crash list" in json.loads(none.stdout)["detail"]["problems"][0]
