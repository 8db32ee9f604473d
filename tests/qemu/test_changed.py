# SPDX-License-Identifier: Apache-2.0
"""A guest whose unit was edited while it ran: after an update it stands still or is started as it was saved, as its user has chosen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace
from wrapper_rig import Host, Tenant

from luod.adapters.qemu.arguments import adapt
from luod.adapters.qemu.probe import MachineUnknown, QemuMissing
from luod.qemu.plan import Plan

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

AS_SAVED = ("--changed", "as-saved")
CHANGES = {
    "device": (("-device", "virtio-rng-pci"), "option added: `-device virtio-rng-pci`"),
    "memory": (("-m", "32M"), "had 16777216 bytes, and has 33554432"),
    "machine": (("-machine", "pc-q35-9.2"), "the machine type was pc-q35-10.0, and is pc-q35-9.2"),
    "cannot be carried over": (("-snapshot",), "-snapshot"),
    "no such machine": (("-machine", "pc-q35-99.0"), "pc-q35-99.0"),
    "no command line": (("-m",), "-m"),
}


def saved(host: Host, *more: str) -> Tenant:
    """Bring a guest into the next kernel, not yet started again."""
    guest = host.tenant()
    guest.command += more
    guest.start()
    guest.speak()
    host.kexec()
    host.reboot()
    return guest


def words_of(guest: Tenant) -> list[str]:
    return Path(f"/proc/{guest.qemu}/cmdline").read_text().split("\0")[:-1]


def without_fds(words: list[str]) -> list[str]:
    """Return a command line without what differs from start to start."""
    kept = [word for word in words if word not in ("-incoming", "defer", "-S")]
    return [",".join(part for part in word.split(",") if "/proc/self/fd/" not in part) for word in kept]


@pytest.mark.parametrize("change", CHANGES)
def test_it_stands_still_or_is_started_as_it_was_saved(change: str, host: Host) -> None:
    more, says = CHANGES[change]
    guest = saved(host)
    usual = list(guest.command)
    guest.command = [*usual, *more]
    guest.start(wait=False)
    assert guest.wait() == 65
    assert says in guest.words()
    assert "with `--changed as-saved` if only its command line has changed" in guest.words()
    guest.start(*AS_SAVED)
    guest.whole()
    assert host.session("vm1.1")["state"] == "finished"
    told = [line for line in guest.words().splitlines() if "vm1 is as it was saved" in line]
    assert len(told) == 1
    assert says in told[0]


def test_it_is_started_by_the_words_it_was_started_with(host: Host) -> None:
    """Also what no guest can see, and what its user wanted of its memory; and so from update to update, until it is started cold."""
    guest = host.tenant()
    memory = [
        "-object",
        "memory-backend-memfd,id=m0,size=16M,merge=off,dump=off",
        "-machine",
        "memory-backend=m0",
    ]
    guest.command += [*memory, "-name", "vm1,process=first", "-serial", "null"]
    guest.start()
    before = without_fds(words_of(guest))
    assert any("merge=off,dump=off" in word for word in before)
    guest.command += ["-device", "virtio-rng-pci", "-name", "vm1,process=second"]
    other = host.world.dir / "another-qemu"
    other.symlink_to(shutil.which(guest.command[0]) or "")
    for binary in (guest.command[0], str(other)):
        guest.command[0] = binary
        guest.speak()
        host.kexec()
        host.reboot()
        guest.start(*AS_SAVED)
        guest.whole()
        assert without_fds(words_of(guest)) == [binary, *before[1:]]
    guest.kill_qemu()
    guest.wait()
    guest.start(*AS_SAVED)
    guest.speak()
    assert guest.log.boots == 2
    assert "virtio-rng-pci" in words_of(guest)


def test_what_builds_the_same_machine_is_taken(host: Host) -> None:
    """A change that the guest cannot see counts at once, as it does without the option."""
    guest = saved(host)
    guest.command += ["-name", "vm1,process=second"]
    guest.start(*AS_SAVED)
    guest.whole()
    assert "vm1,process=second" in words_of(guest)
    assert "as it was saved" not in guest.words()


def test_killed_between_the_comparison_and_the_start(host: Host) -> None:
    guest = saved(host)
    guest.command += ["-device", "virtio-rng-pci"]
    for point in ("qemu.start:before_intent", "qemu.start:after_call", "qemu.load:after_intent"):
        guest.start(*AS_SAVED, "--crash-at", point, wait=False)
        assert guest.wait() == -9
    guest.start(*AS_SAVED)
    guest.whole()
    assert "virtio-rng-pci" not in words_of(guest)


def test_it_can_be_asked_while_the_guest_runs(host: Host) -> None:
    guest = host.tenant()
    guest.start()
    guest.speak()
    for more, says in CHANGES.values():
        if more == ("-m",):
            continue
        code, told = guest.check(*AS_SAVED, more=more)
        assert (code, told["comes_back"], told["as_saved"]) == (0, True, True)
        assert says in "; ".join(told["differences"])
        assert without_fds(told["argv"])[1:10] == without_fds(words_of(guest))[1:10]
    in_words = guest.checked(*AS_SAVED, more=("-cpu", "max"))
    assert in_words.returncode == 0
    assert (
        "would come back as it is; what has changed counts when it is started anew: the CPU was"
        in in_words.stdout
    )
    code, told = guest.check(more=("-cpu", "max"))
    assert (code, told["comes_back"]) == (1, False)


def test_a_guest_whose_unit_cannot_be_carried_over_any_more_follows_an_update(host: Host) -> None:
    """luo-qemu was started again over a running guest, with what the unit says by now."""
    guest = host.tenant()
    guest.start()
    guest.speak()
    guest.kill()
    guest.command += ["-snapshot"]
    guest.start(*AS_SAVED)
    guest.speak()
    host.kexec()
    host.reboot()
    guest.start(*AS_SAVED)
    guest.whole()


def test_a_qemu_that_cannot_start_what_was_saved_is_no_matter_of_the_unit() -> None:
    binary = shutil.which("qemu-system-x86_64") or ""
    capabilities = Plan([binary], None).capabilities()
    was = adapt([binary, "-machine", "q35"], capabilities)
    with pytest.raises(QemuMissing):
        Plan(["qemu-system-that-is-gone"], None, "as-saved").returning(was)
    gone = replace(was, hardware=replace(was.hardware, machine="pc-q35-1.0"))
    with pytest.raises(MachineUnknown):
        Plan([binary], None, "as-saved").returning(gone)
