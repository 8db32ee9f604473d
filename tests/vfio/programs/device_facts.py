# SPDX-License-Identifier: Apache-2.0
"""What the bindings say of real devices behind a real IOMMU: one case after the other, each reported for itself."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
from edu import BUFFER, IDENTITY, PAGE, Edu, checked_copy

from luod.adapters import memfd
from luod.adapters.chardev import SystemCalls
from luod.adapters.iommufd import liveupdate
from luod.adapters.iommufd.device import Iommufd, open_iommufd
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate.errors import NotPreservable
from luod.adapters.passthrough_errors import (
    MappingRefused,
    NotBoundToVfio,
    NotMerged,
    NotPermitted,
    PassthroughError,
    TakenElsewhere,
    WrongOrder,
)
from luod.adapters.vfio import abi
from luod.adapters.vfio.config_space import ConfigSpace
from luod.adapters.vfio.device import VfioDevice, open_device
from luod.adapters.vfio.group import Container, Group, open_container, open_group
from luod.adapters.vfio.pci import PciDevices
from luod.devices.guest import Device, Guest, Irqs, Mapping, Memory, Space, quieting
from luod.devices.host import Host
from luod.devices.preservation import Preservation, observe, set_up, standing, support
from luod.devices.restoration import plan_engine
from luod.devices.rules import before_the_jump
from luod.devices.steps import facts_of, kinds_on
from luod.engine.plan import PlanRunner, StepFailed
from luod.lab.crew import drop_capability
from luod.lab.passthrough import EDU, EDU_2, IGB, NETWORK, NVME
from luod.lab.report import emit
from luod.states.errors import LuodError

FILES = SystemCalls()
PCI = PciDevices()
IOVA = 0x100000
SIZE = 1 << 20
RESERVED = 0xFEE00000
"""Where the platform has its interrupts: no memory can be mapped there for an attached device."""
CAP_IPC_LOCK = 14
UNSAFE = Path("/sys/module/iommufd/parameters/allow_unsafe_interrupts")


@contextlib.contextmanager
def opened() -> Iterator[Callable[[int], int]]:
    """Give a function that remembers descriptors; they are closed at the end, last first."""
    with contextlib.ExitStack() as stack:

        def own(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        yield own


def bound(own: Callable[[int], int], address: str) -> tuple[VfioDevice, Iommufd, int]:
    """Bring a device into a fresh iommufd with an empty address space, not attached."""
    PCI.bind(address)
    iommufd = Iommufd(FILES, own(open_iommufd(FILES)))
    device = VfioDevice(FILES, own(open_device(FILES, PCI.node(address))), name=address)
    device.bind(iommufd.fd)
    return device, iommufd, iommufd.alloc_ioas()


def ram(own: Callable[[int], int], size: int = SIZE) -> int:
    fd = own(memfd.create("ram", size))
    memfd.seal_for_preservation(fd)
    return fd


def running_edu(own: Callable[[int], int]) -> tuple[Edu, Iommufd, int, int]:
    """Return the device with memory mapped, on the bus, its interrupt on; the iommufd, the address space and the memory."""
    device, iommufd, ioas = bound(own, EDU)
    memory = ram(own)
    iommufd.map_file(ioas, memory, 0, SIZE, IOVA)
    device.attach(ioas)
    eventfd = own(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    ConfigSpace(device).set_bus_master(True)
    device.set_irqs(abi.MSI, [eventfd])
    return Edu(device, eventfd), iommufd, ioas, memory


def refused(kind: type[LuodError], number: int | str, call: Callable[[], object]) -> Any:
    """Make a call that must fail in this way, and return its error."""
    caught: Any = None
    try:
        call()
    except kind as error:
        caught = error
    assert type(caught) is kind, f"it was not refused: {caught}"
    assert caught.errno == number, caught
    assert caught.hint, caught
    return caught


def interrupts_of(address: str) -> list[str]:
    """Return the names that the kernel's own list has of VFIO interrupts of a device."""
    lines = Path("/proc/interrupts").read_text("ascii").splitlines()
    return [line.split()[-1] for line in lines if "vfio-" in line and f"({address})" in line]


def case_a_device_copies_memory_and_interrupts() -> None:
    with opened() as own:
        edu, _, _, memory = running_edu(own)
        assert edu.identity() == IDENTITY
        assert checked_copy(edu, memory, IOVA, b"by the device") == PAGE
        with edu.device.map_region(abi.BAR0) as registers:
            assert int.from_bytes(registers[0:4], "little") == IDENTITY


def case_each_device_is_bound_attached_and_reset() -> None:
    for address, identity, resets in (
        (NVME, "1b36:0010", True),
        (NETWORK, "1af4:1041", False),
        (IGB, "8086:10c9", True),
    ):
        with opened() as own:
            device, iommufd, ioas = bound(own, address)
            iommufd.map_file(ioas, ram(own), 0, SIZE, IOVA)
            device.attach(ioas)
            info, facts = device.info(), facts_of(device)
            assert (info.is_pci, info.can_reset, facts.identity) == (True, resets, identity), (
                address,
                info,
                facts,
            )
            assert max(facts.irqs) >= 4, facts
            assert device.migration() is None
            assert not device.dma_logging()
            assert iommufd.hw_info(iommufd.device_ids(range(1, 8))[0]).kind == "intel-vtd"
            if resets:
                device.reset()
            else:
                assert "cannot be reset" in refused(PassthroughError, errno.EINVAL, device.reset).hint
            device.detach()
            device.detach()


def case_a_mapping_is_asked_for_without_changing_it() -> None:
    with opened() as own:
        _, iommufd, ioas = bound(own, EDU)
        memory = ram(own)
        assert not iommufd.mapped(ioas, IOVA, SIZE)
        iommufd.map_file(ioas, memory, 0, SIZE, IOVA)
        for _ in range(2):
            assert iommufd.mapped(ioas, IOVA, SIZE)
            assert iommufd.mapped(ioas, IOVA + PAGE, PAGE)
            assert not iommufd.mapped(ioas, IOVA - PAGE, SIZE)
            assert not iommufd.mapped(ioas + 7, IOVA, SIZE)
        assert iommufd.ioas_ids(range(1, 16)) == [ioas]
        refused(MappingRefused, errno.EEXIST, partial(iommufd.map_file, ioas, memory, 0, SIZE, IOVA))
        assert iommufd.unmap(ioas, IOVA, SIZE) == SIZE
        assert not iommufd.mapped(ioas, IOVA, SIZE)


def case_objects_are_found_by_kind_and_in_order() -> None:
    with opened() as own:
        device, iommufd, ioas = bound(own, EDU)
        ids = range(1, 16)
        first = iommufd.alloc_hwpt(iommufd.device_ids(ids)[0], ioas)
        second = iommufd.alloc_hwpt(iommufd.device_ids(ids)[0], ioas)
        assert (iommufd.ioas_ids(ids), iommufd.hwpt_ids(ids)) == ([ioas], [first, second])
        assert device.attach(first) == first
        assert device.attach(first) == first
        assert "detach" in refused(WrongOrder, errno.EBUSY, partial(iommufd.destroy, first)).hint
        iommufd.destroy(second)
        assert device.attach(ioas) != first
        iommufd.destroy(first)
        assert len(iommufd.hwpt_ids(ids)) == 1


def case_interrupts_are_asked_for_as_the_kernel_lists_them() -> None:
    with opened() as own:
        device, _, _ = bound(own, EDU)
        eventfd = own(os.eventfd(0, os.EFD_NONBLOCK))
        for index, listed in ((abi.INTX, f"vfio-intx({EDU})"), (abi.MSI, f"vfio-msi[0]({EDU})")):
            assert kinds_on(device) == ()
            assert interrupts_of(EDU) == []
            device.set_irqs(index, [eventfd])
            assert kinds_on(device) == (abi.IRQ_NAMES[index],)
            assert interrupts_of(EDU) == [listed]
            assert not select.select([eventfd], [], [], 0)[0], "asking has triggered it"
            device.trigger_irqs(index, 1)
            assert os.eventfd_read(eventfd) == 1
            other = abi.MSI if index == abi.INTX else abi.INTX
            refused(WrongOrder, errno.EINVAL, partial(device.set_irqs, other, [eventfd]))
            device.disable_irqs(index)
            device.disable_irqs(index)


def case_the_holder_of_a_device_is_named() -> None:
    with opened() as own:
        bound(own, EDU_2)
        node = PCI.node(EDU_2)
        assert PCI.holders(node) == [f"{os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"]
        second = VfioDevice(FILES, own(open_device(FILES, node)), name=EDU_2)
        refused(WrongOrder, errno.EINVAL, partial(second.bind, own(open_iommufd(FILES))))


def case_a_device_of_another_driver_has_no_node() -> None:
    PCI.bind(NVME)
    assert PCI.node(NVME).startswith("/dev/vfio/devices/vfio")
    PCI.release(NVME)
    assert PCI.driver(NVME) == "nvme"
    assert "driver is nvme" in refused(NotBoundToVfio, errno.ENODEV, partial(PCI.node, NVME)).message
    PCI.bind(NVME)
    assert PCI.driver(NVME) == "vfio-pci"


def case_an_unbound_device_answers_nothing() -> None:
    PCI.bind(EDU)
    with opened() as own:
        device = VfioDevice(FILES, own(open_device(FILES, PCI.node(EDU))), name=EDU)
        assert not device.bound()
        assert "bind the device" in refused(WrongOrder, errno.EINVAL, device.info).hint
        refused(WrongOrder, errno.EBADFD, partial(device.bind, ram(own)))
        device.bind(own(open_iommufd(FILES)))
        assert device.bound()


def case_a_sleeping_device_does_not_answer_and_is_noticed() -> None:
    with opened() as own:
        device, _, _ = bound(own, NVME)
        config = ConfigSpace(device)
        assert config.power_state() == 0
        config.set_power_state(3)
        assert config.power_state() == 3
        refused(PassthroughError, errno.EIO, partial(device.read, abi.BAR0, 0, 4))
        config.set_power_state(0)
        assert len(device.read(abi.BAR0, 0, 4)) == 4


def case_memory_in_a_reserved_range_keeps_a_device_out() -> None:
    with opened() as own:
        device, iommufd, ioas = bound(own, EDU)
        iommufd.map_file(ioas, ram(own), 0, PAGE, RESERVED)
        assert "reserved" in refused(MappingRefused, errno.EADDRINUSE, partial(device.attach, ioas)).hint
        iommufd.unmap(ioas, RESERVED, PAGE)
        device.attach(ioas)
        ranges = iommufd.iova_ranges(ioas)
        assert ranges.alignment == PAGE
        assert not any(first <= RESERVED <= last for first, last in ranges.ranges), ranges


def case_interrupts_without_remapping_are_refused_unless_allowed() -> None:
    PCI.bind(EDU)
    with opened() as own:
        device = VfioDevice(FILES, own(open_device(FILES, PCI.node(EDU))), name=EDU)
        bind = partial(device.bind, own(open_iommufd(FILES)))
        UNSAFE.write_text("N")
        try:
            assert "allow_unsafe_interrupts" in refused(NotPermitted, errno.EPERM, bind).hint
        finally:
            UNSAFE.write_text("Y")
        bind()


def case_pinned_memory_is_limited() -> None:
    with opened() as own:
        device, iommufd, ioas = bound(own, EDU)
        device.attach(ioas)
        memory = ram(own)

        def poor() -> None:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))
            drop_capability(CAP_IPC_LOCK)
            error = refused(
                NotPermitted, errno.ENOMEM, partial(iommufd.map_file, ioas, memory, 0, SIZE, IOVA)
            )
            assert "RLIMIT_MEMLOCK" in error.hint

        in_a_child(poor)
        iommufd.map_file(ioas, memory, 0, SIZE, IOVA)


def case_pinned_memory_changes_hands() -> None:
    with opened() as own:
        edu, iommufd, ioas, memory = running_edu(own)
        in_a_child(iommufd.change_process)
        iommufd.change_process()
        assert checked_copy(edu, memory, IOVA, b"still mapped") == PAGE
        with mmap.mmap(-1, PAGE) as private:
            iommufd.map(ioas, ctypes.addressof(ctypes.c_char.from_buffer(private)), PAGE, IOVA + SIZE)
            assert "MAP_FILE" in refused(MappingRefused, errno.EINVAL, iommufd.change_process).hint
            iommufd.unmap(ioas, IOVA + SIZE, PAGE)


def case_this_kernel_has_no_handler_and_says_so_without_a_trace() -> None:
    kernel = open_kernel("device")
    with opened() as own:
        device, iommufd, ioas = bound(own, EDU)
        device.attach(ioas)
        for kind, fd in (("iommufd", iommufd.fd), ("vfio", device.fd)):
            found = support(kernel, kind, fd)  # type: ignore[arg-type]
            assert not found.carried, found
            assert os.uname().release in found.detail, found
        session = own(kernel.create_session("devices"))
        for fd in (iommufd.fd, device.fd):
            refused(NotPreservable, errno.ENOENT, partial(kernel.preserve_fd, session, 0x20, fd))
        assert not kernel.token_preserved(session, 0x20)
        kernel.preserve_fd(session, 0x20, ram(own))
        assert checked_copy_still_works(own)


def checked_copy_still_works(own: Callable[[int], int]) -> bool:
    device, iommufd, ioas = bound(own, EDU_2)
    memory = ram(own)
    iommufd.map_file(ioas, memory, 0, SIZE, IOVA)
    device.attach(ioas)
    eventfd = own(os.eventfd(0, os.EFD_NONBLOCK))
    ConfigSpace(device).set_bus_master(True)
    device.set_irqs(abi.MSI, [eventfd])
    return checked_copy(Edu(device, eventfd), memory, IOVA, b"another") == PAGE


def case_the_legacy_group_and_container_work() -> None:
    PCI.bind(EDU_2)
    number = PCI.group(EDU_2)
    with opened() as own, mmap.mmap(-1, SIZE) as memory:
        container = Container(FILES, own(open_container(FILES)))
        group = Group(FILES, own(open_group(FILES, number)), name=f"group {number}")
        assert container.has_type1v2()
        assert group.status().viable
        assert not group.status().in_container
        group.set_container(container.fd)
        container.set_type1v2()
        assert container.page_sizes() & PAGE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        container.map_dma(address, IOVA, SIZE)
        refused(MappingRefused, errno.EEXIST, partial(container.map_dma, address, IOVA, SIZE))
        device = VfioDevice(FILES, group.device(EDU_2), name=EDU_2)
        try:
            ConfigSpace(device).set_bus_master(True)
            eventfd = own(os.eventfd(0, os.EFD_NONBLOCK))
            device.set_irqs(abi.MSI, [eventfd])
            memory[:PAGE] = b"legacy!!" * (PAGE // 8)
            Edu(device, eventfd).copy(IOVA, IOVA + PAGE)
            assert memory[PAGE : 2 * PAGE] == memory[:PAGE]
            refused(TakenElsewhere, errno.EBUSY, group.unset_container)
            refused(TakenElsewhere, errno.EBUSY, partial(open_group, FILES, number))
            cdev = VfioDevice(FILES, own(open_device(FILES, PCI.node(EDU_2))), name=EDU_2)
            refused(TakenElsewhere, errno.EBUSY, partial(cdev.bind, own(open_iommufd(FILES))))
        finally:
            os.close(device.fd)
        assert container.unmap_dma(IOVA, SIZE) == SIZE
        group.unset_container()
        assert not group.status().in_container


# -- plans


def in_engine(work: Callable[..., Any], host: Host, name: str) -> None:
    async def inside() -> None:
        async with plan_engine(Path(f"/run/{name}/journal.db"), host) as engine:
            await work(engine)

    anyio.run(inside)


async def failing(engine: Any, host: Host, guest: Guest, kind: type[LuodError] = StepFailed) -> Any:
    """Set up a guest that must fail in this way, and return the error."""
    try:
        await set_up(engine, host, "vm", guest)
    except kind as error:
        return error
    raise AssertionError("it was not refused")


def planned(address: str, irqs: tuple[Irqs, ...], *, own_tables: bool = False) -> tuple[Guest, Host]:
    guest = Guest(
        (Memory("0x10", SIZE),),
        (Space("0x20", (Mapping("0x10", IOVA, SIZE),), own_tables=own_tables),),
        (Device("0x30", address, "0x20", irqs, take=True),),
    )
    host = Host(FILES, open_kernel("device"), PCI)
    fd = memfd.create("ram", SIZE)
    memfd.seal_for_preservation(fd)
    host.fds.keep("0x10", fd)
    return guest, host


def case_a_device_is_quieted_and_comes_back() -> None:
    for address, irqs, resets in ((EDU, (Irqs(abi.MSI),), False), (NVME, (Irqs(abi.MSIX, 3),), True)):
        guest, host = planned(address, irqs)

        async def work(
            engine: Any,
            guest: Guest = guest,
            host: Host = host,
            address: str = address,
            resets: bool = resets,
        ) -> None:
            await set_up(engine, host, "vm", guest)
            before_quiet = before_the_jump(standing(guest, host))
            assert [one.rule for one in before_quiet] == ["interrupts-off"], before_quiet
            assert interrupts_of(address)
            results = await PlanRunner(engine, "vm", quieting(guest)).run()
            assert results["0x30/vfio.reset"] == {"reset": resets}
            assert not before_the_jump(standing(guest, host))
            assert not interrupts_of(address)
            assert not ConfigSpace(host.device("0x30", address)).bus_master()
            await set_up(engine, host, "vm", guest)
            assert interrupts_of(address)
            assert ConfigSpace(host.device("0x30", address)).bus_master()

        in_engine(work, host, f"quiet-{address[5:7]}-{address[8:10]}")
        host.fds.close()


def case_a_call_that_is_only_proposed_is_not_made() -> None:
    """Its number may be that of another call in this kernel: nothing is opened for a plan that would come to it."""
    guest, host = planned(EDU, (Irqs(abi.MSI),), own_tables=True)

    async def work(engine: Any) -> None:
        caught = await failing(engine, host, guest, NotMerged)
        assert "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE" in caught.message, caught
        assert 'devices="reattach"' in caught.hint, caught
        asking = Preservation(engine, host, "vm", guest, devices="preserve")
        refused(NotMerged, errno.EOPNOTSUPP, asking.preserve)
        assert host.fds.names() == ["0x10"], host.fds.names()

    in_engine(work, host, "proposed")
    host.fds.close()
    # Nor does anything below the plans make it.
    fd = open_iommufd(FILES)
    refused(NotMerged, errno.EOPNOTSUPP, partial(liveupdate.mark_preserve, FILES, fd, 1, 1))
    refused(NotMerged, errno.EOPNOTSUPP, partial(liveupdate.restore_hwpt, FILES, fd, 1))
    os.close(fd)


def case_a_quiet_device_reaches_no_memory() -> None:
    guest, host = planned(EDU, (Irqs(abi.MSI),))

    async def work(engine: Any) -> None:
        await set_up(engine, host, "vm", guest)
        device, memory = host.device("0x30", EDU), host.memory("0x10")
        eventfds = host.eventfds("0x30", abi.MSI, 1)
        assert eventfds is not None
        edu = Edu(device, eventfds[0])
        assert checked_copy(edu, memory, IOVA, b"before") == PAGE
        await PlanRunner(engine, "vm", quieting(guest)).run()
        os.pwrite(memory, bytes(PAGE), PAGE)
        for register, value in ((0x80, BUFFER), (0x88, IOVA + PAGE), (0x90, PAGE), (0x98, 1 | 2)):
            device.write(abi.BAR0, register, value.to_bytes(8, "little"))
        while int.from_bytes(device.read(abi.BAR0, 0x98, 8), "little") & 1:
            pass  # it believes that it copies
        assert os.pread(memory, PAGE, PAGE) == bytes(PAGE)
        await set_up(engine, host, "vm", guest)
        assert checked_copy(edu, memory, IOVA, b"after") == PAGE

    in_engine(work, host, "quiet-dma")
    host.fds.close()


def case_another_device_at_the_address_is_refused() -> None:
    guest, host = planned(EDU, ())

    async def work(engine: Any) -> None:
        await set_up(engine, host, "vm", guest)
        seen = observe(guest, host).devices[0]
        assert seen.facts is not None
        wrong = msgspec.structs.replace(seen, facts=msgspec.structs.replace(seen.facts, identity="8086:10c9"))
        caught = await failing(engine, host, msgspec.structs.replace(guest, devices=(wrong,)))
        assert (caught.errno, caught.step.id) == ("ENODEV", "0x30/vfio.check"), caught
        assert "identity are 1234:11e8, 8086:10c9 are recorded" in caught.message, caught

    in_engine(work, host, "another")
    host.fds.close()


def case_memory_that_is_not_sealed_is_not_mapped() -> None:
    guest, host = planned(EDU, ())
    host.fds.keep("0x10", memfd.create("unsealed", SIZE))

    async def work(engine: Any) -> None:
        caught = await failing(engine, host, guest)
        assert caught.errno == "EINVAL", caught
        assert "not sealed" in caught.message, caught
        assert not host.iommufd("0x20").mapped(1, IOVA, SIZE)

    in_engine(work, host, "unsealed")
    host.fds.close()


def in_a_child(work: Callable[[], object]) -> None:
    """Run something in a process of its own, which must succeed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "see the output"


def main() -> int:
    cases = {name: work for name, work in globals().items() if name.startswith("case_")}
    for name, work in cases.items():
        try:
            work()
        except BaseException:
            text = traceback.format_exc()
            print(name, text, file=sys.stderr)
            emit("case", name=name, ok=False, message=text)
        else:
            emit("case", name=name, ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
