# SPDX-License-Identifier: Apache-2.0
"""One list of calls on an iommufd and on an `edu` device, and what each was answered: on a real kernel, or on one that should be like it.

Run as a program it makes the calls on this machine's device and reports the answers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

from luod.adapters import memfd
from luod.adapters.chardev import DeviceFiles, SystemCalls
from luod.adapters.cstruct import CStruct
from luod.adapters.iommufd import abi as iommufd
from luod.adapters.vfio import abi as vfio

SIZE, IOVA, PAGE = 1 << 16, 0x100000, 4096
TOP = (1 << 64) - 1
NOTHING = 999
"""A descriptor that is not open, and an id that no object has."""
STRUCTS = {
    "DESTROY": (iommufd.DESTROY, iommufd.S_DESTROY),
    "IOAS_ALLOC": (iommufd.IOAS_ALLOC, iommufd.S_IOAS_ALLOC),
    "IOAS_COPY": (iommufd.IOAS_COPY, iommufd.S_IOAS_COPY),
    "IOVA_RANGES": (iommufd.IOAS_IOVA_RANGES, iommufd.S_IOAS_IOVA_RANGES),
    "MAP": (iommufd.IOAS_MAP, iommufd.S_IOAS_MAP),
    "MAP_FILE": (iommufd.IOAS_MAP_FILE, iommufd.S_IOAS_MAP_FILE),
    "UNMAP": (iommufd.IOAS_UNMAP, iommufd.S_IOAS_UNMAP),
    "HWPT_ALLOC": (iommufd.HWPT_ALLOC, iommufd.S_HWPT_ALLOC),
    "GET_HW_INFO": (iommufd.GET_HW_INFO, iommufd.S_HW_INFO),
    "GET_DIRTY_BITMAP": (iommufd.REQUESTS["IOMMU_HWPT_GET_DIRTY_BITMAP"], iommufd.S_HWPT_GET_DIRTY_BITMAP),
    "CHANGE_PROCESS": (iommufd.IOAS_CHANGE_PROCESS, iommufd.S_IOAS_CHANGE_PROCESS),
    "GET_INFO": (vfio.DEVICE_GET_INFO, vfio.S_DEVICE_INFO),
    "GET_REGION_INFO": (vfio.DEVICE_GET_REGION_INFO, vfio.S_REGION_INFO),
    "GET_IRQ_INFO": (vfio.DEVICE_GET_IRQ_INFO, vfio.S_IRQ_INFO),
    "SET_IRQS": (vfio.DEVICE_SET_IRQS, vfio.S_IRQ_SET),
    "FEATURE": (vfio.DEVICE_FEATURE, vfio.S_FEATURE),
    "BIND": (vfio.DEVICE_BIND_IOMMUFD, vfio.S_BIND),
    "ATTACH": (vfio.DEVICE_ATTACH_IOMMUFD_PT, vfio.S_ATTACH),
    "DETACH": (vfio.DEVICE_DETACH_IOMMUFD_PT, vfio.S_DETACH),
}
FD_FIELDS = {"MAP_FILE": "fd", "BIND": "iommufd"}


class Asking:
    """Makes calls and writes down what each was answered."""

    def __init__(self, files: DeviceFiles) -> None:
        self.files = files
        self.answers: list[tuple[str, str]] = []
        self._fds: list[int] = []

    def own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def close(self, fd: int) -> None:
        self._fds.remove(fd)
        os.close(fd)

    def end(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def note(self, name: str, work: Callable[[], object]) -> Any:
        """Do something; its answer is its value, or the name of its errno."""
        try:
            value = work()
        except OSError as error:
            self.answers.append((name, errno.errorcode[error.errno or 0]))
            return None
        self.answers.append((name, "ok" if value is None else str(value)))
        return value

    def ask(
        self,
        on: int,
        call: str,
        about: str = "",
        /,
        *,
        size: int | None = None,
        tail: bytes = b"",
        last: int | None = None,
        fds: Sequence[int] = (),
        give: str = "",
        **values: int,
    ) -> Any:
        """Make one ioctl: a struct of these values, perhaps cut or drawn out to `size`, with `last` in its last byte; return a field."""
        request, layout = STRUCTS[call]
        named = (
            [layout.offsets[FD_FIELDS[call]]]
            if call in FD_FIELDS and values.get(FD_FIELDS[call], -1) >= 0
            else []
        )

        def work() -> object:
            buf = layout.pack(tail, **values)
            if size is not None:
                buf = bytearray(buf[:size].ljust(size, b"\0"))
                buf[:4] = size.to_bytes(4, "little")
            if last is not None:
                buf[-1] = last
            self.files.ioctl(on, request, buf, fds=[*named, *fds])
            return layout.get(buf, give) if give else None

        return self.note(
            f"{call} {about or ' '.join(f'{name}={value:#x}' for name, value in values.items())}", work
        )

    def ranges(self, on: int, ioas: int, give: str, about: str) -> None:
        """Ask IOVA_RANGES with room for all; note one field."""
        layout = iommufd.S_IOAS_IOVA_RANGES
        room = bytearray(iommufd.S_IOVA_RANGE.size * 8)

        def work() -> object:
            buf = layout.pack(ioas_id=ioas, num_iovas=8)
            pointers = {layout.offsets["allowed_iovas"]: room}
            self.files.ioctl(on, iommufd.IOAS_IOVA_RANGES, buf, pointers=pointers)
            return layout.get(buf, give)

        self.note(f"{give} {about}", work)

    def sizes(self, fd: int, *calls: str) -> None:
        for call in calls:
            layout: CStruct = STRUCTS[call][1]
            self.ask(fd, call, "too short", size=layout.size - 4)
            self.ask(fd, call, "with a tail that says something", size=layout.size + 8, last=1)


def iommufd_calls(asking: Asking) -> None:
    """An iommufd without devices."""
    fd = asking.own(asking.files.open(iommufd.PATH))
    ram = asking.own(memfd.create("ram", SIZE))
    pipe, other = os.pipe()
    asking.own(pipe), asking.own(other)
    ask = asking.ask
    asking.note("an unknown number", lambda: asking.files.ioctl(fd, 0x3BF0, bytearray(8)))
    asking.note("read", lambda: asking.files.pread(fd, 4, 0))
    asking.sizes(
        fd, "DESTROY", "IOAS_ALLOC", "IOAS_COPY", "IOVA_RANGES", "MAP", "MAP_FILE", "UNMAP", "GET_DIRTY_BITMAP", "CHANGE_PROCESS"
    )  # fmt: skip
    ask(fd, "HWPT_ALLOC", "too short", size=20)
    ask(fd, "IOAS_ALLOC", flags=1)
    ask(fd, "DESTROY", id=NOTHING)
    ioas = ask(fd, "IOAS_ALLOC", give="out_ioas_id")
    second = ask(fd, "IOAS_ALLOC", "longer, with zeros", size=32, give="out_ioas_id")
    for flags, iova in ((8, IOVA), (1, IOVA), (7, TOP), (7, IOVA)):
        ask(fd, "MAP", flags=flags, ioas_id=NOTHING, length=PAGE, iova=iova)
        ask(fd, "MAP_FILE", flags=flags, ioas_id=NOTHING, fd=-1, length=PAGE, iova=iova)
    ask(fd, "MAP", flags=7, ioas_id=ioas, __reserved=1)
    for name, file in (("nothing", -1), ("a closed fd", NOTHING), ("a pipe", pipe), ("an iommufd", fd)):
        ask(fd, "MAP_FILE", f"of {name}", flags=7, ioas_id=ioas, fd=file, length=PAGE, iova=IOVA)
    for start, length, iova in ((0, 0, IOVA), (0, PAGE, TOP - PAGE), (0, TOP, IOVA), (TOP, PAGE, IOVA)):
        ask(
            fd, "MAP_FILE", f"{start:#x} {length:#x} {iova:#x}",
            flags=7, ioas_id=ioas, fd=ram, start=start, length=length, iova=iova,
        )  # fmt: skip
    whole: dict[str, int] = {"flags": 7, "ioas_id": ioas, "fd": ram, "length": SIZE}
    ask(fd, "MAP_FILE", "whole", give="iova", **whole, iova=IOVA)
    ask(fd, "MAP_FILE", "over another", **whole, iova=IOVA + SIZE - PAGE)
    ask(fd, "UNMAP", "a part", ioas_id=ioas, iova=IOVA, length=PAGE)
    ask(fd, "UNMAP", "nothing", ioas_id=ioas, iova=IOVA + SIZE, length=PAGE)
    ask(fd, "UNMAP", "no length", ioas_id=ioas, iova=IOVA)
    ask(fd, "UNMAP", "too much", ioas_id=ioas, iova=PAGE, length=TOP)
    ask(fd, "UNMAP", "of no address space", ioas_id=NOTHING, iova=IOVA, length=PAGE)
    copied = {"flags": 7, "src_ioas_id": ioas, "dst_ioas_id": second, "dst_iova": 0x10000}
    ask(fd, "IOAS_COPY", "flags", **{**copied, "flags": 8}, src_iova=IOVA, length=PAGE)
    ask(fd, "IOAS_COPY", "more than there is", **copied, src_iova=IOVA, length=SIZE + PAGE)
    ask(
        fd,
        "IOAS_COPY",
        "of no address space",
        **{**copied, "src_ioas_id": NOTHING},
        src_iova=IOVA,
        length=PAGE,
    )
    ask(fd, "IOAS_COPY", "a part", **copied, src_iova=IOVA + PAGE, length=2 * PAGE)
    ask(fd, "IOAS_COPY", "onto itself", **copied, src_iova=IOVA + PAGE, length=2 * PAGE)
    ask(fd, "UNMAP", "a copy", give="length", ioas_id=second, iova=0, length=TOP)
    ask(fd, "UNMAP", "everything, of nothing", give="length", ioas_id=second, iova=0, length=TOP)
    ask(fd, "IOVA_RANGES", "no room", ioas_id=ioas, num_iovas=0)
    for give in ("num_iovas", "out_iova_alignment"):
        asking.ranges(fd, ioas, give, "without a device")
    ask(fd, "IOVA_RANGES", "reserved", ioas_id=NOTHING, __reserved=1)
    ask(fd, "IOVA_RANGES", ioas_id=NOTHING)
    ask(fd, "CHANGE_PROCESS", __reserved=1)
    ask(fd, "CHANGE_PROCESS", "of files")
    with mmap.mmap(-1, PAGE) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ask(
            fd,
            "MAP",
            "memory of this process",
            flags=7,
            ioas_id=second,
            user_va=address,
            length=PAGE,
            iova=IOVA,
        )
        ask(fd, "CHANGE_PROCESS", "of memory")
        ask(fd, "UNMAP", "memory of this process", give="length", ioas_id=second, iova=IOVA, length=PAGE)
    ask(fd, "HWPT_ALLOC", flags=1 << 9, dev_id=NOTHING)
    ask(fd, "HWPT_ALLOC", dev_id=NOTHING, pt_id=ioas)
    ask(fd, "HWPT_ALLOC", dev_id=ioas, pt_id=ioas)
    ask(fd, "GET_HW_INFO", dev_id=NOTHING)
    ask(fd, "GET_DIRTY_BITMAP", hwpt_id=NOTHING)
    ask(fd, "GET_DIRTY_BITMAP", hwpt_id=ioas)
    ask(fd, "GET_DIRTY_BITMAP", flags=2, hwpt_id=NOTHING)
    ask(fd, "DESTROY", "an address space", id=second)
    ask(fd, "IOAS_ALLOC", "the lowest free id", give="out_ioas_id")


def device_calls(asking: Asking, node: str) -> None:
    """A device from its open to its close."""
    ask, files = asking.ask, asking.files
    device, fd = asking.own(files.open(node)), asking.own(files.open(iommufd.PATH))
    ram, eventfd = asking.own(memfd.create("ram", SIZE)), asking.own(os.eventfd(0))
    config = vfio.CONFIG << 40
    for call in ("GET_INFO", "GET_REGION_INFO", "SET_IRQS", "FEATURE", "ATTACH", "DETACH"):
        ask(device, call, "before the bind")
    asking.note("RESET before the bind", lambda: files.ioctl(device, vfio.DEVICE_RESET))
    asking.note("an unknown number before the bind", lambda: files.ioctl(device, 0x3BF0))
    asking.note("read before the bind", lambda: files.pread(device, 4, config))
    ask(device, "BIND", "too short", size=12, iommufd=NOTHING)
    ask(device, "BIND", "with a tail that says something", size=32, last=1, iommufd=NOTHING)
    ask(device, "BIND", "nothing", iommufd=-1)
    ask(device, "BIND", "flags", iommufd=NOTHING, flags=2)
    ask(device, "BIND", "a closed fd", iommufd=NOTHING)
    ask(device, "BIND", "a memfd", iommufd=ram)
    ask(device, "BIND", "itself", iommufd=device)
    bound = ask(device, "BIND", "an iommufd", size=16, iommufd=fd, give="out_devid")
    ask(device, "BIND", "again", iommufd=fd)
    ask(device, "BIND", "again, a closed fd", iommufd=NOTHING)
    another = asking.own(files.open(node))
    ask(another, "BIND", "through another fd", iommufd=fd)
    ask(another, "GET_INFO", "through another fd")
    asking.close(another)

    ask(device, "GET_INFO", "too short", size=12)
    ask(device, "GET_INFO", "as short as can be", size=16, give="num_regions")
    ask(device, "GET_INFO", "longer", size=40, last=1, give="num_irqs")
    for call in ("GET_REGION_INFO", "GET_IRQ_INFO"):
        ask(device, call, "too short", size=STRUCTS[call][1].size - 4)
    for index in (*range(10), 1000):
        ask(device, "GET_REGION_INFO", f"{index} offset", index=index, give="offset")
    for index in (vfio.BAR0, vfio.CONFIG, 1):
        ask(device, "GET_REGION_INFO", f"{index} size", index=index, give="size")
    for index in range(6):
        ask(device, "GET_IRQ_INFO", f"{index} count", index=index, give="count")
    asking.note("an unknown number after the bind", lambda: files.ioctl(device, 0x3BF0))

    ioas = ask(fd, "IOAS_ALLOC", "for the device", give="out_ioas_id")
    ask(fd, "MAP_FILE", "for the device", flags=7, ioas_id=ioas, fd=ram, length=SIZE, iova=IOVA)
    ask(fd, "HWPT_ALLOC", "of nothing", dev_id=bound, pt_id=NOTHING)
    ask(fd, "HWPT_ALLOC", "of a device", dev_id=bound, pt_id=bound)
    table = ask(fd, "HWPT_ALLOC", "for the device", dev_id=bound, pt_id=ioas, give="out_hwpt_id")
    ask(device, "ATTACH", "too short", size=8)
    ask(device, "ATTACH", "flags", pt_id=table, flags=2)
    ask(device, "ATTACH", "nothing", pt_id=NOTHING)
    ask(device, "ATTACH", "a device", pt_id=bound)
    ask(device, "ATTACH", "a page table", size=12, pt_id=table, give="pt_id")
    ask(device, "ATTACH", "again", pt_id=table, give="pt_id")
    for give in ("num_iovas", "out_iova_alignment"):
        asking.ranges(fd, ioas, give, "with a device")
    ask(device, "SET_IRQS", "two actions", tail=b"\0\0\0\0", flags=4 | 32 | 8, index=vfio.MSI, count=1)
    bad = ask(fd, "IOAS_ALLOC", "for what cannot be", give="out_ioas_id")
    ask(fd, "MAP_FILE", "of an eventfd, early", flags=7, ioas_id=bad, fd=eventfd, length=PAGE, iova=IOVA)
    ask(fd, "HWPT_ALLOC", "over an eventfd", dev_id=bound, pt_id=bad)
    ask(device, "ATTACH", "to an eventfd", pt_id=bad)
    ask(fd, "UNMAP", "the eventfd", ioas_id=bad, iova=IOVA, length=PAGE)
    ask(
        fd, "MAP_FILE", "at the interrupts, early", flags=7, ioas_id=bad, fd=ram, length=PAGE, iova=0xFEE00000
    )
    ask(device, "ATTACH", "over the interrupts", pt_id=bad)
    ask(fd, "UNMAP", "the interrupts", ioas_id=bad, iova=0xFEE00000, length=PAGE)
    ask(fd, "MAP_FILE", "beyond its end, early", flags=7, ioas_id=bad, fd=ram, length=2 * SIZE, iova=IOVA)
    ask(device, "ATTACH", "beyond the end", pt_id=bad)
    ask(device, "ATTACH", "as before", pt_id=table, give="pt_id")
    ask(fd, "DESTROY", "what cannot be", id=bad)
    for name, number in (("its address space", ioas), ("its page table", table), ("a device", bound)):
        ask(fd, "DESTROY", name, id=number)
    for length, iova in ((100, IOVA + SIZE), (PAGE, IOVA + SIZE + 1), (PAGE, 0xFEE00000), (PAGE, 1 << 50)):
        ask(
            fd,
            "MAP_FILE",
            f"{length:#x} at {iova:#x}",
            flags=7,
            ioas_id=ioas,
            fd=ram,
            length=length,
            iova=iova,
        )
    ask(fd, "MAP_FILE", "beyond its end", flags=7, ioas_id=ioas, fd=ram, length=2 * SIZE, iova=1 << 24)
    ask(fd, "MAP_FILE", "of an eventfd", flags=7, ioas_id=ioas, fd=eventfd, length=PAGE, iova=1 << 24)
    other = ask(fd, "IOAS_ALLOC", "another", give="out_ioas_id")
    ask(device, "ATTACH", "an address space", pt_id=other, give="pt_id")
    ask(device, "ATTACH", "the same again", pt_id=other, give="pt_id")
    ask(fd, "DESTROY", "what was left", id=table)
    for about in ("", "again"):
        ask(device, "DETACH", about)
    ask(device, "DETACH", "flags", flags=2)
    ask(fd, "DESTROY", "the other", id=other)
    interrupts(asking, device, eventfd, ram)
    features(asking, device)

    asking.note("vendor and device", lambda: files.pread(device, 4, config).hex())
    asking.note("read behind the configuration", lambda: files.pread(device, 4, config + (1 << 20)))
    asking.note("read of a region that is not there", lambda: files.pread(device, 4, 1 << 40))
    asking.note("read of no region", lambda: files.pread(device, 4, 9 << 40))
    asking.note("a register", lambda: files.pread(device, 4, 0).hex())
    asking.note("decoding off", lambda: files.pwrite(device, b"\0\0", config + 4))
    asking.note("a register that is not decoded", lambda: files.pread(device, 4, 0).hex())
    asking.note("decoding on", lambda: files.pwrite(device, b"\6\0", config + 4))
    asking.note("a register that is decoded again", lambda: files.pread(device, 4, 0).hex())
    asking.close(fd)
    asking.note("the device without its iommufd's fd", lambda: files.pread(device, 4, 0).hex())
    asking.close(device)
    asking.note("the node again", lambda: asking.own(files.open(node)) and None)


def interrupts(asking: Asking, device: int, eventfd: int, ram: int) -> None:
    """SET_IRQS, in the order of its checks."""
    none, byte, eventfds, mask, trigger = 1, 2, 4, 8, 32

    def irqs(
        about: str,
        flags: int,
        count: int = 1,
        fd: int | None = None,
        index: int = vfio.MSI,
        start: int = 0,
        data: bytes = b"",
    ) -> None:
        word = data if fd is None else struct.pack("<i", fd)
        fds = [vfio.S_IRQ_SET.size] if fd is not None and fd >= 0 else []
        asking.ask(
            device, "SET_IRQS", about, tail=word, fds=fds, flags=flags, index=index, start=start, count=count
        )

    asking.ask(device, "SET_IRQS", "too short", size=16)
    irqs("no data", trigger, fd=eventfd)
    irqs("no action", eventfds, fd=eventfd)
    irqs("two kinds of data", trigger | eventfds | none, fd=eventfd)
    irqs("unknown flags", trigger | eventfds | 64, fd=eventfd)
    irqs("an index too high", trigger | eventfds, fd=eventfd, index=5)
    irqs("a vector too high", trigger | eventfds, fd=eventfd, start=1)
    irqs("two of one", trigger | eventfds, count=2, data=struct.pack("<ii", eventfd, eventfd))
    irqs("no room for the fd", trigger | eventfds)
    irqs("off when off", trigger | none, count=0)
    irqs("triggered when off", trigger | none)
    irqs("asked when off", trigger | byte, data=b"\0")
    irqs("a closed fd", trigger | eventfds, fd=NOTHING)
    irqs("a memfd", trigger | eventfds, fd=ram)
    irqs("masked", mask | none)
    irqs("on", trigger | eventfds, fd=eventfd)
    irqs("on again", trigger | eventfds, fd=eventfd)
    irqs("another kind", trigger | eventfds, fd=eventfd, index=vfio.INTX)
    irqs("asked", trigger | byte, data=b"\0")
    irqs("triggered", trigger | none)
    asking.note("what the eventfd got", lambda: int.from_bytes(os.read(eventfd, 8), "little"))
    irqs("taken away", trigger | eventfds, fd=-1)
    irqs("off", trigger | none, count=0)
    irqs("off again", trigger | none, count=0)


def features(asking: Asking, device: int) -> None:
    """What can be probed."""
    migration, logging = vfio.FEATURE_MIGRATION, vfio.FEATURE_DMA_LOGGING_START
    get, put, probe = vfio.FEATURE_GET, vfio.FEATURE_SET, vfio.FEATURE_PROBE
    asking.ask(device, "FEATURE", "too short", size=4)
    for name, flags in (
        ("migration", migration | get | probe),
        ("logging", logging | put | probe),
        ("nothing of it", migration),
        ("both", migration | get | put),
        ("unknown flags", migration | get | 1 << 19),
        ("unknown", 0xFFF0 | get | probe),
    ):
        asking.ask(device, "FEATURE", name, flags=flags)


def answers(files: DeviceFiles, node: str) -> list[tuple[str, str]]:
    """Make all calls; return what each was answered."""
    asking = Asking(files)
    try:
        iommufd_calls(asking)
        device_calls(asking, node)
    finally:
        asking.end()
    return asking.answers


def main() -> int:
    from luod.adapters.vfio.pci import PciDevices
    from luod.lab.passthrough import EDU
    from luod.lab.report import emit

    PciDevices().bind(EDU)
    emit("answers", answers=answers(SystemCalls(), PciDevices().node(EDU)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
