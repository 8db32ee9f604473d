# SPDX-License-Identifier: Apache-2.0
"""A guest that is a Linux, with a disk it writes to without a pause and a network card, goes through updates of its host."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from linux_rig import LinuxGuest
from wrapper_rig import Host

from luod.lab.errors import LabUnavailable
from luod.lab.images import KernelImage, find_image
from luod.lab.qemus import available_qemus

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def kernel() -> KernelImage:
    """The newest kernel here, as a guest's."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler for the guest's init")
    try:
        return find_image()
    except LabUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def host(disk_path: Path) -> Iterator[Host]:
    with Host(disk_path / "state") as host:
        yield host


@pytest.fixture
def guest(host: Host, kernel: KernelImage) -> LinuxGuest:
    guest = host.enter_context(LinuxGuest(host.world, "vm1", kernel=kernel))
    host.tenants.append(guest)
    return guest


def test_it_counts_on_its_disk_and_over_its_network_through_two_updates(
    host: Host, guest: LinuxGuest
) -> None:
    guest.start()
    guest.whole()
    for number in (1, 2):
        host.kexec()
        host.reboot()
        guest.start()
        guest.whole()
        assert host.session(f"vm1.{number}")["state"] == "finished"
    assert guest.power_off() == 0
    assert guest.log.end == guest.log.last


def test_what_it_wrote_is_on_its_disk_for_a_cold_start(host: Host, guest: LinuxGuest) -> None:
    guest.start()
    guest.whole()
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()
    assert guest.power_off() == 0
    guest.ending = False
    guest.log.end = -1
    guest.start()
    guest.speak()
    assert guest.log.findings == []
    assert guest.log.left == [0, guest.log.left[1]]
    assert len(guest.log.ids) == 2, "the machine was started anew"


def test_an_update_that_is_called_off_costs_it_nothing(host: Host, guest: LinuxGuest) -> None:
    guest.start()
    guest.whole()
    qemu = guest.qemu
    host.world.control.inject("reboot", errno=16)
    host.kexec()
    assert "EBUSY" in host.aborted()
    guest.whole()
    assert guest.find_qemu() == qemu
    assert guest.power_off() == 0
    assert guest.log.end == guest.log.last


def test_it_dies_with_its_qemu_after_the_save_and_comes_back_with_what_it_had_written(
    host: Host, guest: LinuxGuest
) -> None:
    """The old process is killed, not ended: nothing of the disk may have been in its memory only."""
    slow = host.companion()
    guest.start()
    guest.whole()
    host.kexec()
    slow.hold()
    host.world.wait_record("session.ready", "vm1.1")
    guest.kill_qemu()
    slow.ready()
    host.reboot()
    guest.start()
    guest.whole()
    assert guest.power_off() == 0
    assert guest.log.end == guest.log.last


def test_it_goes_from_the_oldest_qemu_to_the_newest(host: Host, guest: LinuxGuest) -> None:
    qemus = available_qemus()
    if len(qemus) < 2:
        pytest.skip("needs a second QEMU version: luoctl lab fetch-qemu")
    guest.command[0] = str(qemus[0].binary)
    guest.start()
    guest.whole()
    host.kexec()
    host.reboot()
    guest.command[0] = str(qemus[-1].binary)
    guest.start()
    guest.whole()
    assert guest.power_off() == 0
    assert guest.log.end == guest.log.last
