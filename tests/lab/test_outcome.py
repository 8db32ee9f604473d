# SPDX-License-Identifier: Apache-2.0
"""Judging a run by its events and console, building QEMU's command, and the state disk: all without starting a machine."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from luod.journal.record import Entry
from luod.journal.writer import Journal
from luod.lab import accel
from luod.lab.disk import find_tool, make_state_disk, read_state_disk
from luod.lab.errors import LabError, LabRunFailed, LabUnavailable
from luod.lab.images import read_image
from luod.lab.jump import next_cmdline
from luod.lab.machine import Machine
from luod.lab.outcome import LabRun
from luod.lab.script import Boot, python, run
from luod.lab.traces import draw
from luod.states.events import UpdateStarted

needs_e2fsprogs = pytest.mark.skipif(
    shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None,
    reason="mke2fs is not installed",
)


def ran(
    directory: Path, boots: list[Boot], *events: tuple[str, int, dict], console: str = "", ended: str = "off"
) -> LabRun:
    (directory / "console.log").write_text(console)
    found = LabRun(directory, boots, ended=ended)
    for kind, boot, fields in events:
        found.take({"event": kind, "boot": boot, **fields})
    return found


BOOT = Boot([])
UP = ("boot", 0, {})
STEP = ("step", 0, {"step": "one", "ok": True})
END = ("end", 0, {"step": "one", "ok": True})
PANIC = "[ 1.0] x\n[ 2.0] Kernel panic - not syncing: luo: bad\n"


@pytest.mark.parametrize(
    ("boots", "events", "more", "problem"),
    [
        ([BOOT], [UP, STEP, END], {}, ""),
        ([BOOT], [], {}, "0 of 1 boots came up"),
        (
            [BOOT],
            [UP, ("begin", 0, {"step": "one"})],
            {"ended": "timeout"},
            "the time ran out in boot 0, step 'one'",
        ),
        ([BOOT], [UP, ("begin", 0, {"step": "one"})], {}, "the machine stopped in boot 0, step 'one'"),
        ([BOOT], [UP, STEP, END], {"console": PANIC}, "kernel panic after boot 0, step 'one': luo: bad"),
        (
            [BOOT, BOOT],
            [UP, STEP, ("leave", 0, {"step": "one"})],
            {},
            "1 of 2 boots came up; the last was in boot 0, step 'one'",
        ),
        ([Boot([], expect="panic"), BOOT], [UP, STEP], {"console": PANIC}, ""),
        (
            [Boot([], expect="panic"), BOOT],
            [UP, STEP],
            {},
            "the kernel was to panic after boot 0 and did not",
        ),
        (
            [BOOT],
            [UP, ("fail", 0, {"step": "start-up", "message": "no disk"})],
            {},
            "boot 0, step 'start-up' failed: no disk",
        ),
        (
            [BOOT],
            [
                UP,
                ("step", 0, {"step": "one", "ok": False, "code": 3, "seconds": 1.5, "output": "why\n"}),
                END,
            ],
            {},
            "boot 0, step 'one' failed after 1.5 s: exit code 3\nwhy",
        ),
    ],
)
def test_verdict_names_the_place(tmp_path, boots, events, more, problem) -> None:
    found = ran(tmp_path, boots, *events, **more)
    assert found.problem().startswith(problem)
    assert bool(found.problem()) == bool(problem)
    if not problem:
        assert found.check() is found


def test_failure_shows_the_last_lines_of_the_console_and_of_qemu(tmp_path) -> None:
    (tmp_path / "qemu.log").write_text("qemu: cannot open disk\n")
    found = ran(tmp_path, [BOOT], console="".join(f"line {number}\n" for number in range(100)))
    with pytest.raises(LabRunFailed) as caught:
        found.check()
    text = str(caught.value)
    assert "line 99" in text
    assert "line 74" not in text
    assert "qemu: cannot open disk" in text
    assert str(tmp_path) in caught.value.hint


LINE = "console=ttyS0 ro quiet kho=on liveupdate=on init=/bin/python -- -I -S guest.py"


def test_failure_shows_the_last_records_of_each_boots_journal_and_the_timeline(tmp_path) -> None:
    for boot, number in (("luod-after-boot-0", 1), ("luod", 2)):
        (tmp_path / "state" / boot).mkdir(parents=True)
        with Journal.open(
            tmp_path / "state" / boot / "journal.db", boot_id="b", run_id="r", volatile=True
        ) as journal:
            journal.append([Entry(f"update/{number}", UpdateStarted(number, 0, (), 60.0))])
    draw(tmp_path)
    found = ran(tmp_path, [BOOT], UP)
    with pytest.raises(LabRunFailed) as failure:
        found.check()
    text = failure.value.message
    first, second = text.index("state/luod-after-boot-0/journal.db"), text.index("state/luod/journal.db")
    assert (
        first < text.index("update/1 update.started.v1") < second < text.index("update/2 update.started.v1")
    )
    drawn = (tmp_path / "timeline.txt").read_text("utf-8").splitlines()
    assert "update/2" in "".join(drawn)
    assert text.endswith(f"{drawn[-1]}\n--- the console is empty")


def test_either_end_of_a_failure_says_why(tmp_path) -> None:
    test_failure_shows_the_last_records_of_each_boots_journal_and_the_timeline(tmp_path)
    with pytest.raises(LabRunFailed) as caught:
        ran(tmp_path, [BOOT], UP, console=PANIC).check()
    lines = str(caught.value).splitlines()
    why = "kernel panic after boot 0, step 'boot': luo: bad"
    assert lines[0].startswith(why)
    assert why in lines[-1]
    assert lines[-1].startswith("[ 2.0] Kernel panic")


def test_journal_that_cannot_be_read_does_not_hide_the_failure(tmp_path) -> None:
    (tmp_path / "state" / "luod").mkdir(parents=True)
    (tmp_path / "state" / "luod" / "journal.db").write_bytes(b"no journal")
    draw(tmp_path)
    with pytest.raises(LabRunFailed, match="stopped in boot 0"):
        ran(tmp_path, [BOOT], UP).check()
    assert (tmp_path / "timeline.txt").read_text("utf-8") == "no update in this journal\n"


def test_next_command_line_is_the_same_or_has_other_live_update_arguments() -> None:
    assert next_cmdline(LINE, None) == LINE
    assert next_cmdline(LINE, "kho=on") == "console=ttyS0 ro quiet init=/bin/python kho=on -- -I -S guest.py"
    assert "liveupdate" not in next_cmdline(LINE, "")


@needs_e2fsprogs
def test_state_disk_gives_back_what_was_put_on_it(tmp_path) -> None:
    content = tmp_path / "content"
    (content / "lab").mkdir(parents=True)
    (content / "lab/script.json").write_text("{}")
    (content / "luod.db").write_bytes(os.urandom(100_000))
    make_state_disk(tmp_path / "state.img", content, 16)
    before = (tmp_path / "state.img").read_bytes()
    read_state_disk(tmp_path / "state.img", tmp_path / "state")
    assert (tmp_path / "state/luod.db").read_bytes() == (content / "luod.db").read_bytes()
    assert (tmp_path / "state/lab/script.json").read_text() == "{}"
    assert (tmp_path / "state.img").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["content", "state", "state.img"]


@needs_e2fsprogs
def test_image_that_is_no_disk_is_an_error(tmp_path) -> None:
    (tmp_path / "state.img").write_bytes(bytes(1 << 20))
    with pytest.raises(LabError, match=r"state\.img"):
        read_state_disk(tmp_path / "state.img", tmp_path / "state")


def test_missing_tools_are_named_with_their_package(monkeypatch, tmp_path) -> None:
    with pytest.raises(LabUnavailable, match="apt-get install e2fsprogs"):
        find_tool("no-such-mke2fs", "e2fsprogs")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabUnavailable, match="install-qemu"):
        accel.qemu()


# -- the machine ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path, image):
    return read_image(image(tmp_path / "bzImage-7.3.4", "7.3.4-luo"))


@pytest.fixture
def fake_qemu(tmp_path, monkeypatch):
    """Put a program in QEMU's place; returns a function that says what the program does."""
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / accel.QEMU

    def does(text: str) -> Path:
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return program

    does("exit 1")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return does


def test_kvm_counts_only_when_a_guest_boots_with_it(tmp_path, kernel, fake_qemu) -> None:
    device, count = tmp_path / "kvm", tmp_path / "count"
    shows_root = f"echo x >>{count}; for word; do case $word in file:*) echo 'Unable to mount root fs' >${{word#file:}};; esac; done"
    assert accel.acceleration(kernel, device=device, cache=tmp_path) == accel.TCG
    parallel = accel.acceleration(kernel, parallel=True, device=device, cache=tmp_path)
    assert parallel == accel.PARALLEL_TCG != accel.TCG
    device.touch()
    fake_qemu(f"echo x >>{count}; echo 'KVM internal error'")
    for _ in range(2):
        assert accel.acceleration(kernel, device=device, cache=tmp_path) == accel.TCG
    assert count.read_text().count("x") == 1
    os.utime(fake_qemu(shows_root), ns=(0, 1))
    for _ in range(2):
        assert accel.acceleration(kernel, device=device, cache=tmp_path) == accel.KVM
    assert count.read_text().count("x") == 2


@needs_e2fsprogs
def test_qemu_that_cannot_start_is_reported_with_its_words(tmp_path, kernel, fake_qemu) -> None:
    fake_qemu("echo 'qemu: no such machine' >&2; exit 1")
    lab = Machine(kernel, tmp_path / "run", state_mib=16).run(
        [Boot([run("one", ["/bin/true"])])], timeout_s=10
    )
    with pytest.raises(LabRunFailed, match="no such machine"):
        lab.check()


def test_directory_with_other_things_in_it_is_not_emptied(tmp_path, kernel, fake_qemu) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.txt").write_text("x")
    with pytest.raises(LabError, match="holds no earlier lab run"):
        Machine(kernel, place).run([BOOT], timeout_s=10)
    assert (place / "thesis.txt").exists()


def test_guest_sees_what_lies_below_the_directories_it_covers(
    tmp_path, kernel, fake_qemu, monkeypatch
) -> None:
    machine = Machine(kernel, tmp_path / "run", state_mib=16, show=[Path("/run/lock")])
    machine.prepare([Boot([python("one", "platform", tmp_path)])])
    shown = (tmp_path / "run/script.json").read_text()
    assert f'"{tmp_path}"' in shown


def test_command_line_puts_init_and_its_arguments_last(tmp_path, kernel, fake_qemu) -> None:
    line = Machine(kernel, tmp_path / "run").command_line("liveupdate=off")
    kernel_part, init_part = line.split(" -- ")
    assert "liveupdate=off init=" in kernel_part
    assert {"no_timer_check", "tsc=nowatchdog"} <= set(kernel_part.split())
    assert init_part.endswith("guest.py")
