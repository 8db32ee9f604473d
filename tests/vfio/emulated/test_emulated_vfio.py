# SPDX-License-Identifier: Apache-2.0
"""The emulated VFIO devices answer as vfio-pci of Linux 7.3 does for a simple PCI function."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from passthrough_host import DEVICES, IOVA, RAM, SIZE, Host, refused, short, signalled, started

from luod.adapters.emulator.pci_function import IDENTIFICATION, DeviceOption
from luod.adapters.emulator.process import Emulator
from luod.adapters.liveupdate.errors import DeviceAbsent
from luod.adapters.vfio import abi
from luod.adapters.vfio.config_space import ConfigSpace
from luod.adapters.vfio.pci import PciDevices


def test_nodes(host: Host) -> None:
    with refused(errno.ENOENT):
        host.device("vfio9")
    for path in ("/dev/vfio/vfio", "/dev/vfio0", "/dev/null", ""):
        with refused(errno.ENOENT):
            host.files.open(path)
    host.control.bind("vfio0", "")
    with refused(errno.ENOENT):
        host.device("vfio0")
    with refused(errno.ENODEV):
        host.control.bind("vfio9", "vfio-pci")


def test_a_machine_without_devices_has_no_nodes(tmp_path: Path) -> None:
    with started(tmp_path, devices=()) as host, refused(errno.ENOENT):
        host.iommufd()


def test_sysfs_shows_the_devices(host: Host) -> None:
    devices = PciDevices(sys=host.emulator.directory / "sys")
    assert devices.node("0000:00:04.0") == "/dev/vfio/devices/vfio0"
    assert devices.driver("0000:00:04.0") == "vfio-pci"
    assert devices.group("0000:00:04.0") != devices.group("0000:00:05.0")
    assert not devices.companions("0000:00:04.0")
    host.control.bind("vfio0", "edu")
    assert devices.driver("0000:00:04.0") == "edu"
    with refused(errno.ENODEV):
        devices.node("0000:00:04.0")


# -- binding -------------------------------------------------------------------------------------------------------------------


def test_bind_in_its_order(host: Host) -> None:
    device, iommufd = host.device(), host.iommufd()
    at = (abi.S_BIND.offsets["iommufd"],)

    def bind(size: int = 24, fds: tuple[int, ...] = at, **values: int) -> None:
        host.raw(device.fd, abi.DEVICE_BIND_IOMMUFD, short(abi.S_BIND, size, **values), fds)

    with refused(errno.EINVAL):
        device.info()
    with refused(errno.EINVAL):
        bind(12, iommufd=-1)
    too_long = short(abi.S_BIND, 32, iommufd=-1)
    too_long[-1] = 1
    with refused(errno.E2BIG):
        host.raw(device.fd, abi.DEVICE_BIND_IOMMUFD, too_long)
    with refused(errno.EINVAL):
        bind(iommufd=-1, fds=())
    with refused(errno.EINVAL):
        bind(iommufd=999, flags=2)
    with refused(errno.EBADF):
        bind(iommufd=999)
    with refused(errno.EBADFD):
        bind(iommufd=host.memory())
    with refused(errno.EBADFD):
        bind(iommufd=device.fd)
    device_id = device.bind(iommufd.fd)
    assert iommufd.device_ids(range(1, 9)) == [device_id]
    with refused(errno.EINVAL):
        device.bind(iommufd.fd)
    with refused(errno.EINVAL):  # open through another file
        host.device().bind(iommufd.fd)
    with refused(errno.EBUSY):
        host.control.bind("vfio0", "")
    host.close(device.fd)
    assert not iommufd.device_ids(range(1, 9))
    host.device().bind(iommufd.fd)


def test_attach(host: Host) -> None:
    guest = host.guest()
    with refused(errno.ENOENT):
        guest.device.attach(99)
    with refused(errno.EINVAL):
        guest.device.attach(guest.device_id)
    with refused(errno.EINVAL):
        host.raw(guest.device.fd, abi.DEVICE_ATTACH_IOMMUFD_PT, short(abi.S_ATTACH, 8))
    assert guest.device.attach(guest.hwpt) == guest.hwpt
    other = guest.iommufd.alloc_ioas()
    automatic = guest.device.attach(other)
    assert automatic not in (other, guest.hwpt)
    assert guest.device.attach(other) == automatic
    assert not host.dma(guest.device, guest.ram), "an empty address space lets a transfer through"
    guest.device.attach(guest.hwpt)
    assert guest.iommufd.hwpt_ids(range(1, 10)) == [guest.hwpt], (
        "the automatic page table has outlived its use"
    )
    assert host.dma(guest.device, guest.ram)


def test_information(host: Host) -> None:
    device = host.guest().device
    info = device.info()
    assert (info.regions, info.irqs, info.can_reset, info.is_pci) == (9, 5, True, True)
    assert device.region_info(abi.BAR0).size == 1 << 20
    assert not device.region_info(abi.BAR0).mappable
    assert device.region_info(1).size == 0
    for index in (8, 9, 1000):
        with refused(errno.EINVAL):
            device.region_info(index)
    assert [device.irq_info(index).vectors for index in (abi.INTX, abi.MSI, abi.MSIX)] == [1, 1, 0]
    with refused(errno.EINVAL):
        device.irq_info(5)
    for request, struct in (
        (abi.DEVICE_GET_INFO, abi.S_DEVICE_INFO),
        (abi.DEVICE_GET_REGION_INFO, abi.S_REGION_INFO),
        (abi.DEVICE_GET_IRQ_INFO, abi.S_IRQ_INFO),
    ):
        with refused(errno.EINVAL):
            host.raw(device.fd, request, short(struct, 12))
    host.raw(device.fd, abi.DEVICE_GET_INFO, short(abi.S_DEVICE_INFO, 16))
    with refused(errno.ENOTTY):
        host.raw(device.fd, 0x3B74, bytearray(32))


# -- interrupts ----------------------------------------------------------------------------------------------------------------


def test_interrupts_reach_their_eventfd(host: Host) -> None:
    device, first, second = host.guest().device, host.eventfd(), host.eventfd()
    device.set_irqs(abi.MSI, [first])
    device.write(abi.BAR0, 0x60, b"\1\0\0\0")
    assert signalled(first)
    device.set_irqs(abi.MSI, [second])
    device.trigger_irqs(abi.MSI, 1)
    assert signalled(second)
    assert not signalled(first)
    device.set_irqs(abi.MSI, [-1])
    device.trigger_irqs(abi.MSI, 1)
    assert not signalled(second)
    device.set_irqs(abi.MSI, [second])
    device.disable_irqs(abi.MSI)
    device.write(abi.BAR0, 0x60, b"\1\0\0\0")
    assert not signalled(second)
    assert host.state()["interrupts"] is None


def test_set_irqs_in_its_order(host: Host) -> None:
    device, eventfd = host.guest().device, host.eventfd()
    eventfds, none, trigger = 4, 1, 32

    def set_irqs(flags: int, index: int = abi.MSI, count: int = 1, data: bytes = b"", start: int = 0) -> None:
        buf = abi.S_IRQ_SET.pack(data, flags=flags, index=index, start=start, count=count)
        fds = (abi.S_IRQ_SET.size,) if len(data) == 4 else ()
        host.raw(device.fd, abi.DEVICE_SET_IRQS, buf, fds)

    word = eventfd.to_bytes(4, "little")
    with refused(errno.EINVAL):
        host.raw(device.fd, abi.DEVICE_SET_IRQS, short(abi.S_IRQ_SET, 16))
    for case in (
        lambda: set_irqs(trigger, data=word),  # no kind of data
        lambda: set_irqs(trigger | eventfds | none, data=word),
        lambda: set_irqs(trigger | eventfds | 64, data=word),
        lambda: set_irqs(trigger | eventfds, index=5, data=word),
        lambda: set_irqs(trigger | eventfds, index=abi.MSIX, data=word),
        lambda: set_irqs(trigger | eventfds, start=1, data=word),
        lambda: set_irqs(trigger | eventfds, count=2, data=word * 2),
        lambda: set_irqs(trigger | eventfds),  # no room for the eventfd
        lambda: set_irqs(trigger | none, count=0),  # off already
        lambda: set_irqs(trigger | none),  # nothing to trigger
    ):
        with refused(errno.EINVAL):
            case()
    with refused(errno.EBADF):
        set_irqs(trigger | eventfds, data=(999).to_bytes(4, "little"))
    with refused(errno.EINVAL):
        set_irqs(trigger | eventfds, data=host.memory().to_bytes(4, "little"))
    with refused(errno.ENOTTY):
        set_irqs(8 | none)  # only INTx can be masked
    with refused(errno.ENOTTY):
        set_irqs(eventfds, data=word)  # no action
    set_irqs(trigger | eventfds, data=word)
    with refused(errno.EINVAL):  # one kind at a time
        set_irqs(trigger | eventfds, index=abi.INTX, data=word)


# -- the device ----------------------------------------------------------------------------------------------------------------


def test_dma_needs_bus_mastering_and_a_mapping(host: Host) -> None:
    guest = host.guest()
    assert host.dma(guest.device, guest.ram)
    ConfigSpace(guest.device).set_bus_master(False)
    assert not host.dma(guest.device, guest.ram)
    ConfigSpace(guest.device).set_bus_master(True)
    assert not host.dma(guest.device, guest.ram, IOVA - 4096)
    guest.device.detach()
    assert not host.dma(guest.device, guest.ram)
    state = host.state()
    assert state["transfers"] == 2 + 1, state  # two, and the half that only left the buffer
    assert "no page table" in state["faults"]


def test_a_mapping_that_devices_may_only_read(host: Host) -> None:
    guest = host.guest()
    space = guest.iommufd.alloc_ioas()
    guest.iommufd.map_file(space, guest.ram, 0, 8192, IOVA, writable=False)
    guest.device.attach(space)
    assert not host.dma(guest.device, guest.ram)
    assert host.state()["transfers"] == 1


def test_registers(host: Host) -> None:
    guest = host.guest()
    device, config = guest.device, ConfigSpace(guest.device)
    assert int.from_bytes(device.read(abi.BAR0, 0, 4), "little") == IDENTIFICATION
    device.write(abi.BAR0, 4, b"\x0f\x00\x00\x00")
    assert device.read(abi.BAR0, 4, 4) == b"\xf0\xff\xff\xff"
    assert str(config.identity()) == "1234:11e8"
    device.write(abi.CONFIG, 0, b"\0\0\0\0")
    assert str(config.identity()) == "1234:11e8"
    device.reset()
    assert device.read(abi.BAR0, 4, 4) == bytes(4)
    assert config.bus_master(), "a reset of the function has touched its configuration"
    config.set_power_state(3)
    assert config.power_state() == 3
    with refused(errno.EIO):
        device.read(abi.BAR0, 0, 4)
    config.set_power_state(0)
    device.write(abi.CONFIG, 4, b"\0\0")
    with refused(errno.EIO):
        device.read(abi.BAR0, 0, 4)


def test_the_last_close_disables_the_device(host: Host) -> None:
    guest = host.guest()
    guest.device.set_irqs(abi.MSI, [host.eventfd()])
    copy = os.dup(guest.device.fd)
    host.close(guest.device.fd)
    assert host.state()["interrupts"] == abi.MSI
    os.close(copy)
    state = host.state()
    assert (state["interrupts"], state["command"], state["bound"], state["mappings"]) == (None, 0, None, [])


def test_features(host: Host) -> None:
    device = host.guest().device
    assert device.migration() is None
    assert not device.dma_logging()
    set_, get, probe = abi.FEATURE_SET, abi.FEATURE_GET, abi.FEATURE_PROBE

    def feature(flags: int) -> None:
        host.raw(device.fd, abi.DEVICE_FEATURE, abi.S_FEATURE.pack(flags=flags))

    low_power = 3
    feature(low_power | set_ | probe)
    for flags in (low_power, low_power | get | set_, low_power | set_ | 1 << 19, low_power | get):
        with refused(errno.EINVAL):
            feature(flags)
    feature(low_power | set_)
    assert not host.state()["awake"]
    feature(5 | set_)
    assert host.state()["awake"]


# -- the machine ---------------------------------------------------------------------------------------------------------------


def test_a_reboot_ends_what_is_not_carried(host: Host) -> None:
    host.guest()
    host.jump()
    state = host.state()
    assert (state["bound"], state["command"], state["mappings"], state["arrived"]) == (None, 0, [], False)
    host.device()


def test_a_fault_can_be_ordered(host: Host) -> None:
    iommufd = host.iommufd()
    host.control.inject("device", errno=errno.ENOMEM, op="IOMMU_IOAS_ALLOC")
    with refused(errno.ENOMEM):
        iommufd.alloc_ioas()
    iommufd.alloc_ioas()


def test_the_audit_says_what_was_done_to_what(host: Host) -> None:
    guest = host.guest()
    (bind,) = host.calls("VFIO_DEVICE_BIND_IOMMUFD")
    assert (bind["file"], bind["argument"]["out_devid"]) == ("vfio0", guest.device_id)
    (mapped,) = host.calls("IOMMU_IOAS_MAP_FILE")
    assert (mapped["file"], mapped["argument"]["iova"]) == ("iommufd1", IOVA)
    assert not host.calls("VFIO_DEVICE_GET_INFO")


def test_nothing_stays_open_in_the_kernel(host: Host) -> None:
    """Its descriptors are as many after guests have come, gone through a reboot, been finished and ended."""

    def count() -> int:
        host.control.state()
        return len(os.listdir(f"/proc/{host.emulator.pid}/fd"))

    before = count()
    session = host.carried()
    own, device = host.retrieved_iommufd(session), host.retrieved_device(session)
    device.bind(own.fd)
    host.restore_hwpt(own)
    device.set_irqs(abi.MSI, [host.eventfd()])
    ioas = own.alloc_ioas()
    own.map_file(ioas, host.retrieve(session, RAM), 0, SIZE, IOVA)
    device.attach(ioas)
    with refused(errno.EINVAL):
        device.set_irqs(abi.INTX, [host.eventfd()])
    host.kernel.finish(session)
    host.fresh()
    assert count() == before
    host.carried()  # nobody retrieves anything of it
    host.fresh()
    host.jump()
    host.guest()
    host.fresh()
    assert count() == before


def test_calls_of_another_kind_of_file(host: Host) -> None:
    iommufd, session = host.iommufd(), host.session()
    with refused(errno.ENOTTY):
        host.kernel.session_name(iommufd.fd)
    with refused(errno.ENOTTY):
        host.kernel.preserve_fd(iommufd.fd, 1, host.memory())
    with refused(errno.EINVAL):
        host.raw(session, 0x3B81, bytearray(12))
    pipe, other = os.pipe()
    host.own(pipe), host.own(other)
    with refused(errno.ENOTTY):
        host.raw(pipe, 0x3B81, bytearray(12))
    with refused(errno.EBADF):
        host.raw(9999, 0x3B81, bytearray(12))
    for call in (lambda: host.files.pread(iommufd.fd, 4, 0), lambda: host.files.pwrite(iommufd.fd, b"x", 0)):
        with refused(errno.EINVAL):
            call()


def test_options() -> None:
    assert DeviceOption.parse("a", 0) == DeviceOption("a", "0000:00:04.0")
    assert DeviceOption.parse("a,bdf=0000:01:00.0,driver=,vf,noiommu", 3) == DeviceOption(
        "a", "0000:01:00.0", "", vf=True, noiommu=True
    )
    for text in ("", "a,x", "a,colour=red"):
        with pytest.raises(ValueError, match=r"vf or noiommu|needs a name"):
            DeviceOption.parse(text, 0)


@pytest.mark.parametrize(
    "devices", [(DEVICES[0], DEVICES[0]), ("a,bdf=0000:00:04.0", "b,bdf=0000:00:04.0"), ("a,x",)]
)
def test_options_that_make_no_machine(
    tmp_path: Path, devices: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeviceAbsent):
        Emulator.start(tmp_path / "emu", devices=devices)
    assert "Traceback" not in capfd.readouterr().err
