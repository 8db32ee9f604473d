# SPDX-License-Identifier: Apache-2.0
"""A Linux guest in a lab machine, with a disk it writes to without a pause and a network card, through a real kexec."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "qemu"))

from linux_rig import DISK_MIB, RAM_MIB, LinuxLog, linux_command, make_disk

from luod.lab.accel import acceleration
from luod.lab.guests import OWN_MIB, PATIENCE_S, SERIALS, crossing, done, luo_qemu
from luod.lab.images import KernelImage
from luod.lab.outcome import LabRun
from luod.lab.script import STATE, Boot, Step, run, wait
from luod.lab.update import LUOD_STATE, RUN, keeper, luod, order

PROGRAMS = Path(__file__).parent / "programs"
DISKS = STATE / "linux"
PORT = 4000
pytestmark = [pytest.mark.lab, pytest.mark.timeout(1600)]


def guest(kernel: KernelImage, qemu: Path, *, first: bool) -> Step:
    command = linux_command(kernel, DISKS / "disk.qcow2", SERIALS / "vm1.serial", PORT)
    return luo_qemu("vm1", qemu, command, first=first)


def host(name: str, *arguments: object) -> Step:
    return run(
        name,
        [sys.executable, PROGRAMS / "linux_host.py", *map(str, (PORT, *arguments))],
        timeout_s=PATIENCE_S,
    )


@pytest.fixture(scope="module")
def crossed(
    pair: tuple[KernelImage, KernelImage], run_lab: Any, tmp_path_factory: pytest.TempPathFactory
) -> LabRun:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler for the guest's init")
    old, new = pair
    across = crossing()
    place = tmp_path_factory.mktemp("linux")
    make_disk(place, DISKS)
    directories = run("directories", ["/bin/mkdir", "-p", RUN, SERIALS, STATE / "guests"])
    synced = run("synced", ["/usr/bin/env", "chattr", "+S", SERIALS])
    first = [
        directories, synced, keeper(), luod(), guest(old, across.old.binary, first=True), host("counts", 20),
        order(new, clients=1),
    ]  # fmt: skip
    copy = run("keep-journal", ["/bin/cp", "-a", LUOD_STATE, STATE / "luod-after-boot-0"])
    second = [
        directories, copy, keeper(), luod(), guest(old, across.new.binary, first=False), host("goes on", 20, "end"),
        wait("vm1", timeout_s=PATIENCE_S), done(),
    ]  # fmt: skip
    files = {f"linux/{name}": (place / name).read_bytes() for name in ("base.img", "disk.qcow2")}
    more = {"accel": acceleration(old, parallel=True)}
    size = {"memory_mib": 1536 + 2 * RAM_MIB + OWN_MIB, "state_mib": 256 + 2 * DISK_MIB}
    found: LabRun = run_lab(
        "linux-guest", old, [Boot(first), Boot(second)], timeout_s=1500, files=files, **size, **more
    )
    return found.check()


@pytest.fixture(scope="module")
def log(crossed: LabRun) -> LinuxLog:
    log = LinuxLog()
    log.feed(crossed.file("serials/vm1.serial").read_bytes())
    return log


def test_no_number_is_lost_and_its_machine_has_started_once(log: LinuxLog) -> None:
    assert log.findings == []
    assert (log.boots, log.left) == (1, [0])


def test_what_it_wrote_is_on_its_disk(log: LinuxLog) -> None:
    assert log.end == log.last > 40


def test_its_network_goes_on(crossed: LabRun, log: LinuxLog) -> None:
    before, after = crossed.of("heard")
    assert before["last"] < after["first"] < after["last"] <= log.last == log.end
    assert log.echoed >= after["first"]
