# SPDX-License-Identifier: Apache-2.0
"""Whole cycles on a real QEMU: the guest counts on in another process, or in the same one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from qemu_rig import Rig

from luod.adapters.qemu import vmstate
from luod.adapters.qemu.errors import CheckpointRefused, ResumeFailed
from luod.adapters.qemu.operations import operations
from luod.adapters.qemu.portrait import portrait
from luod.engine.ports import Absent, Done

pytestmark = pytest.mark.lab


def next_qemu(rig: Rig, *more: str) -> None:
    """As a kexec would: the old process is gone, the memfds are not."""
    rig.guest.process.kill()
    rig.start_incoming(*more)


def test_a_guest_goes_on_in_another_process_and_another(rig: Rig) -> None:
    rig.start()
    rig.speak(5)
    before = rig.guest.runstate()
    for update in range(3):
        paused = rig.do("pause", runstate=before)
        assert (paused["runstate"], paused["now"]) == ("running", "paused")
        saved = rig.do("save", runstate=before)
        assert set(saved["ms"]) == {"prepare", "pause", "migrate", "postmigrate", "check", "hash", "sample"}
        assert saved["bytes"] == os.fstat(rig.guest.vmstate or -1).st_size < 1 << 20
        last = rig.drain()
        next_qemu(rig)
        loaded = rig.do("load", **saved)
        assert loaded["runstate"] == "paused"
        assert rig.drain() == last
        assert rig.do("resume", runstate=before)["runstate"] == "running"
        assert rig.guest.vmstate is None  # stale from here on
        rig.speak(20)
        assert rig.log.findings == [], update
    assert rig.log.boots == 1


def test_save_stops_a_running_guest_by_itself(rig: Rig) -> None:
    rig.start()
    rig.speak(3)
    saved = rig.do("save", runstate="running")
    last = rig.drain()
    next_qemu(rig)
    assert rig.do("load", **saved)["runstate"] == "paused"
    assert rig.drain() == last
    rig.do("resume", runstate="running")
    rig.speak(20)
    assert rig.log.findings == []


def test_a_guest_that_was_saved_running_does_not_run_before_it_is_told_to(rig: Rig) -> None:
    """As another program would save it, and with a QEMU that was started without -S."""
    rig.start()
    rig.speak(3)
    guest = rig.guest
    machine = msgspec.to_builtins(portrait(guest))
    fd = vmstate.make_vmstate()
    guest.arm("cpr-reboot")
    guest.ask("migrate", uri=f"file:/dev/fdset/{guest.offer(fd, os.O_WRONLY, 'somebody')}")
    guest.await_runstate(lambda state: state == "postmigrate", 30, "postmigrate")
    guest.keep_vmstate(fd)
    last = rig.drain()
    saved = {
        "bytes": os.fstat(fd).st_size,
        "sha256": vmstate.digest(fd),
        "ram": vmstate.fingerprints(guest.ram),
    }
    guest.process.kill()
    rig.start("-incoming", "defer")
    assert rig.do("load", **saved, machine=machine, runstate="running")["runstate"] == "paused"
    assert rig.drain() == last
    rig.do("resume", runstate="running")
    rig.speak(20)
    assert rig.log.findings == []


def test_abort_and_then_a_second_save(rig: Rig) -> None:
    rig.start()
    rig.speak(3)
    first = rig.do("save", runstate="running")
    assert rig.do("abort", runstate="running")["runstate"] == "running"
    assert rig.guest.vmstate is None
    rig.speak(10)
    assert rig.guest.ask("query-fdsets") == []
    enabled = {each["capability"]: each["state"] for each in rig.guest.ask("query-migrate-capabilities")}
    assert enabled["x-ignore-shared"] is False
    assert rig.guest.ask("query-migrate-parameters")["mode"] == "normal"
    rig.do("pause", runstate="running")
    second = rig.do("save", runstate="running")
    # Into the same fdset QEMU would write behind the first one and leave a hole.
    assert second["bytes"] < 1.5 * first["bytes"]
    assert second["sha256"] != first["sha256"]
    next_qemu(rig)
    rig.do("load", **second)
    rig.do("resume", runstate="running")
    rig.speak(20)
    assert rig.log.findings == []


def test_undo_of_each_step_leads_back(rig: Rig) -> None:
    rig.start()
    rig.speak(2)
    known = operations(rig.guest)
    for kind in ("pause", "save"):
        intent = rig.intent(kind, runstate="running")
        known[f"qemu.{kind}"].apply(intent)
        known[f"qemu.{kind}"].undo(intent)  # type: ignore[attr-defined]
        rig.speak(5)
    saved = rig.do("save", runstate="running")
    next_qemu(rig)
    load = rig.intent("load", **saved)
    known["qemu.load"].apply(load)
    known["qemu.load"].undo(load)  # type: ignore[attr-defined]
    assert not rig.guest.alive()
    rig.start_incoming()
    known["qemu.load"].apply(load)
    resume = rig.intent("resume", runstate="running")
    known["qemu.resume"].apply(resume)
    rig.speak(5)
    known["qemu.resume"].undo(resume)  # type: ignore[attr-defined]
    assert rig.guest.runstate() == "paused"
    assert rig.log.findings == []


def test_a_guest_stopped_by_its_user_stays_stopped(rig: Rig) -> None:
    rig.start()
    rig.speak(3)
    rig.guest.ask("stop")
    last = rig.drain()
    before = rig.guest.runstate()
    assert before == "paused"
    rig.do("pause", runstate=before)
    saved = rig.do("save", runstate=before)
    assert rig.do("abort", runstate=before)["runstate"] == "postmigrate"
    # QEMU cannot save it again from there, and need not: it has not run.
    again = rig.do("save", runstate=before)
    assert (again["sha256"], again["bytes"], again["ram"]) == (saved["sha256"], saved["bytes"], saved["ram"])
    # Nor when this process is another than the one that saved, and has no descriptor of it.
    rig.guest.keep_vmstate(None)
    assert rig.do("save", runstate=before)["sha256"] == saved["sha256"]
    next_qemu(rig)
    assert rig.do("load", **saved)["runstate"] == "paused"
    assert rig.do("resume", runstate=before)["runstate"] == "paused"
    assert rig.drain() == last
    rig.guest.ask("cont")  # its user
    rig.speak(10)
    assert rig.log.findings == []


def test_a_guest_that_never_ran_is_carried_too(rig: Rig) -> None:
    rig.start("-S")
    before = rig.guest.runstate()
    assert before == "prelaunch"
    saved = rig.do("save", runstate=before)
    next_qemu(rig)
    assert rig.do("load", **saved)["runstate"] == "prelaunch"
    assert rig.do("resume", runstate=before)["runstate"] == "prelaunch"
    rig.guest.ask("cont")
    rig.speak(10)
    assert rig.log.findings == []


def test_disks_are_named_and_let_go(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    rig = make_rig(
        devices=("-drive", f"file={disk},format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0",
                 "-device", "VGA", "-device", "virtio-net-pci")
    )  # fmt: skip
    rig.start()
    rig.speak(2)
    saved = rig.do("save", runstate="running")
    assert saved["disks"] == ["d0"]
    # The image is released: the next QEMU may lock it while the old process is still there.
    old = rig.guest.process
    rig.start_incoming()
    rig.do("load", **saved)
    old.kill()
    rig.do("resume", runstate="running")
    rig.speak(5)
    assert rig.log.findings == []


def test_what_comes_out_of_order_is_refused(rig: Rig) -> None:
    rig.start()
    rig.speak(2)
    saved = rig.do("save", runstate="running")
    with pytest.raises(ResumeFailed, match="postmigrate"):
        rig.do("resume", runstate="running")
    next_qemu(rig)
    with pytest.raises(CheckpointRefused, match="inmigrate"):
        rig.do("save", runstate="running")
    with pytest.raises(ResumeFailed, match="inmigrate"):
        rig.do("resume", runstate="running")
    rig.do("load", **saved)


def test_probes_tell_every_station_of_a_cycle(rig: Rig) -> None:
    def stand() -> dict[str, bool]:
        known = operations(rig.guest)
        answers = {
            kind: known[f"qemu.{kind}"].probe(rig.intent(kind, runstate="running"))
            for kind in ("pause", "save", "abort", "load", "resume")
        }
        assert {type(answer) for answer in answers.values()} <= {Done, Absent}, answers
        return {kind: isinstance(answer, Done) for kind, answer in answers.items()}

    rig.start()
    assert stand() == {"pause": False, "save": False, "abort": True, "load": False, "resume": True}
    rig.do("pause", runstate="running")
    assert stand() == {"pause": True, "save": False, "abort": False, "load": False, "resume": False}
    saved = rig.do("save", runstate="running")
    held = rig.guest.vmstate
    assert {kind: done for kind, done in stand().items() if kind != "load"} == {
        "pause": True, "save": True, "abort": False, "resume": False,
    }  # fmt: skip
    assert rig.guest.vmstate is not None
    assert rig.guest.vmstate != held  # taken back from QEMU
    next_qemu(rig)
    assert stand()["load"] is False
    rig.do("load", **saved)
    now = stand()
    assert (now["load"], now["resume"]) == (True, False)
    rig.do("resume", runstate="running")
    assert stand()["resume"] is True
    rig.guest.process.kill()
    assert not any(stand().values())
