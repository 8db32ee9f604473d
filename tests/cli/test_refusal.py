# SPDX-License-Identifier: Apache-2.0
"""What cannot work says so in one line, with what to do, by the right exit code, and loses nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from luoctl_process import Answer, Luoctl, fingerprint
from luod_world import PATIENCE_S, World

TALKERS: list[tuple[str, ...]] = [
    ("list",), ("status",), ("sessions",), ("session", "vm1"), ("clients",), ("abort",), ("wait",), ("kexec",),
    ("load", "/boot/x", "--cmdline", ""), ("resolve", "a/b", "done"), ("journal", "show"), ("journal", "replay"),
    ("journal", "verify"), ("journal", "export"), ("journal", "timeline"), ("journal", "why", "vm1"),
]  # fmt: skip


def check(answer: Answer, code: int, message: str, hint: str) -> None:
    first, last = answer.err.splitlines()
    assert (answer.code, answer.out) == (code, ""), answer
    assert first.startswith("luoctl: ")
    assert message in first
    assert last.startswith("hint: ")
    assert hint in last


def test_no_luod(tmp_path: Path) -> None:
    nobody = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(nobody))
    (tmp_path / "file").write_text("")
    for place, message, hint in (
        (tmp_path / "none.sock", "there is no such socket", "start luod"),
        (nobody, "nobody listens", "start it again"),
        (tmp_path, "it is a directory", f"--socket {tmp_path}/liveupdate.sock"),
        (tmp_path / ("x" * 120), "cannot be luod's socket", "check the path"),
    ):
        luoctl = Luoctl(place)
        for words in TALKERS:
            check(luoctl(*words), 3, message, hint)
    assert Luoctl(nobody)("status", "--json").json["error"]["code"] == "UNREACHABLE"


def test_luod_that_does_not_speak_its_protocol(tmp_path: Path) -> None:
    path = tmp_path / "odd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = Luoctl(path).start("status")
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        out, err = process.communicate(timeout=PATIENCE_S)
    check(Answer(process.returncode, out, err), 3, "luod broke the protocol", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[deadlines]\nfreese_s = 1\n", "freese_s"),
        ("colour = 1\n", "colour"),
        ('[deadlines]\nfreeze_s = "long"\n', "Expected `float`"),
        ("[deadlines]\nfreeze_s = -1\n", ">= 0"),
        ('kernel = "windows"\n', "windows"),
        ('kernel = "emulated"\n', "needs the emulator's directory"),
        ("this is = = not TOML\n", "is not TOML"),
        ("\x00\xff", ""),
    ],
)
def test_bad_settings(offline: Luoctl, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "luod.toml"
    file.write_text(text, encoding="latin-1")
    answer = offline("check-config", file)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"luoctl: configuration {file}" if "emulated" not in text else "luoctl: ")
    assert message in answer.err
    assert answer.err.splitlines()[1].startswith("hint: ")
    assert len(answer.err.splitlines()) == 2
    assert offline("check-config", file, "--json").json["error"]["code"] == "CONFIG_ERROR"


def test_settings_that_are_no_file(offline: Luoctl, tmp_path: Path) -> None:
    assert "does not exist" in offline("check-config", tmp_path / "none").err
    assert "cannot be read" in offline("check-config", tmp_path).err


def test_good_settings(offline: Luoctl, tmp_path: Path) -> None:
    file = tmp_path / "luod.toml"
    file.write_text("[deadlines]\nfreeze_s = 3\n")
    answer = offline("check-config", file, "--json")
    assert answer.code == 0
    assert answer.json["config"]["deadlines"]["freeze_s"] == 3
    assert answer.json["config"]["run_dir"] == "/run/luod"
    assert "  deadlines.freeze_s = 3" in offline("check-config", file).out


def luod(*words: object) -> Answer:
    done = subprocess.run(
        [sys.executable, "-m", "luod.daemon", *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    return Answer(done.returncode, done.stdout, done.stderr).clean()


def test_second_luod(world: World, luoctl: Luoctl, disk_path: Path) -> None:
    emulated = ("--kernel", "emulated", "--emulator", world.emulator_dir)
    before = fingerprint(world.state)
    same_run = luod(*emulated, "--run", world.run, "--state", disk_path / "other")
    assert same_run.code == 3
    assert f"another luod (pid {world.luod.pid if world.luod else 0}) serves {world.run}" in same_run.err
    assert not (disk_path / "other" / "journal.db").exists()
    other_run = disk_path / "run"
    other_run.mkdir()
    os.symlink(world.run / "keeper.sock", other_run / "keeper.sock")
    same_journal = luod(*emulated, "--run", other_run, "--state", world.state)
    assert same_journal.code == 1
    assert str(world.state) in same_journal.err
    assert fingerprint(world.state) == before
    assert luoctl("status").code == 0, "the first one goes on"


def test_no_device(tmp_path: Path) -> None:
    if Path("/dev/liveupdate").exists():
        pytest.skip("this kernel has one")
    answer = luod(
        "--kernel", "device", "--run", tmp_path / "run", "--state", tmp_path / "state", "--volatile"
    )
    assert answer.code == 3
    assert "hint: " in answer.err
    assert not (tmp_path / "state").exists()


def test_a_kernel_that_is_gone(world: World, luoctl: Luoctl) -> None:
    world.control.inject("open", errno=5, times=100)
    answer = luoctl("status", "--json")
    assert (answer.code, answer.json["kernel"]["state"]) == (3, "broken")
    assert luoctl("status").code == 3
    world.control.clear_faults()
    assert luoctl("status").code == 0


def test_start_up_is_light() -> None:
    """A look at luod loads neither SQLite nor the state machines nor the demo."""
    heavy = {"sqlite_utils", "sqlite3", "pysqlite3", "transitions", "anyio", "asyncio", "rich", "qemu"}
    code = (
        "import sys; from luod.cli.program import run; assert run(['--socket', '/none', 'status']) == 3; "
        "print(*sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert heavy & {name.partition(".")[0] for name in out.stdout.split()} == set()
