# SPDX-License-Identifier: Apache-2.0
"""The disk is full, slow to remember, or tells another story; and the device is busy."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_scene import Actor, Scene

from luod.journal.replay import Replay
from luod.journal.verify import verify


def start_anyway(scene: Scene) -> subprocess.CompletedProcess[str]:
    """Start a luod that is expected to refuse, and return how it ended."""
    world = scene.world
    args = ["--config", world.config, "--kernel", "emulated", "--emulator", world.emulator_dir]
    places = ["--state", world.state, "--run", world.run]
    return subprocess.run(
        [sys.executable, "-m", "luod.daemon", *map(str, [*args, *places])],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def files(scene: Scene) -> dict[str, bytes]:
    return {
        one.name: one.read_bytes() for one in sorted(scene.world.state.iterdir()) if one.suffix != ".lock"
    }


def fill(scene: Scene) -> None:
    """From now on luod's files cannot grow, nor change behind their first bytes: to the journal the disk is full."""
    assert scene.world.luod is not None
    resource.prlimit(scene.world.luod.pid, resource.RLIMIT_FSIZE, (1, 1))


# -- F11


@pytest.mark.parametrize("when", ["preserving", "ready"])
def test_f11_the_disk_is_full_before_the_kexec(scene: Scene, when: str) -> None:
    """No record, no kexec: luod ends with 70. The clients keep running, and a restart settles what was in doubt."""
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    if when == "ready":
        vm1.say("READY")
    fill(scene)
    vm2.last_word()
    assert scene.world.luod is not None
    assert scene.world.luod.wait() == 70
    assert scene.control.boot_id() == scene.world.boot_id, "there was no kexec"
    assert scene.outgoing() == {"luod.vm1.1", "luod.vm2.1"}, "the second holder has them"
    scene.world.start_luod()
    assert scene.update()["state"] == "preparing"
    for actor in (vm1, vm2):
        actor.reconnect()
        actor.subscribe()
    for actor in (vm1, vm2):
        if scene.state(actor.name) != "ready":
            actor.last_word()
    scene.arrive()
    for actor in [scene.actor("vm1"), scene.actor("vm2")]:
        actor.say("CLAIM")
        actor.restore()
        actor.finish_and_say()
    scene.wait("update.done", "update/1")


# -- F16, F32: the disk comes back with less than it was told


def two_ready(scene: Scene) -> tuple[Actor, Actor]:
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    vm1.say("READY")
    return vm1, vm2


def snapshot(scene: Scene) -> Path:
    copy = scene.world.dir / "older"
    shutil.copytree(scene.world.state, copy)
    return copy


def arrive_with(scene: Scene, state: Path) -> None:
    """Wait for the kexec, put another state directory in place of luod's, and start the second holder only."""
    world = scene.world
    world.control.wait_boot(world.boot_id)
    scene.bury()
    world.boot_id = world.control.boot_id()
    shutil.rmtree(world.state)
    shutil.copytree(state, world.state)
    world.start_keeper()


def test_f32_the_journal_has_lost_its_last_rows(scene: Scene) -> None:
    """The black box has them: they are taken over, and the update completes."""
    _, vm2 = two_ready(scene)
    older = snapshot(scene)
    vm2.last_word()
    arrive_with(scene, older)
    scene.world.start_luod()
    assert "records over from the black box" in scene.log()
    update = scene.update()
    assert (update["state"], update["box"]) == ("recovering", "merged")
    assert "ready" in scene.types("vm2.1")
    for actor in [scene.actor("vm1"), scene.actor("vm2")]:
        actor.say("CLAIM")
        actor.restore()
        actor.finish_and_say()
    assert scene.wait("update.done", "update/1")["finished"] == 2
    scene.stop_luod()
    assert verify(scene.journal()).damage == ()


def test_f32_the_journal_tells_another_story(scene: Scene) -> None:
    """Another luod wrote to a copy meanwhile: neither is believed, nothing is written, nothing is lost."""
    _, vm2 = two_ready(scene)
    older = snapshot(scene)
    vm2.last_word()
    arrive_with(scene, older)
    world = scene.world
    other = subprocess.run(
        [sys.executable, "-c", APPEND, str(scene.journal())], capture_output=True, text=True, check=False
    )
    assert other.returncode == 0, other.stderr
    before = replayed(scene)
    for _ in range(2):
        refused = start_anyway(scene)
        assert refused.returncode == 4, refused.stderr
        assert "differs between the black box and the disk" in refused.stderr
        assert "hint: " in refused.stderr
        assert "Traceback" not in refused.stderr
    assert replayed(scene) == before
    assert scene.incoming() == {"luod.vm1.1", "luod.vm2.1"}
    world.luod = None


APPEND = """
import sys
from luod.journal.record import Entry
from luod.journal.writer import Journal
from luod.states import events as ev
with Journal.open(sys.argv[1], boot_id="elsewhere", run_id="other") as journal:
    journal.append([Entry("luod", ev.DaemonStarted("0", "emulated", 1))])
"""


def replayed(scene: Scene) -> list[tuple[int, bytes]]:
    with Replay(scene.journal()) as replay:
        return [(record.id, record.chain) for record in replay]


# -- F33: a journal of another machine, or of another time


def test_f33_the_journal_of_another_machine(scene: Scene, tmp_path: Path) -> None:
    """It does not hang together with what the kernel brought: luod refuses to act on it."""
    _, vm2 = two_ready(scene)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    made = subprocess.run(
        [sys.executable, "-c", APPEND.replace("(sys.argv[1],", "(sys.argv[1], volatile=True,"),
         str(foreign / "journal.db")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    vm2.last_word()
    arrive_with(scene, foreign)
    refused = start_anyway(scene)
    assert refused.returncode == 4
    assert "black box" in refused.stderr
    assert scene.incoming() == {"luod.vm1.1", "luod.vm2.1"}
    scene.world.luod = None


def test_f33_an_old_backup_in_a_cold_boot(scene: Scene) -> None:
    """Restored from a backup in the middle of an update, on a machine that booted cold: lost, and nothing else is believed."""
    vm1, vm2 = two_ready(scene)
    older = snapshot(scene)
    scene.abort()
    vm1.let_go()
    vm2.let_go()
    scene.wait("update.aborted", "update/1")
    scene.stop_luod()
    scene.control.cold_reboot()
    scene.bury()
    shutil.rmtree(scene.world.state)
    shutil.copytree(older, scene.world.state)
    scene.world.boot()
    assert scene.status()["sessions"] == {"lost": 2}
    assert scene.update()["state"] == "lost"


# -- F35


def test_f35_a_record_in_the_middle_is_damaged(scene: Scene) -> None:
    """luod refuses to act on it and writes nothing; what is before and behind the damage can be read."""
    scene.join("vm1", "vm2")
    scene.stop_luod()
    path = scene.journal()
    data = bytearray(path.read_bytes())
    at = data.index(b'"vm1"')
    data[at + 1] = ord("w")
    path.write_bytes(data)
    before = files(scene)
    refused = start_anyway(scene)
    assert refused.returncode == 4, refused.stderr
    assert "journal.db" in refused.stderr
    assert "hint: " in refused.stderr
    assert files(scene) == before
    with Replay(path) as replay:
        assert {record.stream for record in replay} >= {"luod", "vm2.1"}
        assert replay.report().damage
    scene.world.luod = None


# -- F04


def test_f04_the_device_is_busy(scene: Scene) -> None:
    """Somebody else has it: the update ends when the patience ends, and says so; afterwards it works again."""
    world = scene.world
    (vm1,) = scene.join("vm1")
    device = world.kernel.syscalls.open_device()
    try:
        scene.kexec()
        assert "EBUSY" in scene.wait("update.aborted", "update/1")["reason"]
        assert scene.status()["kernel"]["state"] == "busy"
        assert scene.status()["kernel"]["hint"]
    finally:
        os.close(device)
    scene.kexec()
    vm1.start()
    vm1.last_word()
    scene.arrive()


def test_f04_the_device_is_busy_for_a_moment(scene: Scene) -> None:
    (vm1,) = scene.join("vm1")
    device = scene.world.kernel.syscalls.open_device()
    scene.kexec()
    scene.wait("effect.intended", "luod")
    os.close(device)
    vm1.start()
    vm1.last_word()
    scene.arrive()


def test_f04_a_second_luod_refuses(scene: Scene) -> None:
    (vm1,) = scene.join("vm1")
    refused = start_anyway(scene)
    assert refused.returncode == 3
    assert scene.world.luod is not None
    assert f"another luod (pid {scene.world.luod.pid})" in refused.stderr
    assert vm1.call("PING") == {}
    assert scene.world.luod.end(signal.SIGTERM) == 0
