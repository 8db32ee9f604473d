# SPDX-License-Identifier: Apache-2.0
"""The contract proposed for live update of iommufd and VFIO, rule by rule, in the order in which the kernel would look."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from passthrough_host import (
    CDEV,
    HWPT_TOKEN,
    IOMMUFD,
    IOVA,
    OTHER_CDEV,
    PHASE_ONE,
    RAM,
    SIZE,
    Host,
    refused,
    started,
)

from luod.adapters import memfd, proposed
from luod.adapters.emulator.address_space import AddressSpace
from luod.adapters.emulator.board import ArrivedDevice, ArrivedIommufd, Board
from luod.adapters.emulator.iommufd import Arrived
from luod.adapters.emulator.passthrough import VfioHandler
from luod.adapters.emulator.pci_function import DeviceOption
from luod.adapters.iommufd import abi as iommufd_abi
from luod.adapters.iommufd import liveupdate
from luod.adapters.vfio import abi
from luod.adapters.vfio.config_space import ConfigSpace

# -- marking -------------------------------------------------------------------------------------------------------------------


def test_a_token_is_used_once(host: Host) -> None:
    guest = host.guest()
    other = guest.iommufd.alloc_hwpt(guest.device_id, guest.ioas)
    with refused(errno.EADDRINUSE):
        liveupdate.mark_preserve(host.files, guest.iommufd.fd, other, HWPT_TOKEN)
    with refused(errno.ENOENT):
        liveupdate.mark_preserve(host.files, guest.iommufd.fd, guest.ioas, 1)
    liveupdate.mark_preserve(host.files, guest.iommufd.fd, other, HWPT_TOKEN + 1)
    # Another iommufd has tokens of its own.
    liveupdate.mark_preserve(host.files, host.guest("vfio1", mark=None).iommufd.fd, 3, HWPT_TOKEN)


def test_a_kernel_without_the_series_does_not_know_the_call(tmp_path: Path) -> None:
    with started(tmp_path, handlers=()) as host:
        guest = host.guest(mark=None)
        for request in proposed.REQUESTS.values():
            with refused(errno.ENOTTY):
                host.raw(guest.iommufd.fd, request, bytearray(24))
        session = host.session()
        for fd in (guest.iommufd.fd, guest.device.fd):
            with refused(errno.ENOENT):
                host.kernel.preserve_fd(session, 1, fd)


# -- preserving ----------------------------------------------------------------------------------------------------------------


def test_the_order_is_memory_iommufd_device(host: Host) -> None:
    guest, session = host.guest(), host.session()
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, CDEV, guest.device.fd)
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    host.preserve(session, guest)
    for fd in (guest.iommufd.fd, guest.device.fd):
        with refused(errno.EBUSY):
            host.kernel.preserve_fd(session, 0x99, fd)


def test_what_is_in_another_session_does_not_count(host: Host) -> None:
    guest, session, other = host.guest(), host.session(), host.session("other")
    host.kernel.preserve_fd(other, RAM, guest.ram)
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    host.kernel.preserve_fd(other, IOMMUFD, guest.iommufd.fd)
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, CDEV, guest.device.fd)


def test_memory_that_was_sealed_too_late(host: Host) -> None:
    guest, session = host.guest(sealed=False), host.session()
    memfd.seal_for_preservation(guest.ram)
    host.kernel.preserve_fd(session, RAM, guest.ram)
    with refused(errno.EINVAL):
        host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    # Mapped again, it is as it should be.
    guest.iommufd.unmap(guest.ioas, IOVA, SIZE)
    guest.iommufd.map_file(guest.ioas, guest.ram, 0, SIZE, IOVA)
    host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)


def test_memory_that_is_no_file(host: Host) -> None:
    guest, session = host.guest(), host.session()
    host.kernel.preserve_fd(session, RAM, guest.ram)
    guest.iommufd.map(guest.ioas, 0x7F0000000000, 4096, IOVA + SIZE)
    with refused(errno.EINVAL):
        host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    guest.iommufd.unmap(guest.ioas, IOVA + SIZE, 4096)
    host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)


def test_the_first_bad_mapping_decides(host: Host) -> None:
    """In the order of addresses: an unsealed one is EINVAL, one that is not preserved ENOENT."""
    guest, session = host.guest(), host.session()
    unsealed = host.memory(4096, sealed=False)
    guest.iommufd.map_file(guest.ioas, unsealed, 0, 4096, IOVA + SIZE)
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    host.kernel.preserve_fd(session, RAM, guest.ram)
    with refused(errno.EINVAL):
        host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)


def test_a_page_table_without_a_domain(host: Host) -> None:
    guest = host.guest("vfio3")
    session = host.session()
    with refused(errno.EINVAL):  # before its mappings are looked at, which would be ENOENT
        host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)


def test_an_unmarked_page_table(host: Host) -> None:
    guest, session = host.guest(mark=None), host.session()
    host.kernel.preserve_fd(session, RAM, guest.ram)
    host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    with refused(errno.EINVAL):
        host.kernel.preserve_fd(session, CDEV, guest.device.fd)
    # Marking it now is too late: its iommufd was preserved without it.
    liveupdate.mark_preserve(host.files, guest.iommufd.fd, guest.hwpt, HWPT_TOKEN)
    with refused(errno.EINVAL):
        host.kernel.preserve_fd(session, CDEV, guest.device.fd)


def test_a_device_that_is_not_attached(host: Host) -> None:
    guest, session = host.guest(), host.session()
    guest.device.detach()
    host.kernel.preserve_fd(session, RAM, guest.ram)
    host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, CDEV, guest.device.fd)
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, CDEV, host.device("vfio1").fd)


def test_a_device_of_another_iommufd(host: Host) -> None:
    """Not even if that one has a page table of the same token."""
    guest, other, session = host.guest(), host.guest("vfio1"), host.session()
    host.kernel.preserve_fd(session, RAM, guest.ram)
    host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, CDEV, other.device.fd)


def test_a_virtual_function(host: Host) -> None:
    guest, session = host.guest("vfio2"), host.session()
    host.kernel.preserve_fd(session, RAM, guest.ram)
    host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, CDEV, guest.device.fd)


def test_a_preserved_address_space_is_immutable(host: Host) -> None:
    guest, session = host.guest(), host.session()
    other = guest.iommufd.alloc_ioas()
    host.preserve(session, guest)
    with refused(errno.EBUSY):
        guest.iommufd.map_file(guest.ioas, guest.ram, 0, 4096, IOVA + SIZE)
    with refused(errno.EBUSY):
        guest.iommufd.unmap(guest.ioas, IOVA, SIZE)
    with refused(errno.EBUSY):
        guest.iommufd.copy(guest.ioas, IOVA, 4096, guest.ioas, IOVA + SIZE)
    with refused(errno.EBUSY):
        guest.device.attach(other)
    with refused(errno.EBUSY):
        guest.device.detach()
    with refused(errno.EBUSY):
        guest.iommufd.destroy(guest.hwpt)
    # What is not preserved goes on.
    guest.iommufd.map_file(other, guest.ram, 0, 4096, IOVA)
    assert host.dma(guest.device, guest.ram)
    # The end of the session ends all of it.
    host.close(session)
    guest.iommufd.map_file(guest.ioas, guest.ram, 0, 4096, IOVA + SIZE)
    guest.device.attach(other)
    host.preserve(host.session(), host.guest("vfio1"))


def test_a_failed_preserve_leaves_the_address_space_as_it_was(host: Host) -> None:
    guest, session = host.guest(), host.session()
    with refused(errno.ENOENT):
        host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    guest.iommufd.unmap(guest.ioas, IOVA, SIZE)


# -- the freeze ----------------------------------------------------------------------------------------------------------------


def test_interrupts_that_are_on(host: Host) -> None:
    guest, session = host.guest(), host.session()
    guest.device.set_irqs(abi.MSI, [host.eventfd()])
    host.preserve(session, guest)
    host.load()
    with refused(errno.EINVAL):
        host.control.kexec()
    guest.device.disable_irqs(abi.MSI)
    assert host.dma(guest.device, guest.ram), "a freeze that was refused has changed the device"
    host.jump()


def test_a_device_that_sleeps(host: Host) -> None:
    guest, session = host.guest(), host.session()
    host.preserve(session, guest)
    ConfigSpace(guest.device).set_power_state(3)
    host.load()
    with refused(errno.EINVAL):
        host.control.kexec()
    ConfigSpace(guest.device).set_power_state(0)
    host.jump()


def test_a_frozen_device_is_dead_until_it_is_closed(host: Host) -> None:
    """There is no unfreeze: a later file that does not freeze leaves the device dead. Then also the last fd and the session must go."""
    guest, other, session = host.guest(), host.guest("vfio1"), host.session()
    host.preserve(session, guest)
    second = host.session("second")
    other.device.set_irqs(abi.MSI, [host.eventfd()])
    host.preserve(second, other)
    host.load()
    with refused(errno.EINVAL):
        host.control.kexec()
    for call in (
        guest.device.info,
        guest.device.reset,
        lambda: guest.device.bind(guest.iommufd.fd),
        lambda: host.files.pread(guest.device.fd, 4, abi.CONFIG << 40),
        lambda: host.files.pwrite(guest.device.fd, b"\0\0", (abi.CONFIG << 40) + 4),
    ):
        with refused(errno.EIO):
            call()
    assert host.state()["command"] == 0, "bus mastering is left on"
    other.device.info()  # its own freeze was refused
    host.close(guest.device.fd)
    assert host.state()["frozen"], "LUO still holds it"
    host.close(session)
    again = host.device()
    again.bind(guest.iommufd.fd)
    again.attach(guest.hwpt)
    ConfigSpace(again).set_bus_master(True)
    assert host.dma(again, guest.ram)


# -- the new kernel ------------------------------------------------------------------------------------------------------------


def test_a_claimed_device_cannot_be_opened_or_rebound(host: Host) -> None:
    host.carried()
    with refused(errno.EBUSY):
        host.device()
    with refused(errno.EBUSY):
        host.control.bind("vfio0", "edu")
    host.device("vfio1")
    assert host.state()["mappings"] == [{"iova": IOVA, "length": SIZE}], "the page table is not attached"


def test_a_device_that_the_host_has_not_bound(host: Host) -> None:
    host.control.bind("vfio0", "", at_boot=True)
    session = host.carried()
    with refused(errno.ENODEV):
        host.retrieve(session, CDEV)
    host.control.bind("vfio0", "vfio-pci")
    with refused(errno.ENODEV):  # for ever
        host.retrieve(session, CDEV)
    with refused(errno.EBUSY):
        host.kernel.finish(session)


def test_nothing_works_before_the_bind(host: Host) -> None:
    session = host.carried()
    device = host.retrieved_device(session)
    for call in (device.info, device.reset, lambda: device.attach(1)):
        with refused(errno.EINVAL):
            call()
    with refused(errno.EINVAL):
        host.files.pread(device.fd, 4, abi.CONFIG << 40)


def test_bind_to_its_own_iommufd_only(host: Host) -> None:
    session = host.carried()
    device = host.retrieved_device(session)
    with refused(errno.EPERM):
        device.bind(host.iommufd().fd)
    own = host.retrieved_iommufd(session)
    device.bind(own.fd)
    with refused(errno.EINVAL):
        device.bind(own.fd)


def test_retrieving_again_gives_the_same_file(host: Host) -> None:
    session = host.carried()
    own = host.retrieved_iommufd(session)
    first = host.retrieved_device(session)
    device_id = first.bind(own.fd)
    host.close(first.fd)
    second = host.retrieved_device(session)
    assert second.bound()
    assert own.device_ids(range(1, 8)) == [device_id]


def test_finish_waits_for_every_rule(host: Host) -> None:
    session = host.carried()
    ram = host.retrieve(session, RAM)

    def busy() -> None:
        with refused(errno.EBUSY):
            host.kernel.finish(session)

    busy()
    own = host.retrieved_iommufd(session)
    busy()
    device = host.retrieved_device(session)
    busy()
    with refused(errno.ENODEV):
        host.restore_hwpt(own)  # its device is not bound
    device.bind(own.fd)
    busy()
    with refused(errno.ENOENT):
        host.restore_hwpt(own, HWPT_TOKEN + 1)
    restored = host.restore_hwpt(own)
    with refused(errno.ENOENT):
        host.restore_hwpt(own)
    busy()  # the device is still attached to it
    ConfigSpace(device).set_bus_master(True)
    assert host.dma(device, ram), "the restored page table does not lead to the retrieved memory"
    with refused(errno.EBUSY):
        own.destroy(restored)
    ioas = own.alloc_ioas()
    own.map_file(ioas, ram, 0, SIZE, IOVA)
    device.attach(own.alloc_hwpt(1, ioas))
    host.kernel.finish(session)
    assert host.dma(device, ram)
    own.destroy(restored)
    host.close(device.fd)
    host.device()  # the claim is over


def test_finish_needs_the_iommufd(host: Host) -> None:
    guest, session = host.guest(), host.session()
    host.kernel.preserve_fd(session, RAM, guest.ram)
    host.kernel.preserve_fd(session, IOMMUFD, guest.iommufd.fd)
    host.jump()
    session = host.retrieved_session()
    with refused(errno.EBUSY):
        host.kernel.finish(session)
    own = host.retrieved_iommufd(session)
    host.restore_hwpt(own)
    host.kernel.finish(session)


def test_finish_needs_every_device(host: Host) -> None:
    guest, session = host.guest(), host.session()
    second = host.device("vfio1")
    second_id = second.bind(guest.iommufd.fd)
    table = guest.iommufd.alloc_hwpt(second_id, guest.ioas)
    second.attach(table)
    liveupdate.mark_preserve(host.files, guest.iommufd.fd, table, HWPT_TOKEN + 1)
    host.preserve(session, guest)
    host.kernel.preserve_fd(session, OTHER_CDEV, second.fd)
    host.jump()
    session = host.retrieved_session()
    own, device = host.retrieved_iommufd(session), host.retrieved_device(session)
    other = type(device)(host.files, host.retrieve(session, OTHER_CDEV), name="other")
    ioas = own.alloc_ioas()
    for one, token in ((device, HWPT_TOKEN), (other, HWPT_TOKEN + 1)):
        with refused(errno.EBUSY):
            host.kernel.finish(session)
        one.bind(own.fd)
        host.restore_hwpt(own, token)
        one.attach(ioas)
    host.close(other.fd)  # the session holds the file: it stays bound
    host.kernel.finish(session)


def test_what_a_device_itself_asks_of_finish() -> None:
    """Retrieved and bound. Its iommufd asks for more, so that a whole machine cannot show it."""
    board = Board.of([DeviceOption("vfio0", "0000:00:04.0")])
    handler = VfioHandler("vfio-pci-v1", board)
    arrived = ArrivedDevice("0000:00:04.0", ArrivedIommufd({}), Arrived(AddressSpace()))
    assert not handler.can_finish(arrived, "retrieved")
    board.slots["vfio0"].function.opener = object()
    assert handler.can_finish(arrived, "retrieved")
    assert not handler.can_finish(arrived, "untouched")
    assert not handler.can_finish(arrived, "failed")


def test_a_mapping_keeps_its_place_in_the_memory(host: Host) -> None:
    guest, session = host.guest(), host.session()
    guest.iommufd.unmap(guest.ioas, IOVA, SIZE)
    guest.iommufd.map_file(guest.ioas, guest.ram, 4096, 8192, IOVA)
    os.pwrite(guest.ram, b"second page", 4096)
    host.preserve(session, guest)
    host.jump()
    session = host.retrieved_session()
    own, device, ram = (
        host.retrieved_iommufd(session),
        host.retrieved_device(session),
        host.retrieve(session, RAM),
    )
    device.bind(own.fd)
    ConfigSpace(device).set_bus_master(True)
    assert not host.dma(device, ram), "the mapping begins at the second page"
    assert os.pread(ram, 64, 8192) == bytes(64)
    os.pwrite(ram, b"x" * 64, 4096)
    host.copy(device, IOVA, IOVA + 4096)
    assert os.pread(ram, 64, 8192) == b"x" * 64


def test_a_restored_page_table_can_go_on(host: Host) -> None:
    """It is what it was: marked again, it could be carried again."""
    session = host.carried()
    ram, own = host.retrieve(session, RAM), host.retrieved_iommufd(session)
    device = host.retrieved_device(session)
    device.bind(own.fd)
    restored, ioas = host.restore_hwpt(own), own.alloc_ioas()
    device.attach(ioas)
    host.kernel.finish(session)
    device.attach(restored)
    liveupdate.mark_preserve(host.files, own.fd, restored, HWPT_TOKEN)
    outgoing = host.session("vm")
    for token, fd in ((RAM, ram), (IOMMUFD, own.fd), (CDEV, device.fd)):
        host.kernel.preserve_fd(outgoing, token, fd)
    host.jump()
    assert host.state()["mappings"] == [{"iova": IOVA, "length": SIZE}]


def test_restore_is_for_retrieved_iommufds(host: Host) -> None:
    with refused(errno.ENOTTY):
        host.restore_hwpt(host.iommufd())


def test_a_new_page_table_may_come_first(host: Host) -> None:
    """A device that was switched before its old page table is reclaimed is not brought back by that."""
    session = host.carried()
    ram, own, device = (
        host.retrieve(session, RAM),
        host.retrieved_iommufd(session),
        host.retrieved_device(session),
    )
    device_id = device.bind(own.fd)
    ioas = own.alloc_ioas()
    own.map_file(ioas, ram, 4096, 4096, IOVA)
    device.attach(own.alloc_hwpt(device_id, ioas))
    with refused(errno.EBUSY):
        host.kernel.finish(session)
    host.restore_hwpt(own)
    host.kernel.finish(session)
    assert host.state()["mappings"] == [{"iova": IOVA, "length": 4096}]


def test_memory_stays_the_same_across_the_jump(host: Host) -> None:
    """What the device writes after the bind, before anything new is mapped, is seen through the retrieved memfd and the other way."""
    session = host.carried()
    own, device = host.retrieved_iommufd(session), host.retrieved_device(session)
    device.bind(own.fd)
    ConfigSpace(device).set_bus_master(True)
    ram = host.retrieve(session, RAM)
    assert os.pread(ram, 7, 0) == b"carried"
    assert host.dma(device, ram)


def test_closing_the_session_is_no_way_around(host: Host) -> None:
    session = host.carried()
    host.close(session)
    with refused(errno.EINVAL):
        host.retrieved_session()
    with refused(errno.EBUSY):
        host.device()
    host.jump()
    host.device()


def test_two_devices_of_one_guest(host: Host) -> None:
    guest, session = host.guest(), host.session()
    second = host.device("vfio1")
    second.bind(guest.iommufd.fd)
    second.attach(guest.hwpt)
    host.preserve(session, guest)
    host.kernel.preserve_fd(session, OTHER_CDEV, second.fd)
    host.jump()
    session = host.retrieved_session()
    own, device = host.retrieved_iommufd(session), host.retrieved_device(session)
    device.bind(own.fd)
    with refused(errno.ENODEV):
        host.restore_hwpt(own)
    other = type(device)(host.files, host.retrieve(session, OTHER_CDEV), name="other")
    other.bind(own.fd)
    host.restore_hwpt(own)
    ioas = own.alloc_ioas()
    device.attach(ioas)
    with refused(errno.EBUSY):
        host.kernel.finish(session)
    other.attach(ioas)
    host.kernel.finish(session)


def test_phase_one_comes_to_no_end(tmp_path: Path) -> None:
    with started(tmp_path, handlers=(PHASE_ONE,)) as host:
        session = host.carried()
        for _ in range(2):
            with refused(errno.EOPNOTSUPP):
                host.retrieve(session, IOMMUFD)
        device = host.retrieved_device(session)
        with refused(errno.EPERM):
            device.bind(host.iommufd().fd)
        with refused(errno.EBUSY):
            host.kernel.finish(session)


def test_a_kernel_without_the_handlers_cannot_open_the_sessions(host: Host) -> None:
    guest, session = host.guest(), host.session()
    host.preserve(session, guest)
    host.jump(handlers={"iommufd": None, "vfio-pci": None})
    with refused(errno.EIO):
        host.kernel.retrieve_session("vm")
    host.device()  # nobody claims it


def test_a_second_update(host: Host) -> None:
    """What was restored is preserved again, over the same memory."""
    session = host.carried()
    for update in range(2):
        ram, own, device = (
            host.retrieve(session, RAM),
            host.retrieved_iommufd(session),
            host.retrieved_device(session),
        )
        device_id = device.bind(own.fd)
        host.restore_hwpt(own, HWPT_TOKEN + update)
        ioas = own.alloc_ioas()
        own.map_file(ioas, ram, 0, SIZE, IOVA)
        hwpt = own.alloc_hwpt(device_id, ioas)
        device.attach(hwpt)
        host.kernel.finish(session)
        ConfigSpace(device).set_bus_master(True)
        assert host.dma(device, ram)
        liveupdate.mark_preserve(host.files, own.fd, hwpt, HWPT_TOKEN + update + 1)
        outgoing = host.session()
        for token, fd in ((RAM, ram), (IOMMUFD, own.fd), (CDEV, device.fd)):
            host.kernel.preserve_fd(outgoing, token, fd)
        host.jump()
        session = host.retrieved_session()


# -- sizes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE", "IOMMU_HWPT_LU_RESTORE"])
def test_sizes_come_first(host: Host, name: str) -> None:
    request = proposed.REQUESTS[name]
    struct = proposed.S_HWPT_MARK_PRESERVE if "MARK" in name else proposed.S_HWPT_RESTORE
    fd = host.iommufd().fd
    with refused(errno.EINVAL):
        host.raw(fd, request, bytearray((struct.size - 4).to_bytes(4, "little") + bytes(struct.size - 8)))
    with refused(errno.E2BIG):
        host.raw(
            fd,
            request,
            bytearray((struct.size + 4).to_bytes(4, "little") + bytes(struct.size - 4) + b"\1\0\0\0"),
        )
    with refused(errno.ENOTTY):
        host.raw(fd, iommufd_abi.IOAS_ALLOC + 0x40, bytearray(8))
