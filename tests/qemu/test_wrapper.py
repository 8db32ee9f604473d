# SPDX-License-Identifier: Apache-2.0
"""luo-qemu on real QEMU and the emulated kernel: whole updates, and guests that are left as they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from wrapper_rig import Host, is_ram, memfds_of

from luod.adapters.qemu.identity import NO_RECORD, read_trailer
from luod.adapters.qemu.monitor import Monitor
from luod.adapters.qemu.process import identity
from luod.journal.record import Entry
from luod.journal.writer import Journal
from luod.qemu.rehearsal import rehearse, running_argv
from luod.states.events import EffectOutcome

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


def test_a_guest_lives_through_two_updates(host: Host) -> None:
    guest = host.tenant()
    guest.start()
    guest.speak()
    for number in (1, 2):
        host.kexec()
        host.reboot()
        guest.start()
        guest.whole()
        session = host.session(f"vm1.{number}")
        assert session["state"] == "finished"
        assert set(session["spans"]) == {"pause", "save", "preserve"}
        assert all(each["took_ms"] > 0 for each in session["steps"].values())
        assert [each["label"] for each in session["resources"]] == ["ram0", "record", "vmstate"]


def test_two_guests_of_two_sizes_with_devices(host: Host) -> None:
    small = host.tenant("small")
    large = host.tenant("large", mib=32, seed=9)
    large.command += [
        "-smp",
        "2",
        "-device",
        "virtio-rng-pci",
        "-device",
        "virtio-balloon-pci",
        "-vga",
        "std",
    ]
    for guest in (small, large):
        guest.start("--order", int(guest is large))
        guest.speak()
    host.kexec()
    host.reboot()
    for guest in (small, large):
        guest.start()
        guest.whole()


def test_a_guest_with_two_pieces_of_ram(host: Host) -> None:
    guest = host.tenant(mib=32)
    guest.command += [
        "-object", "memory-backend-memfd,id=a,size=24M", "-object", "memory-backend-ram,id=b,size=8M",
        "-numa", "node,memdev=a", "-numa", "node,memdev=b",
    ]  # fmt: skip
    guest.start()
    guest.speak()
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()


def test_a_guest_that_its_user_has_stopped_stays_stopped(host: Host) -> None:
    guest = host.tenant()
    path = guest.users_monitor()
    guest.start()
    guest.speak()
    with Monitor.connect(path, timeout_s=30) as monitor:
        monitor.execute("stop")
    last = guest.drain()
    host.kexec()
    host.reboot()
    guest.start()
    with Monitor.connect(path, timeout_s=30) as monitor:
        assert monitor.execute("query-status")["status"] == "paused"
        assert guest.drain() == last
        monitor.execute("cont")
    guest.whole()


def test_an_update_that_was_called_off_leaves_a_stopped_guest_stopped_and_the_next_one_takes_it(
    host: Host,
) -> None:
    guest = host.tenant()
    path = guest.users_monitor()
    guest.start()
    guest.speak()
    with Monitor.connect(path, timeout_s=30) as monitor:
        monitor.execute("stop")
    last = guest.drain()
    host.world.control.inject("reboot", errno=16)
    host.kexec()
    assert "EBUSY" in host.aborted()
    host.world.wait_record("session.bound", "vm1.2")
    host.kexec()
    host.reboot()
    guest.start()
    with Monitor.connect(path, timeout_s=30) as monitor:
        assert monitor.execute("query-status")["status"] == "paused"
        assert guest.drain() == last
        monitor.execute("cont")
    guest.whole()


def test_a_refused_kexec_leaves_the_guest_in_the_same_process(host: Host) -> None:
    guest = host.tenant()
    guest.start()
    guest.speak()
    host.world.control.inject("reboot", errno=16)
    host.kexec()
    assert "EBUSY" in host.aborted()
    guest.whole()
    assert guest.qemu_lives()
    marks = [read_trailer(fd) for fd in memfds_of(guest.qemu) if is_ram(fd)]
    assert {(mark.generation, mark.record) for mark in marks} == {(1, NO_RECORD)}, "what was saved is stale"
    host.world.wait_record("session.bound", "vm1.2")
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()


def test_its_end_is_that_of_qemu(host: Host) -> None:
    guest = host.tenant()
    guest.start()
    guest.speak()
    guest.kill_qemu()
    assert guest.wait() == 128 + signal.SIGKILL
    assert host.session("vm1")["state"] == "aborted"
    guest.start()
    guest.drain()
    guest.wrapper.send_signal(signal.SIGTERM)
    assert guest.wait() == 0
    assert "terminating on signal 15" in guest.words()
    assert host.session("vm1")["state"] == "aborted"


def test_the_terminal_is_qemus(host: Host, tmp_path: Path) -> None:
    guest = host.tenant()
    at = guest.command.index("-chardev")
    guest.command[at : at + 4] = ["-serial", "stdio"]
    argv = [
        sys.executable, "-m", "luod.qemu.command", "--name", "vm1", "--socket", host.world.socket, "--state", guest.state, "--run",
        guest.run, "--kernel", "emulated", "--emulator", host.world.emulator_dir, "--volatile", "--", *guest.command,
    ]  # fmt: skip
    with subprocess.Popen(
        list(map(str, argv)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"tinyguest boot seed 7 memory 16256 hz 100 chunk 1024\n"
        process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-snapshot",), "temporary file"),
        (("-machine", "microvm"), "has no versions"),
        (("-m",), "has no value"),
        (("-object", "memory-backend-ram,id=x,size=1M"), "not the RAM of the machine"),
    ],
)
def test_what_cannot_be_carried_over_is_not_started(words: tuple[str, ...], says: str, host: Host) -> None:
    guest = host.tenant()
    guest.start(more=words, wait=False)
    assert guest.wait() in (1, 2)
    assert says in guest.words()
    assert guest.drain() == 0


def test_what_becomes_of_a_command_line_can_be_asked(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "luod.qemu.command", "--check", "--", "qemu-system-x86_64", "-M", "q35"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "- machine type pc-q35-" in found.stdout
    assert "memory-backend-file,id=ram0,size=134217728" in found.stdout


def test_whether_a_guest_would_come_back_can_be_asked_while_it_runs(host: Host) -> None:
    guest = host.tenant()
    assert guest.check()[1]["runs"] is False
    guest.start()
    guest.speak()
    code, told = guest.check()
    assert (code, told["name"], told["runs"], told["differences"]) == (0, "vm1", True, [])
    code, told = guest.check(more=("-device", "virtio-rng-pci", "-m", "32M"))
    assert code == 1
    assert told["differences"] == [
        "option added: `-device virtio-rng-pci`", "the memory ram0 had 16777216 bytes, and has 33554432",
    ]  # fmt: skip
    in_words = guest.checked(more=("-cpu", "max"))
    assert in_words.returncode == 1
    assert "vm1 runs, and would not come back with this: the CPU was qemu64, and is max" in in_words.stderr
    assert "hint: it goes on as it is" in in_words.stderr
    guest.kill_qemu()
    guest.wait()
    assert guest.check()[1]["runs"] is False


def test_a_guest_of_another_user_is_not_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **more: path != tmp_path and honest(path, mode, **more)
    )
    found = rehearse("vm1", ["qemu-system-x86_64"], tmp_path)
    assert found.notes[-1] == f"whether vm1 runs cannot be seen: {tmp_path} is another user's"
    assert not found.runs
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_pid_of_a_guest_is_not_the_guest(disk_path: Path) -> None:
    me = identity(os.getpid())
    for started, argv in ((me.started, ["qemu"]), (me.started + 1, [])):
        state = disk_path / str(started)
        state.mkdir()
        with Journal.open(state / "journal.db", boot_id="b", run_id="r", volatile=True) as journal:
            told = EffectOutcome(
                "k", "done", "called", result={"pid": me.pid, "started": started, "argv": ["qemu"]}
            )
            journal.append([Entry("vm1.1", told)])
        assert running_argv(state) == argv


def test_what_was_asked_of_another_qemu_beforehand_is_not_asked_in_the_blackout(host: Host) -> None:
    """The newer QEMU of an update lies at another path: asked for by --check, its answers are there when it is needed."""
    guest = host.tenant()
    guest.start()
    guest.speak()
    other = host.world.dir / "another-qemu"
    other.symlink_to(shutil.which("qemu-system-x86_64") or "")
    copy = host.world.dir / "qemu-copy"
    copy.write_text(f'#!/bin/sh\necho asked >>{host.world.dir}/asked\nexec {other} "$@"\n', "ascii")
    copy.chmod(0o755)
    guest.command[0] = str(copy)
    assert guest.check()[0] == 0
    assert (host.world.dir / "asked").read_text("ascii").count("asked") == 1
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()
    assert (host.world.dir / "asked").read_text("ascii").count("asked") == 2, "checked once, started once"
    assert guest.check()[1]["runs"] is True


def test_its_journal_tells_what_was_done(host: Host) -> None:
    guest = host.tenant()
    guest.start()
    guest.speak()
    host.kexec()
    host.reboot()
    guest.start()
    guest.kill()
    shown = subprocess.run(
        [sys.executable, "-m", "luod.cli", "journal", "show", "--json", "--journal", str(guest.state / "journal.db")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    kinds = [record["body"]["kind"] for record in json.loads(shown)["records"] if "kind" in record["body"]]
    assert kinds == [
        "qemu.launch", "guest.preserve", "guest.preserve", "qemu.pause", "qemu.save", "guest.record", "guest.preserve",
        "qemu.retrieve", "qemu.retrieve", "qemu.retrieve", "qemu.check", "qemu.start", "qemu.load", "qemu.resume", "session.finish",
    ]  # fmt: skip
