# SPDX-License-Identifier: Apache-2.0
"""The sync of the real kernel: beside the process that wants it, with nothing of that process, and no trace left of it."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from pathlib import Path

import pytest

from luod.adapters.liveupdate import syscalls
from luod.adapters.liveupdate.device import LiveUpdate
from luod.adapters.liveupdate.errors import KernelError
from luod.adapters.liveupdate.syscalls import RealSyscalls

PATIENCE_S = 30.0
Program = Callable[[str], LiveUpdate]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Program:
    """The port on the real kernel, with another program in the place of the one that calls sync(2)."""

    def port(program: str) -> LiveUpdate:
        monkeypatch.setattr(syscalls, "SYNC", program)
        return LiveUpdate(RealSyscalls())

    return port


def ended(fd: int, patience_s: float = PATIENCE_S) -> bool:
    return bool(select.select([fd], [], [], patience_s)[0])


def process_of(pidfd: int) -> int:
    (line,) = [
        one for one in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines() if one[:4] == "Pid:"
    ]
    return int(line.split()[1])


def test_what_runs_is_the_system_call() -> None:
    called: list[str] = []
    exec(syscalls.SYNC, {"posix": type("posix", (), {"sync": lambda: called.append("sync")})})
    assert called == ["sync"]


def test_it_ends_by_itself_and_is_reaped(running: Program) -> None:
    kernel = running("pass")
    fd = kernel.sync()
    try:
        assert ended(fd)
        kernel.synced(fd)
        with pytest.raises(ChildProcessError):
            os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
    finally:
        os.close(fd)


def test_one_that_hangs_is_waited_for_by_nobody_and_holds_nothing(running: Program, tmp_path: Path) -> None:
    """It has none of the caller's descriptors: they would outlive a caller that is killed meanwhile."""
    gate, word = tmp_path / "gate", tmp_path / "word"
    os.mkfifo(gate)
    os.mkfifo(word)
    kernel = running(
        f"posix.close(posix.open({str(word)!r}, posix.O_WRONLY)); posix.open({str(gate)!r}, posix.O_RDONLY)"
    )
    ours = os.open(os.devnull, os.O_WRONLY)
    os.set_inheritable(ours, True)
    fd = kernel.sync()
    try:
        assert word.read_bytes() == b"", "it runs"
        assert not ended(fd, 0)
        pid = process_of(fd)
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
        assert {os.readlink(f"/proc/{pid}/fd/{one}") for one in range(3)} == {os.devnull}
        assert os.getsid(pid) == pid, "what ends the caller's terminal must not end it"
        os.close(os.open(gate, os.O_WRONLY))
        assert ended(fd)
        kernel.synced(fd)
    finally:
        os.close(fd)
        os.close(ours)


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "posix.kill(posix.getpid(), 9)"])
def test_one_that_did_not_come_to_its_end_is_no_success(running: Program, program: str) -> None:
    kernel = running(program)
    fd = kernel.sync()
    try:
        assert ended(fd)
        with pytest.raises(KernelError, match="sync"):
            kernel.synced(fd)
    finally:
        os.close(fd)


def test_no_process_can_be_made(running: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls.sys, "executable", "/nowhere/python")
    with pytest.raises(KernelError, match="ENOENT"):
        running("pass").sync()
