# SPDX-License-Identifier: Apache-2.0
"""The units of packaging/ under a real systemd, as process 1 of a lab machine: a guest that is a service goes through a real kexec."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from luod.demo.guests import MIB, GuestSetting, qemu_command
from luod.journal.replay import Replay
from luod.lab.errors import LabUnavailable
from luod.lab.guests import GUEST_MIB, KERNEL, MARKS, OWN_MIB, SERIALS, SLOW, done, guest_reports, ticks
from luod.lab.outcome import LabRun
from luod.lab.script import STATE, Boot, Step, run
from luod.lab.systemd import Systemd, systemd
from luod.lab.update import order
from luod.timeline import Story
from luod.tinyguest import image as tinyguest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "programs" / "service.py"
UNIT = "luo-qemu@vm0.service"
HOST = (UNIT, "luod.service", "luod-keeper.service")
BEFORE = STATE / "serials-before"
SETTING = GuestSetting(mib=GUEST_MIB, hz=5, ticks_of_a_pass=24, before=4)
NOTED = f"""\
[Unit]
Description=How far the guests were before anything of luod ran in this boot
Before=luod-keeper.service
RequiresMountsFor={STATE}
[Service]
Type=oneshot
ExecStart=/bin/mkdir -p {SERIALS} {BEFORE}
ExecStart=/usr/bin/env chattr +S {SERIALS}
ExecStart=/bin/cp -aT {SERIALS} {BEFORE}
"""

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def service(what: str, *words: str, name: str = "", **options: Any) -> Step:
    """Run the program that tells of services."""
    return run(
        name or f"{what}-{words[0]}", [sys.executable, PROGRAM, what, *words], timeout_s=300, **options
    )


def systemctl(*words: str) -> Step:
    return run("-".join(words[:2]), ["/usr/bin/env", "systemctl", *words], timeout_s=300)


def machine(options: str = "", *more: str) -> Systemd:
    """A host with luod, its keeper and one guest, all installed as packaging/ has them and started at boot.

    The guest's file has these options of luo-qemu, and these more of QEMU.
    """
    units = {path.name: path.read_text() for path in (ROOT / "packaging").glob("*.service")}
    command = [*qemu_command("qemu-system-x86_64", SERIALS / "vm0.serial", KERNEL, 0, SETTING), *more]
    modules = {"luod": "luod.daemon", "luod-keeper": "luod.adapters.keeper", "luo-qemu": "luod.qemu.command"}
    return Systemd(
        {**units, "noted.service": NOTED},
        enabled=["noted.service", *HOST],
        programs={name: (sys.executable, "-m", module) for name, module in modules.items()},
        files={
            "/etc/luod/guests/vm0.conf": f'OPTIONS="--slow {SLOW} {options}"\nQEMU="{shlex.join(command)}"\n',
        },
        kept={"/var/lib/luod": STATE / "luod", "/var/lib/luo-qemu": STATE / "guests"},
    )


@pytest.fixture(scope="module")
def updated(pair, run_lab) -> LabRun:
    """The run: luo-qemu is killed and started again, the host is updated, the guest is stopped as a service is.

    Between the two boots the guest's file is edited for its next cold start: another device.
    """
    try:
        systemd()
    except LabUnavailable as error:
        pytest.skip(str(error))
    edited = machine("--changed as-saved", "-device", "virtio-rng-pci")
    first = [
        ticks("until", 1, "--ticks", str(SETTING.before)),
        service("facts", UNIT, name="started"),
        systemctl("kill", "--kill-who=main", "--signal=KILL", UNIT),
        service("until", UNIT, "adopted QEMU"),
        service("facts", UNIT, name="adopted"),
        order(pair[1], clients=1),
    ]
    second = [
        systemctl("start", "luod.service"),  # it is being started: this waits for its READY=1
        ticks("mark", 1, "--serials", BEFORE, "--marks", MARKS),
        done(),
        ticks("until", 1, "--marks", MARKS),
        service(
            "until",
            UNIT,
            "what has changed counts when it is started anew: option added: `-device virtio-rng-pci`",
        ),
        service("facts", UNIT, name="back"),
        systemctl("stop", *HOST),
        service("facts", *HOST, name="stopped"),
        systemctl("start", "--job-mode=ignore-dependencies", UNIT),  # without luod, which it wants
        service("until", UNIT, "waiting for luod"),
        systemctl("stop", UNIT),
        service("facts", UNIT, name="stopped-while-it-waits"),
    ]
    size = {"memory_mib": 1536 + 2 * GUEST_MIB + OWN_MIB}
    boots = [Boot(first, systemd=machine()), Boot(second, systemd=edited)]
    return run_lab(
        "service", pair[0], boots, timeout_s=600, files={"tinyguest": tinyguest.IMAGE}, **size
    ).check()


def test_a_dead_luo_qemu_is_started_again_and_adopts_its_qemu(updated) -> None:
    before, after = updated.of("unit")[:2]
    (qemu,) = (pid for pid, program in before["processes"].items() if program.startswith("qemu"))
    assert after["processes"][qemu].startswith("qemu")
    assert before["MainPID"] != after["MainPID"] != "0"
    assert int(after["NRestarts"]) == int(before["NRestarts"]) + 1
    assert after["ActiveState"] == "active"


def test_the_guest_goes_on_in_the_new_kernel(updated, pair) -> None:
    first, second = (boot["kernel"] for boot in updated.of("boot"))
    assert (first, second) == (pair[0].release, pair[1].release)
    (one,) = guest_reports(updated, 1, GUEST_MIB * MIB)
    assert one.findings == ()
    assert one.bytes == GUEST_MIB * MIB
    with Replay(updated.file("luod/journal.db")) as replay:
        (session,) = Story(replay).course().sessions
    assert session.state == "finished"


def test_a_service_that_is_stopped_leaves_nothing_behind(updated) -> None:
    back, *stopped = updated.of("unit")[2:-1]
    assert back["ActiveState"] == "active"
    assert {program[:4] for program in back["processes"].values()} >= {"qemu"}
    assert [one["name"] for one in stopped] == list(HOST)
    for one in stopped:
        assert (one["ActiveState"], one["Result"], one["processes"]) == ("inactive", "success", {})


def test_a_service_that_waits_for_luod_can_be_stopped(updated) -> None:
    stopped = updated.of("unit")[-1]
    assert (stopped["ActiveState"], stopped["Result"], stopped["processes"]) == ("inactive", "success", {})
