# SPDX-License-Identifier: Apache-2.0
"""The emulator as a process: who dies at a reboot, how it starts and ends, and what it does with slow and broken callers."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated_world import Child, in_thread, load

from luod.adapters.emulator.control import Control
from luod.adapters.emulator.process import Emulator
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate.device import LiveUpdate
from luod.adapters.liveupdate.errors import (
    DeviceAbsent,
    SessionGone,
)

# -- who dies ------------------------------------------------------------------------------------------------------------------


def test_a_kexec_kills_the_world_and_only_it(emulator: Emulator, control: Control) -> None:
    def caller(tell: Callable[[bytes], None]) -> None:
        open_kernel("emulated", directory=emulator.directory).create_session("caller")
        tell(b"x")

    def bystander(tell: Callable[[bytes], None]) -> None:
        open_kernel("emulated", directory=emulator.directory).boot_id()
        tell(b"x")

    inside, outside = Child(caller), Child(bystander)
    assert (inside.heard(), outside.heard()) == (b"x", b"x")
    assert control.state()["members"] == [inside.pid]
    load(emulator)
    before = control.boot_id()
    after = control.kexec()
    assert inside.ended_by() == signal.SIGKILL
    assert after != before
    assert control.boot_id() == after
    state = control.state()
    assert (state["boot"], state["members"], state["loaded"], state["outgoing"]) == (2, [], False, [])
    os.kill(outside.pid, 0)
    outside.kill()


def test_attached_processes_die_with_their_descendants(emulator: Emulator, control: Control) -> None:
    def body(tell: Callable[[bytes], None]) -> None:
        if os.fork() == 0:
            os.setsid()
            tell(b"grandchild %d" % os.getpid())
            while True:
                signal.pause()

    child = Child(body)
    grandchild = int(child.heard().split()[1])
    pidfd = os.pidfd_open(grandchild)
    control.attach(child.pid)
    control.cold_reboot()
    assert child.ended_by() == signal.SIGKILL
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_a_session_passed_on_makes_its_caller_a_member(kernel: LiveUpdate, control: Control) -> None:
    session = kernel.create_session("passed")

    def body(tell: Callable[[bytes], None]) -> None:
        assert kernel.session_name(session) == "passed"
        tell(b"x")

    child = Child(body)
    child.heard()
    assert control.state()["members"] == [child.pid]
    child.kill()
    os.close(session)


def test_the_dead_are_forgotten(emulator: Emulator, control: Control) -> None:
    child = Child(
        lambda tell: tell(b"%d" % open_kernel("emulated", directory=emulator.directory).create_session("x"))
    )
    child.heard()
    child.kill()
    open_kernel("emulated", directory=emulator.directory).scratch("x")  # its session went with it
    assert control.state()["members"] == []


def test_a_spared_process_keeps_dead_sessions(
    emulator: Emulator, control: Control, kernel: LiveUpdate
) -> None:
    session = kernel.create_session("dead")
    load(emulator)
    control.kexec()
    with pytest.raises(SessionGone) as caught:
        kernel.session_name(session)
    assert caught.value.errno == errno.ENODEV
    os.close(session)
    again = kernel.retrieve_session("dead")
    assert kernel.session_name(again) == "dead"
    os.close(again)


def test_reboot_by_a_member_kills_it(emulator: Emulator, control: Control) -> None:
    load(emulator)
    before = control.boot_id()
    child = Child(lambda _: open_kernel("emulated", directory=emulator.directory).kexec())
    assert control.wait_boot(before) != before
    assert child.ended_by() == signal.SIGKILL


# -- the process ---------------------------------------------------------------------------------------------------------------


def test_no_emulator(tmp_path: Path) -> None:
    kernel = open_kernel("emulated", directory=tmp_path)
    assert kernel.status().state == "absent"
    with pytest.raises(DeviceAbsent, match="no emulator is running") as caught:
        kernel.create_session("x")
    assert caught.value.errno == errno.ENOENT
    with Emulator.start(tmp_path) as emulator, emulator.control() as control:
        control.shutdown()
    assert kernel.status().state == "absent"


def test_a_killed_emulator_leaves_no_caller_waiting(tmp_path: Path) -> None:
    with Emulator.start(tmp_path) as emulator, emulator.control(timeout=30) as control:
        kernel = open_kernel("emulated", directory=tmp_path)
        session = kernel.create_session("x")
        fault = control.inject("call", op="GET_NAME")
        thread, result = in_thread(lambda: kernel.session_name(session))
        control.wait_hit(fault)
        os.kill(emulator.pid, signal.SIGKILL)
        thread.join(30)
        assert isinstance(result[0], SessionGone)
        os.close(session)
    assert open_kernel("emulated", directory=tmp_path).status().state == "absent"


def test_one_emulator_a_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Emulator.start(tmp_path) as emulator:
        with pytest.raises(DeviceAbsent, match="ended at once"):
            Emulator.start(tmp_path)
        assert "another emulator serves" in capfd.readouterr().err
        open_kernel("emulated", directory=emulator.directory).scratch("x")
    with Emulator.start(tmp_path) as emulator:
        open_kernel("emulated", directory=emulator.directory).scratch("x")


def test_start_reports_a_bad_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("no kernel")
    with pytest.raises(DeviceAbsent, match="ended at once"):
        Emulator.start(tmp_path, image=tmp_path / "image")


def test_the_emulator_ends_with_its_starter(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from luod.adapters.emulator.process import Emulator;"
        "print(Emulator.start(Path(sys.argv[1])).pid, flush=True); sys.stdin.read()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert starter.stdout is not None
    pidfd = os.pidfd_open(int(starter.stdout.readline()))
    starter.kill()
    starter.communicate()
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_a_directory_longer_than_a_socket_path(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    with Emulator.start(directory) as emulator:
        open_kernel("emulated", directory=emulator.directory).scratch("x")


def test_first_kernel_without_live_update(tmp_path: Path) -> None:
    with Emulator.start(tmp_path, cmdline="quiet") as emulator, emulator.control() as control:
        kernel = open_kernel("emulated", directory=tmp_path)
        assert kernel.status().state == "disabled"
        load(emulator)
        control.kexec()
        kernel.scratch("x")


def test_terminate(tmp_path: Path) -> None:
    with Emulator.start(tmp_path) as emulator:
        os.kill(emulator.pid, signal.SIGTERM)
        emulator.stop()
    assert not (tmp_path / "liveupdate").exists()
    assert not (tmp_path / "control").exists()
