# SPDX-License-Identifier: Apache-2.0
"""`luoctl demo` as a person runs it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luod.adapters.emulator.population import children_of
from luod.journal.replay import Replay
from luod.timeline import MAX_BARS, draw

KEYS = [
    "kernel", "sessions", "finished", "lost", "failed", "bytes_verified", "crash_points", "recoveries", "blackout_ms", "journal",
]  # fmt: skip


def demo(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "luod.cli", "demo", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
        env={**os.environ, **variables},
    )


def test_the_object(disk_path: Path) -> None:
    done = demo("--sessions", "8", "--mib", "1", "--json", "--keep", str(disk_path / "kept"))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert list(shown) == [*KEYS, "detail"]
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


def test_nothing_is_left_of_a_good_run(disk_path: Path) -> None:
    done = demo("--sessions", "1", "--mib", "0.1", "--json", TMPDIR=str(disk_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["journal"] is None
    assert list(disk_path.iterdir()) == []


def test_two_demos_at_once(disk_path: Path) -> None:
    command = [sys.executable, "-m", "luod.cli", "demo", "--sessions", "2", "--mib", "0.1", "--json"]
    both = [
        subprocess.Popen([*command, "--keep", str(disk_path / name)], stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for each in both:
        out, _ = each.communicate(timeout=170)
        assert each.returncode == 0
        assert json.loads(out)["finished"] == 2


def test_a_kept_directory_is_never_written_over(disk_path: Path) -> None:
    (disk_path / "precious").write_text("x")
    done = demo("--keep", str(disk_path))
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [one.name for one in disk_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--crash", "everywhere"], "is no crash point"),
        (["--crash", "1:vm0.1/hand"], "is no crash point"),
        (["--keep", "/proc/nowhere"], "cannot be used"),
        (["--sessions", "0"], "--sessions"),
        (["--mib", "lots"], "--mib"),
    ],
)
def test_what_cannot_be_is_said_at_once(args: list[str], said: str, disk_path: Path) -> None:
    done = demo(*args, TMPDIR=str(disk_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert list(disk_path.iterdir()) == []


@contextlib.contextmanager
def running(disk_path: Path, until: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A demo in a process group of its own, which has said `until`; whatever happens, nothing of it stays."""
    process = subprocess.Popen(
        [sys.executable, "-m", "luod.cli", "demo", "--sessions", "2", "--mib", "64", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        env={**os.environ, "TMPDIR": str(disk_path)},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        while until not in (line := process.stderr.readline()):
            assert line, "the demo ended"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with process:
            process.wait()


def others(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes that the demo has started: there are some."""
    found = children_of()[process.pid]
    assert found
    return found


def test_ctrl_c_that_its_processes_see_first(disk_path: Path) -> None:
    """They leave it to the harness, which would take their end for a failure."""
    with running(disk_path, "subscribed") as process:
        for pid in others(process):
            os.kill(pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert (process.returncode, said.count("boots")) == (0, 1), said  # of two, one was read before


def test_nothing_outlives_the_harness(disk_path: Path) -> None:
    with running(disk_path, "subscribed") as process:
        left = [os.pidfd_open(pid) for pid in others(process)]
        process.kill()
        try:
            for fd in left:
                assert select.select([fd], [], [], 30)[0], "a process outlived the demo"
        finally:
            for fd in left:
                os.close(fd)


def test_ctrl_c_leaves_nothing(disk_path: Path) -> None:
    """Ctrl-C goes to the whole process group, as a terminal sends it."""
    with running(disk_path, "boots") as process:
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in said
        assert list(disk_path.iterdir()) == []
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


@pytest.mark.lab
@pytest.mark.parametrize("until", ["count and check", "the guests stood still", "every guest runs again"])
def test_ctrl_c_leaves_no_guest(disk_path: Path, until: str) -> None:
    """A QEMU lives on when its luo-qemu dies, and not when the demo ends."""
    with running(disk_path, until, "--qemu") as process:
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, list(disk_path.iterdir())) == (130, []), said
        assert "Traceback" not in said
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                assert group != str(process.pid) or state == "Z", "a process outlived the demo"
