# SPDX-License-Identifier: Apache-2.0
"""What goes wrong under luo-qemu: QEMU dies, saves fail, luod is away, and what comes out of a session is not what was put in."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from wrapper_rig import Companion, Host, Tenant, flip, is_ram, is_vmstate, memfds_of

from luod.adapters.qemu import record as records
from luod.adapters.qemu.monitor import Monitor

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture
def new_host(disk_path: Path) -> Iterator[Callable[[str], Host]]:
    hosts: list[Host] = []

    def make(settings: str = "") -> Host:
        hosts.append(Host(disk_path / "state", settings).__enter__())
        return hosts[-1]

    try:
        yield make
    except BaseException as error:
        for host in hosts:
            host.__exit__(type(error), error, error.__traceback__)
        raise
    for host in hosts:
        host.__exit__(None, None, None)


@pytest.fixture
def host(new_host: Callable[[str], Host]) -> Host:
    return new_host("")


def running(host: Host, *options: object, more: tuple[str, ...] = ()) -> Tenant:
    guest = host.tenant()
    guest.start(*options, more=more)
    guest.speak()
    return guest


def frozen(host: Host) -> tuple[Tenant, Companion]:
    """Bring a guest to READY, with somebody else still keeping the update."""
    guest = running(host)
    slow = host.companion()
    host.kexec()
    slow.hold()
    host.world.wait_record("session.ready", "vm1.1")
    return guest, slow


# -- QEMU dies


def test_qemu_dies_when_its_memory_is_preserved(host: Host) -> None:
    guest = running(host)
    slow = host.companion()
    host.kexec()
    host.world.wait_record("session.preserved", "vm1.1")
    guest.kill_qemu()
    assert guest.wait() == 128 + signal.SIGKILL
    slow.take()
    slow.let_go()
    assert "vm1.1: its client refused: ESRCH" in host.aborted()


def test_qemu_dies_during_the_save(host: Host) -> None:
    path = host.world.dir / "user.qmp"
    guest = running(host, more=("-qmp", f"unix:{path},server=on,wait=off"))
    with Monitor.connect(path, timeout_s=30) as monitor, monitor.listen() as events:
        monitor.execute("migrate-set-parameters", max_bandwidth=1000)
        host.kexec()
        events.wait(
            {"MIGRATION"}, time.monotonic() + 30, accept=lambda event: event.data["status"] == "active"
        )
        guest.kill_qemu()
    assert guest.wait() == 128 + signal.SIGKILL
    assert "vm1.1: its client refused: ESRCH" in host.aborted()


def test_qemu_dies_after_the_save_and_the_update_goes_on(host: Host) -> None:
    guest, slow = frozen(host)
    guest.kill_qemu()
    assert host.session("vm1.1")["state"] == "ready"
    slow.drop()
    slow.ready()
    host.reboot()
    guest.start()
    guest.whole()


def test_qemu_dies_after_the_save_and_the_update_is_called_off(host: Host) -> None:
    """The guest comes back in another QEMU, on what was saved."""
    guest, slow = frozen(host)
    guest.kill_qemu()
    with host.world.client() as admin:
        admin.abort(reason="changed my mind")
    slow.let_go()
    assert "changed my mind" in host.aborted()
    guest.speak()
    guest.find_qemu()
    guest.whole()
    assert guest.wrapper.poll() is None


def test_told_to_end_when_it_is_saved(host: Host) -> None:
    """A host that is shut down for the kexec ends its services; the guest is in its session by then."""
    guest, slow = frozen(host)
    guest.wrapper.send_signal(signal.SIGTERM)
    assert guest.wait() == 0
    guest.qemu_ends()
    assert host.session("vm1.1")["state"] == "ready"
    slow.drop()
    slow.ready()
    host.reboot()
    guest.start()
    guest.whole()


# -- the save fails


def test_a_save_that_fails_undoes_the_update_and_the_guest_goes_on(host: Host) -> None:
    broken = "driver=blkdebug,node-name=n0,image.driver=null-co,inject-error.0.event=none,inject-error.0.iotype=flush"
    path = host.world.dir / "user.qmp"
    disk = (
        "-blockdev",
        broken,
        "-device",
        "virtio-blk-pci,drive=n0,id=disk",
        "-qmp",
        f"unix:{path},server=on,wait=off",
    )
    guest = running(host, more=disk)
    with Monitor.connect(path, timeout_s=30) as monitor:
        # Nothing is flushed where nothing was written.
        line = 'qemu-io -d disk/virtio-backend "write 0 4096"'
        monitor.execute("human-monitor-command", command_line=line)
    host.kexec()
    assert "Input/output error" in host.aborted()
    guest.whole()
    assert guest.qemu_lives()


def test_a_save_for_which_there_is_no_room(host: Host) -> None:
    guest = running(host)
    resource.prlimit(guest.qemu, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    host.kexec()
    assert "EFBIG" in host.aborted()
    guest.speak()
    resource.prlimit(guest.qemu, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    host.world.wait_record("session.bound", "vm1.2")
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()


def test_a_device_that_cannot_be_migrated_is_found_while_the_guest_runs(host: Host) -> None:
    guest = running(
        host,
        "--policy",
        "optional",
        more=("-blockdev", "driver=null-co,node-name=n0", "-device", "nvme,drive=n0,serial=1"),
    )
    slow = host.companion()
    host.kexec()
    slow.hold()
    assert "nvme" in host.world.wait_record("session.nacked", "vm1.1")["body"]["message"]
    guest.whole()
    assert "does not take part in this update" in guest.words()


@pytest.mark.parametrize("now", ["", "#!/bin/sh\nexit 1\n"], ids=["gone", "unusable"])
def test_a_qemu_that_could_not_start_the_guest_again_is_found_while_it_runs(
    now: str, host: Host, tmp_path: Path
) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.symlink_to(shutil.which("qemu-system-x86_64") or "")
    guest = host.tenant()
    guest.command[0] = str(program)
    guest.start()
    guest.speak()
    host.world.control.inject("reboot", errno=16)
    host.kexec()
    assert "EBUSY" in host.aborted()
    host.world.wait_record("session.bound", "vm1.2")
    for number in (2, 3):  # what was found out for an earlier update does not stand for the next one
        program.rename(tmp_path / "aside")
        if now:
            program.write_text(now)
            program.chmod(0o755)
        host.kexec()
        assert str(program) in host.aborted(f"update/{number}")
        host.world.wait_record("session.bound", f"vm1.{number + 1}")
        program.unlink(missing_ok=True)
        (tmp_path / "aside").rename(program)
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()


def test_a_journal_that_cannot_be_written_leaves_no_guest_stopped(host: Host) -> None:
    guest, slow = frozen(host)
    last = guest.drain()
    limit = resource.prlimit(guest.wrapper.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(guest.wrapper.pid, resource.RLIMIT_FSIZE, (0, limit[1]))
    with host.world.client() as admin:
        admin.abort(reason="called off")
    assert guest.wait() == 70
    slow.let_go()
    guest.speak_until(last + 3)
    host.aborted()
    guest.start()
    guest.whole()


# -- luod is away


def test_luod_dies_with_the_guest_frozen_and_comes_back(host: Host) -> None:
    world = host.world
    world.kill_luod()
    world.start_luod("--crash-at", "update/1/scratch:before_intent", "--crash-trace", world.dir / "points")
    guest = running(host)
    host.kexec()
    assert world.luod is not None
    assert world.luod.wait() == -signal.SIGKILL
    last = guest.drain()
    world.start_luod()
    guest.speak_until(last + 5)
    assert host.session("vm1.1")["state"] == "preserved"
    # A person lets the update go on: in the same session once more, and what was saved first is stale.
    host.kexec()
    ready = world.wait_record(
        "session.ready", "vm1.1", after=world.wait_record("session.thawed", "vm1.1")["id"]
    )
    assert [each["token"] for each in ready["body"]["resources"]] == ["0x1002"]
    host.reboot()
    guest.start()
    guest.whole()


def test_luod_dies_with_the_guest_frozen_and_stays_away(new_host: Callable[[str], Host]) -> None:
    host = new_host("[deadlines]\nfreeze_s = 2\n")
    guest, slow = frozen(host)
    host.world.kill_luod()
    guest.speak()
    assert "did not come back before the deadline" in guest.words()
    host.world.start_luod()
    host.world.wait_record("session.thawed", "vm1.1")
    slow.link.close()
    guest.whole()
    assert guest.qemu_lives()


# -- what comes out of the session is wrong


def in_the_kernel(host: Host, right: Callable[[int], bool], spoil: Callable[[int], None]) -> None:
    """Spoil what the kernel keeps over the reboot."""
    found = [spoil(fd) for fd in memfds_of(host.world.emulator.pid) if right(fd)]
    assert found


def spoil_ram(fd: int) -> None:
    # All of it: which pages are looked at is nobody's business here.
    for page in range(os.fstat(fd).st_size // 4096 - 1):
        flip(fd, page * 4096 + 100)


WRONG: dict[str, tuple[Callable[[int], bool], Callable[[int], None], str]] = {
    "vmstate": (is_vmstate, lambda fd: flip(fd, 100_000), "sha256 differs"),
    "record": (records.is_memfd, lambda fd: flip(fd, 500), "the record of the guest is damaged"),
    "ram": (is_ram, spoil_ram, "not what it was when the guest was saved"),
    "mark": (is_ram, lambda fd: flip(fd, os.fstat(fd).st_size - 4096 + 40), "is damaged"),
}


def test_what_is_damaged_is_not_started(host: Host) -> None:
    guest = running(host)
    host.kexec()
    host.reboot()
    last = guest.drain()
    for right, spoil, says in WRONG.values():
        in_the_kernel(host, right, spoil)
        guest.start(wait=False)
        assert guest.wait() == 65
        assert says in guest.words()
        session = host.session("vm1.1")
        assert session["state"] == "failed"
        assert [key for key, step in session["steps"].items() if not step["ok"]] == ["0x1001/qemu.check"]
        assert "qemu.start" not in str(session["steps"])
        # What was kept is whole but for that.
        in_the_kernel(host, right, spoil)
    assert guest.drain() == last
    guest.start()
    guest.whole()


def test_the_ram_of_another_guest_is_not_started(host: Host) -> None:
    guests = [host.tenant("vm1"), host.tenant("vm2", seed=8)]
    for guest in guests:
        guest.start()
        guest.speak()
    host.kexec()
    host.reboot()
    rams = [os.dup(fd) for fd in memfds_of(host.world.emulator.pid) if is_ram(fd)]
    try:
        one, other = rams
        for place in range(0, os.fstat(one).st_size, 1 << 20):
            first, second = os.pread(one, 1 << 20, place), os.pread(other, 1 << 20, place)
            os.pwrite(one, second, place)
            os.pwrite(other, first, place)
    finally:
        for fd in rams:
            os.close(fd)
    for guest in guests:
        guest.start(wait=False)
        assert guest.wait() == 65
        assert "belongs to the guest" in guest.words()


def test_another_machine_is_not_started_and_the_right_one_is(host: Host) -> None:
    guest = running(host)
    binary = guest.command[0]
    host.kexec()
    host.reboot()
    for binary_now, more, says in (
        ("qemu-system-that-is-gone", (), "there is no such program"),
        (binary, ("-device", "virtio-rng-pci"), "added: `-device virtio-rng-pci`"),
        (binary, ("-cpu", "max"), "the CPU was qemu64, and is max"),
        (binary, ("-m", "32M"), "had 16777216 bytes, and has 33554432"),
        (binary, ("-machine", "pc-q35-9.2"), "the machine type was pc-q35-10.0, and is pc-q35-9.2"),
    ):
        guest.command[0] = binary_now
        guest.start(more=more, wait=False)
        assert guest.wait() == 65
        assert says in guest.words()
    assert host.session("vm1.1")["state"] == "failed"
    guest.command[0] = shutil.which(binary) or ""
    guest.start()
    guest.whole()


def test_a_lost_session_is_said_loudly_and_the_guest_starts_cold(host: Host) -> None:
    guest = running(host)
    host.kexec()
    host.world.wait_record("update.rebooting")
    host.world.control.wait_boot(host.world.boot_id)
    host.world.control.cold_reboot()
    assert host.world.luod is not None
    assert host.world.keeper is not None
    host.world.luod.wait()
    host.world.keeper.wait()
    guest.wait()
    host.world.boot()
    guest.start()
    guest.speak()
    assert "THE GUEST vm1 IS LOST" in guest.words()
    assert guest.log.boots == 2


def test_a_guest_that_died_with_its_luo_qemu_starts_cold_in_a_new_session(host: Host) -> None:
    guest = running(host)
    slow = host.companion()
    host.kexec()
    host.world.wait_record("session.preserved", "vm1.1")
    guest.kill()
    guest.kill_qemu()
    slow.preserve()
    slow.let_go()
    host.aborted()
    guest.start()
    guest.speak()
    assert guest.log.boots == 2
    assert host.session("vm1")["id"] != "vm1.1"
