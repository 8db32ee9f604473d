# SPDX-License-Identifier: Apache-2.0
"""Whoever drives the operations dies by SIGKILL around each of them; the next one asks QEMU, is told the truth, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qemu_rig import Rig

from luod.adapters.qemu.guest import UNDER_WAY

pytestmark = pytest.mark.lab

DRIVER = Path(__file__).parent / "update_driver.py"
STAGES = ("after_intent", "after_call")
RUNNING = {"runstate": "running"}


class Drive:
    """Runs drivers on the QEMU of a rig, one journal for all of them."""

    def __init__(self, rig: Rig, directory: Path) -> None:
        self.rig = rig
        self.directory = directory

    def __call__(self, *do: tuple[str, dict[str, Any]], die: str = "", die_after: str = "") -> dict[str, Any]:
        """Let a driver do some operations; where it is to die, see that it does and return nothing."""
        rig, job = self.rig, self.directory / "job.json"
        process = rig.processes[-1]
        rig.guest.detach()  # QEMU serves one at a time
        facts = {name: os.fstat(fd) for name, fd in rig.guest.ram.items()}
        vmstate = rig.guest.vmstate
        job.write_text(
            json.dumps(
                {
                    "qemu": msgspec.to_builtins(process.identity),
                    "monitor": str(process.monitor_path),
                    "ram": {name: (each.st_ino, each.st_dev) for name, each in facts.items()},
                    "vmstate": vmstate,
                    "journal": str(self.directory / "journal.db"),
                    "trace": str(self.directory / "trace"),
                    "die": die,
                    "die_after_command": die_after,
                    "do": do,
                }
            )
        )
        result = subprocess.run(
            [sys.executable, str(DRIVER), str(job)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            pass_fds=(vmstate,) if vmstate is not None else (),
        )
        rig.guest.attach(process)
        if die or die_after:
            assert result.returncode == -signal.SIGKILL
            return {}
        assert result.returncode == 0
        return dict(json.loads(result.stdout))


@pytest.fixture
def drive(rig: Rig, disk_path: Path) -> Drive:
    return Drive(rig, disk_path)


def require_adopted(told: dict[str, Any], kind: str, stage: str) -> None:
    """What was called is not called again, and what was not is: as attempt 2."""
    assert told["asked"] == []
    status, attempt, message, _ = told["results"][kind]
    assert (status, message) == ("done", "")
    assert attempt == (1 if stage == "after_call" else 2)
    assert told["settled"][f"vm1.1/{kind}"][1] == ("adopted" if stage == "after_call" else "called")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["pause", "save", "abort"])
def test_in_the_old_kernel(kind: str, stage: str, rig: Rig, drive: Drive) -> None:
    rig.start()
    rig.speak(3)
    do = [("pause", RUNNING), ("save", RUNNING), ("abort", RUNNING)][
        : ["pause", "save", "abort"].index(kind) + 1
    ]
    drive(*do, die=f"vm1.1/{kind}:{stage}")
    told = drive(*do)
    require_adopted(told, kind, stage)
    if kind == "save":
        # Taken back from QEMU: the driver that made it is dead, and so is its memfd's descriptor.
        assert told["vmstate"]
        saved = told["results"]["save"][3]
        again = rig.do("save", **RUNNING)
        assert (saved["sha256"], saved["bytes"]) == (again["sha256"], again["bytes"])
        rig.guest.process.kill()
        rig.start_incoming()
        rig.do("load", **saved)
        rig.do("resume", **RUNNING)
    elif kind == "pause":
        assert told["runstate"] == "paused"
        rig.do("abort", **RUNNING)
    rig.speak(10)
    assert rig.log.findings == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["load", "resume"])
def test_in_the_new_kernel(kind: str, stage: str, rig: Rig, drive: Drive) -> None:
    rig.start()
    rig.speak(3)
    saved = rig.do("save", **RUNNING)
    rig.guest.process.kill()
    rig.start_incoming()
    do = [("load", saved), ("resume", RUNNING)]
    drive(*do, die=f"vm1.1/{kind}:{stage}")
    require_adopted(drive(*do), kind, stage)
    rig.speak(10)
    assert rig.log.findings == []


def test_in_the_midst_of_a_save(slow_rig: Rig, disk_path: Path) -> None:
    """QEMU goes on saving without anybody; the next driver waits for it and finds the state whole."""
    rig, drive = slow_rig, Drive(slow_rig, disk_path)
    rig.guest.ask("migrate-set-parameters", max_bandwidth=3_000_000)
    drive(("save", RUNNING), die_after="migrate")
    assert rig.guest.migration_status() in UNDER_WAY
    told = drive(("save", RUNNING))
    require_adopted(told, "save", "after_call")
    saved = told["results"]["save"][3]
    assert rig.do("save", **RUNNING)["sha256"] == saved["sha256"]
    rig.guest.process.kill()
    rig.start_incoming()
    rig.do("load", **saved)
    rig.do("resume", **RUNNING)
    rig.speak(10)
    assert rig.log.findings == []


def test_between_stop_and_save(rig: Rig, drive: Drive) -> None:
    """The guest stands still because of us, and nobody alive knows: the intent does."""
    rig.start()
    rig.speak(3)
    drive(("save", RUNNING), die_after="stop")
    assert rig.guest.runstate() == "paused"
    told = drive(("save", RUNNING), ("abort", RUNNING))
    require_adopted(told, "save", "after_intent")
    assert told["runstate"] == "running"
    rig.speak(10)
    assert rig.log.findings == []


def test_a_guest_stopped_by_its_user_stays_so(rig: Rig, drive: Drive) -> None:
    rig.start()
    rig.speak(3)
    rig.guest.ask("stop")
    paused = {"runstate": "paused"}
    drive(("save", paused), die="vm1.1/save:after_call")
    told = drive(("save", paused), ("abort", paused))
    assert told["runstate"] == "postmigrate"
    last = rig.drain()
    told = drive(("abort", paused))
    assert rig.drain() == last
    rig.guest.ask("cont")
    rig.speak(10)
    assert rig.log.findings == []
