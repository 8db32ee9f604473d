# SPDX-License-Identifier: Apache-2.0
"""The keeper as a process, over the emulated kernel: how it starts, what ends it, and what outlives luod."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from keeper_rig import PATIENCE_S, closing

from luod.adapters.emulator.process import Emulator
from luod.adapters.keeper.client import Keeper as Client
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate.errors import SessionUnknown

NAME = "luod.vm1.1"
COMMAND = [sys.executable, "-m", "luod.adapters.keeper"]


class Process:
    def __init__(self, run: Path, emulator: Path, *more: str, environ: dict[str, str] | None = None) -> None:
        ready, ready_end = os.pipe()
        argv = [*COMMAND, "--dir", str(run), "--kernel", "emulated", "--emulator", str(emulator), *more]
        self.popen = subprocess.Popen(
            [*argv, "--ready-fd", str(ready_end)], pass_fds=(ready_end,), stderr=subprocess.PIPE,
            env={**os.environ, **(environ or {})},
        )  # fmt: skip
        os.close(ready_end)
        with open(ready, "rb", buffering=0) as pipe:
            assert pipe.read(1) == b"\n", self.popen.communicate()[1]
        self.client = Client(run, timeout=PATIENCE_S)

    def said(self) -> str:
        assert self.popen.stderr is not None
        return self.popen.stderr.readline().decode()

    def ended(self) -> int:
        code = self.popen.wait(PATIENCE_S)
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return code

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
            self.ended()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Emulator]:
    running = Emulator.start(tmp_path / "emu")
    yield running
    running.stop()


@pytest.fixture
def emulator(machine: Emulator) -> Path:
    return machine.directory


@pytest.fixture
def keeper(tmp_path: Path, emulator: Path) -> Iterator[Process]:
    with Process(tmp_path / "run", emulator) as running:
        yield running


def test_sessions_outlive_the_luod_that_asked_for_them(
    keeper: Process, tmp_path: Path, emulator: Path
) -> None:
    kernel = open_kernel("emulated", directory=emulator)
    luod = subprocess.Popen([sys.executable, "-c", LUOD, str(tmp_path / "run"), NAME], stdout=subprocess.PIPE)
    assert luod.stdout is not None
    assert luod.stdout.readline() == b"held\n"
    luod.kill()
    luod.wait(PATIENCE_S)
    luod.stdout.close()
    again = Client(tmp_path / "run")
    assert again.names() == [NAME]
    fd = again.get(NAME)
    assert fd is not None
    with closing(fd), closing(again.create(NAME)) as (same,):
        assert kernel.session_name(fd) == kernel.session_name(same) == NAME


LUOD = """
import sys, signal
from pathlib import Path
from luod.adapters.keeper.client import Keeper
fd = Keeper(Path(sys.argv[1])).create(sys.argv[2])
print("held", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("at", ["call", "reply"])
def test_luod_killed_while_the_kernel_works(
    keeper: Process, machine: Emulator, tmp_path: Path, at: str
) -> None:
    """Whether the session was not yet made or already made when luod died: it is made once, and held."""
    with machine.control(timeout=PATIENCE_S) as control:
        fault = control.inject(at, op="CREATE_SESSION", session=NAME)
        luod = subprocess.Popen(
            [sys.executable, "-c", LUOD, str(tmp_path / "run"), NAME], stdout=subprocess.PIPE
        )
        control.wait_hit(fault)
        luod.kill()
        luod.wait(PATIENCE_S)
        assert luod.stdout is not None
        luod.stdout.close()
        assert keeper.client.names() == [], "the keeper serves others meanwhile"
        control.release(fault)
        with closing(keeper.client.create(NAME)) as (fd,):
            assert open_kernel("emulated", directory=machine.directory).session_name(fd) == NAME
        assert [(call["op"], call["session"]) for call in control.audit()] == [("CREATE_SESSION", NAME)]
    assert keeper.client.names() == [NAME]


def test_the_kernel_refuses_through_the_keeper(keeper: Process) -> None:
    with pytest.raises(SessionUnknown, match="RETRIEVE_SESSION"):
        keeper.client.retrieve("luod.never.1")


def test_removing_the_last_copy_lets_the_kernel_forget(keeper: Process) -> None:
    for _ in range(3):
        with closing(keeper.client.create(NAME)):
            pass
        keeper.client.remove(NAME)  # were it still there, the next CREATE_SESSION would be refused


def test_it_says_the_boot_in_which_it_was_started(keeper: Process, emulator: Path) -> None:
    assert keeper.client.boot_id() == open_kernel("emulated", directory=emulator).boot_id()


def test_sigterm_ends_it_when_it_holds_nothing(keeper: Process) -> None:
    keeper.popen.terminate()
    assert keeper.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_routine_stop_loses_nothing(keeper: Process, number: signal.Signals) -> None:
    with closing(keeper.client.create(NAME)):
        pass
    keeper.popen.send_signal(number)
    assert f"1 fds are held, so {number.name} does not end this process" in keeper.said()
    assert keeper.client.names() == [NAME]
    keeper.popen.send_signal(number)
    assert keeper.ended() == 0


def test_a_closing_terminal_does_not_end_it(keeper: Process) -> None:
    keeper.popen.send_signal(signal.SIGHUP)
    assert keeper.client.names() == []


def test_nobody_listening_to_stderr_does_not_end_it(keeper: Process) -> None:
    with closing(keeper.client.create(NAME)):
        pass
    assert keeper.popen.stderr is not None
    keeper.popen.stderr.close()
    keeper.popen.terminate()
    assert keeper.client.names() == [NAME]


def test_a_second_keeper_is_refused(keeper: Process, tmp_path: Path, emulator: Path) -> None:
    with closing(keeper.client.create(NAME)):
        pass
    argv = [*COMMAND, "--dir", str(tmp_path / "run"), "--kernel", "emulated", "--emulator", str(emulator)]
    second = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert second.returncode == 3
    assert "another luod-keeper serves" in second.stderr
    assert "Traceback" not in second.stderr
    assert keeper.client.names() == [NAME]


def test_the_sockets_of_a_killed_keeper_are_taken_over(
    keeper: Process, tmp_path: Path, emulator: Path
) -> None:
    keeper.popen.kill()
    keeper.ended()
    with Process(tmp_path / "run", emulator) as heir:
        assert heir.client.names() == []


def test_it_tells_whoever_started_it(tmp_path: Path, emulator: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.bind(str(tmp_path / "notify"))
        with Process(tmp_path / "run", emulator, environ={"NOTIFY_SOCKET": str(tmp_path / "notify")}):
            assert sock.recv(100) == b"READY=1"


def test_nobody_listening_for_readiness_does_not_end_it(tmp_path: Path, emulator: Path) -> None:
    with Process(tmp_path / "run", emulator, environ={"NOTIFY_SOCKET": str(tmp_path / "gone")}) as running:
        assert running.client.names() == []


def test_over_the_limit(tmp_path: Path, emulator: Path) -> None:
    with Process(tmp_path / "run", emulator, "--max", "1") as running:
        with closing(running.client.create(NAME)):
            pass
        with pytest.raises(Exception, match="the limit is 1"):
            running.client.create("luod.vm2.1")


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--kernel", "emulated"], 2, "--emulator DIR go together"),
        (["--emulator", "/nowhere"], 2, "--emulator DIR go together"),
        (["--kernel", "emulated", "--emulator", "/nowhere"], 3, "/nowhere"),
    ],
)
def test_mistakes(tmp_path: Path, argv: list[str], code: int, says: str) -> None:
    result = subprocess.run(
        [*COMMAND, "--dir", str(tmp_path), *argv], capture_output=True, text=True, check=False
    )
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert says in result.stderr


def test_it_is_small() -> None:
    """What it does not import cannot break it, and it starts at once."""
    heavy = [
        "anyio",
        "asyncio",
        "click",
        "rich",
        "sqlite3",
        "pysqlite3",
        "sqlite_utils",
        "transitions",
        "hypothesis",
    ]
    code = f"import sys, luod.adapters.keeper.__main__; print([one for one in {heavy} if one in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
