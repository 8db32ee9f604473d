# SPDX-License-Identifier: Apache-2.0
"""luo-qemu is killed at every point around every effect and started again: its guest neither notices nor is it ever lost.

Killed at one point, the next one is killed at the next, and so on: each finds what all those before it have left.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from wrapper_rig import Host, Tenant

from luod.engine.points import STAGES

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

RESTORE = [
    "qemu.retrieve#record", "qemu.retrieve#ram0", "qemu.retrieve", "qemu.check", "qemu.start", "qemu.load", "qemu.resume", "finish",
]  # fmt: skip
FREEZE = ["preserve/0x100/ram0", "preserve/0x10/record", "pause", "save", "record", "vmstate"]
FINAL = {"qemu.resume:after_outcome", "finish:after_outcome"}
"""Not reached once the effect has been found done: they get a restore of their own."""

DIES_BEFORE_CONT = """
import os, signal
from luod.adapters.qemu import operations
from luod.qemu import command
operations.Resume.apply = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
command.main()
"""


def started_to_be_killed(guest: Tenant, point: str, trace: Path, *, wait: bool) -> None:
    guest.start("--crash-at", f"/{point}", "--crash-trace", trace, wait=wait)


def killed(guest: Tenant, point: str, trace: Path) -> None:
    assert guest.wait() == -signal.SIGKILL, guest.words()
    assert trace.read_text().splitlines()[-1].endswith(f"/{point}")


def test_killed_at_every_point_of_a_launch(host: Host, tmp_path: Path) -> None:
    for name, stages in (("vm1", STAGES[:3]), ("vm2", STAGES[3:])):
        guest = host.tenant(name)
        for stage in stages:
            started_to_be_killed(guest, f"launch:{stage}", tmp_path / f"{name}{stage}", wait=False)
            killed(guest, f"launch:{stage}", tmp_path / f"{name}{stage}")
        guest.start()
        guest.whole()
        assert "adopted QEMU" in guest.words()


def test_killed_at_every_point_of_a_freeze(host: Host, tmp_path: Path) -> None:
    """The update is undone each time, and the guest goes on as soon as there is a luo-qemu again."""
    guest = host.tenant()
    guest.start()
    guest.speak()
    qemu = guest.qemu
    guest.kill()
    for number, point in enumerate((f"{effect}:{stage}" for effect in FREEZE for stage in STAGES), 1):
        started_to_be_killed(guest, point, tmp_path / str(number), wait=True)
        guest.speak()
        update = host.kexec()
        killed(guest, point, tmp_path / str(number))
        assert "its client died" in host.aborted(update)
    guest.start()
    guest.whole()
    assert guest.qemu == qemu
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()


def test_killed_at_every_point_of_a_restore(host: Host, tmp_path: Path) -> None:
    guest = host.tenant()
    guest.start()
    guest.speak()
    for first, points in enumerate((
        [point for step in RESTORE for stage in STAGES if (point := f"{step}:{stage}") not in FINAL],
        sorted(FINAL, reverse=True),
    )):  # fmt: skip
        host.kexec()
        host.reboot()
        for number, point in enumerate(points):
            trace = tmp_path / f"{first}.{number}"
            started_to_be_killed(guest, point, trace, wait=False)
            killed(guest, point, trace)
        guest.start()
        guest.whole()
        assert host.session(f"vm1.{first + 1}")["state"] == "finished"


def test_killed_when_the_memory_is_marked_and_the_guest_has_not_gone_on(host: Host) -> None:
    """No other QEMU may start on memory that says the guest may have run: the one that has it goes on, though it stands still."""
    guest = host.tenant()
    guest.start()
    guest.speak()
    host.kexec()
    host.reboot()
    guest.start(wait=False, program=("-c", DIES_BEFORE_CONT))
    assert guest.wait() == -signal.SIGKILL, guest.words()
    guest.start()
    assert f"adopted QEMU {guest.qemu}" in guest.words()
    guest.whole()
    assert host.session("vm1.1")["state"] == "finished"


@pytest.mark.parametrize("kexec", [True, False], ids=["the update goes on", "the update is called off"])
def test_killed_when_the_guest_is_ready(kexec: bool, host: Host) -> None:
    guest = host.tenant()
    guest.start()
    guest.speak()
    slow = host.companion()
    host.kexec()
    slow.hold()
    host.world.wait_record("session.ready", "vm1.1")
    guest.kill()
    last = guest.drain()
    guest.start()
    assert "adopted QEMU" in guest.words()
    assert host.session("vm1.1")["state"] == "ready"
    assert guest.drain() == last
    if kexec:
        slow.drop()
        slow.ready()
        host.reboot()
        guest.start()
    else:
        with host.world.client() as admin:
            admin.abort(reason="called off")
        slow.let_go()
        host.aborted()
    guest.whole()
