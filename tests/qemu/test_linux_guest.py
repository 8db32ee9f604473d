# SPDX-License-Identifier: Apache-2.0
"""A guest that is a Linux, with a disk it writes to without a pause and a network card, goes through updates of its host."""

from __future__ import annotations

import errno
import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from linux_rig import LinuxGuest
from own_network import own_network
from wrapper_rig import Host

from luod.adapters.qemu.monitor import Monitor
from luod.lab.errors import LabUnavailable
from luod.lab.images import KernelImage, find_image
from luod.lab.qemus import available_qemus

OVMF = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
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
def guest(host: Host, kernel: KernelImage) -> LinuxGuest:
    guest = host.enter_context(LinuxGuest(host.world, "vm1", kernel=kernel))
    host.tenants.append(guest)
    return guest


def update(host: Host, guest: LinuxGuest) -> None:
    """Replace the host's kernel, start the guest again, and see that it is whole."""
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()


def test_it_counts_on_its_disk_and_over_its_network_through_two_updates(
    host: Host, guest: LinuxGuest
) -> None:
    guest.start()
    guest.whole()
    for number in (1, 2):
        update(host, guest)
        assert host.session(f"vm1.{number}")["state"] == "finished"
    assert guest.power_off() == 0


def test_what_it_wrote_is_on_its_disk_for_a_cold_start(host: Host, guest: LinuxGuest) -> None:
    guest.start()
    guest.whole()
    update(host, guest)
    assert guest.power_off() == 0
    guest.order = b""
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


def test_as_a_management_layer_writes_its_command_line(host: Host, guest: LinuxGuest) -> None:
    """JSON for devices and block nodes, disks past the page cache in a thread of their own, a sandbox, a uuid: libvirt's manner."""
    serial = guest.command[guest.command.index("-chardev") + 1]
    guest.command = [
        "qemu-system-x86_64", "-name", "guest=vm1,debug-threads=on",
        "-machine", "pc-q35-9.2,usb=off,dump-guest-core=off,memory-backend=pc.ram",
        "-accel", "tcg,thread=multi", "-cpu", "Nehalem,vmx=off", "-m", "size=163840k",
        "-object", '{"qom-type":"memory-backend-ram","id":"pc.ram","size":167772160}', "-overcommit", "mem-lock=off",
        "-smp", "2,sockets=2,cores=1,threads=1", "-object", '{"qom-type":"iothread","id":"iothread1"}',
        "-uuid", "6f0e3a0e-3a0e-4a0e-8a0e-6f0e3a0e3a0e", "-display", "none", "-no-user-config", "-nodefaults",
        "-rtc", "base=utc,driftfix=slew", "-no-reboot", "-boot", "strict=on",
        "-device", '{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}',
        "-device", '{"driver":"pcie-root-port","port":17,"chassis":2,"id":"pci.2","bus":"pcie.0","addr":"0x2.0x1"}',
        "-blockdev", json.dumps({"driver": "file", "filename": str(guest.disk), "aio": "native", "node-name": "storage",
                                 "cache": {"direct": True, "no-flush": False}}),
        "-blockdev", json.dumps({"driver": "qcow2", "file": "storage", "node-name": "format",
                                 "cache": {"direct": True, "no-flush": False}}),
        "-device", '{"driver":"virtio-blk-pci","iothread":"iothread1","bus":"pci.1","addr":"0x0","drive":"format","id":"disk0"}',
        "-netdev", '{"type":"user","id":"hostnet0"}',
        "-device", '{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:11:22:33","bus":"pci.2","addr":"0x0"}',
        "-chardev", serial, "-device", '{"driver":"isa-serial","chardev":"s0","id":"serial0","index":0}',
        "-global", "ICH9-LPC.noreboot=off", "-watchdog-action", "reset",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny", "-msg", "timestamp=on",
        *guest.command[guest.command.index("-kernel"):guest.command.index("-smp")],
    ]  # fmt: skip
    guest.start()
    guest.whole()
    for _ in range(2):
        update(host, guest)
    assert guest.power_off() == 0


def test_it_may_start_itself_again_before_and_after_an_update(host: Host, guest: LinuxGuest) -> None:
    guest.command.remove("-no-reboot")
    guest.log.strict = False  # the firmware has a word when a machine starts again
    guest.start()
    guest.whole()
    guest.boot_again()
    for boots in (2, 3):
        host.kexec()
        host.reboot()
        guest.start()
        guest.whole(boots)
        guest.boot_again()
        guest.whole(boots + 1)
    assert guest.power_off() == 0


def await_status(monitor: Monitor, status: str, event: str) -> None:
    """Wait until a guest is in a runstate to which an event leads."""
    with monitor.listen() as events:
        if monitor.execute("query-status")["status"] != status:
            events.wait({event}, time.monotonic() + 30)
        assert monitor.execute("query-status")["status"] == status


def test_while_it_is_suspended_to_ram(host: Host, guest: LinuxGuest) -> None:
    path = guest.users_monitor()
    guest.command += ["-global", "ICH9-LPC.disable_s3=0"]
    guest.command[guest.command.index("-smp") + 1] = (
        "1"  # a second emulated processor takes ten seconds to wake up
    )
    guest.start()
    guest.whole()
    guest.sleep()
    with Monitor.connect(path, timeout_s=30) as monitor:
        await_status(monitor, "suspended", "SUSPEND")
    last = guest.drain()
    for _ in range(2):
        host.kexec()
        host.reboot()
        guest.start()
        with Monitor.connect(path, timeout_s=30) as monitor:
            assert monitor.execute("query-status")["status"] == "suspended"
    assert guest.drain() == last
    with Monitor.connect(path, timeout_s=30) as monitor:
        monitor.execute("system_wakeup")
    guest.whole()


def test_while_its_disk_has_no_space(host: Host, guest: LinuxGuest) -> None:
    """werror=stop: the guest stands still until somebody has made room, then and in the new kernel; no write is lost."""
    path = guest.users_monitor()
    fault = {"event": "write_aio", "errno": errno.ENOSPC, "once": True}
    file = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(guest.disk)},
        "inject-error": [fault],
    }
    where = guest.command.index("-drive")
    guest.command[where : where + 4] = [
        "-blockdev", json.dumps({"driver": "qcow2", "node-name": "d0", "file": file}),
        "-device", "virtio-blk-pci,drive=d0,werror=stop",
    ]  # fmt: skip
    guest.start()
    with Monitor.connect(path, timeout_s=30) as monitor:
        await_status(monitor, "io-error", "STOP")
    host.kexec()
    host.reboot()
    guest.start()
    with Monitor.connect(path, timeout_s=30) as monitor:
        assert monitor.execute("query-status")["status"] == "io-error"
        monitor.execute("cont")  # the new QEMU has a fault of its own
        await_status(monitor, "io-error", "STOP")
        monitor.execute("cont")
    guest.whole()
    assert guest.power_off() == 0


def test_on_a_tap_device(disk_path: Path, kernel: KernelImage) -> None:
    with ExitStack() as stack:
        try:
            stack.enter_context(own_network("tap0", "10.0.2.2"))
        except OSError as error:
            pytest.skip(f"no network of its own for a test here: {error}")
        host = stack.enter_context(Host(disk_path / "state"))
        network = "tap,ifname=tap0,script=no,downscript=no"
        guest = LinuxGuest(host.world, "vm1", kernel=kernel, network=network, host="10.0.2.2")
        host.enter_context(guest)
        host.tenants.append(guest)
        guest.start()
        guest.whole()
        update(host, guest)
        assert guest.power_off() == 0


def test_with_uefi_and_its_variables_in_flash(host: Host, guest: LinuxGuest) -> None:
    if not OVMF.exists():
        pytest.skip("needs the firmware of the package ovmf")
    variables = guest.disk.with_name("vars.fd")
    shutil.copy(OVMF.with_name("OVMF_VARS_4M.fd"), variables)
    guest.log.strict = False  # the firmware speaks on the serial port, too
    guest.command += [
        "-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}", "-drive", f"if=pflash,format=raw,file={variables}",
    ]  # fmt: skip
    guest.start()
    guest.whole()
    for _ in range(2):
        update(host, guest)


def test_a_device_that_qemu_cannot_migrate_is_named_and_the_guest_goes_on(
    host: Host, guest: LinuxGuest
) -> None:
    extra = guest.disk.with_name("extra.img")
    extra.write_bytes(bytes(1 << 20))
    guest.command += ["-drive", f"file={extra},format=raw,if=none,id=d1", "-device", "nvme,drive=d1,serial=1"]
    guest.start()
    guest.whole()
    host.kexec()
    assert "nvme" in host.aborted()
    guest.whole()
