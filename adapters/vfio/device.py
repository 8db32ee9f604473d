# SPDX-License-Identifier: Apache-2.0
"""`VfioDevice`: one passthrough device through its cdev (or a legacy group's device fd).

Nothing but `bind` works before the device is bound to an iommufd, and a bind is undone only by closing the last copy of the fd; both the
bind of a new fd and that close reset the device where it can be reset (drivers/vfio/pci/vfio_pci_core.c). Failures are `PassthroughError`s.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ..chardev import DeviceFiles
from ..passthrough_errors import PassthroughError, passthrough_error
from . import abi


class DeviceInfo(NamedTuple):
    """How many regions and interrupt kinds there are; whether the device can be reset, and whether it is a PCI one."""

    regions: int
    irqs: int
    can_reset: bool
    is_pci: bool


class RegionInfo(NamedTuple):
    """One region: bytes, where in the fd it begins, and what may be done to it."""

    size: int
    offset: int
    readable: bool
    writable: bool
    mappable: bool


class IrqInfo(NamedTuple):
    """One kind of interrupt: how many, and whether eventfds can be had for them."""

    vectors: int
    eventfd: bool


class Migration(NamedTuple):
    """What the driver can do of the VFIO migration protocol."""

    stop_copy: bool
    p2p: bool
    pre_copy: bool


def open_device(files: DeviceFiles, path: str) -> int:
    """Open the cdev of a device, such as /dev/vfio/devices/vfio0; return the fd, which the caller owns."""
    try:
        return files.open(path)
    except OSError as error:
        raise passthrough_error("open vfio", path, error) from error


class VfioDevice:
    """What can be asked of an open device. The fd stays the caller's. `name` is what messages call it: its node, or its PCI address."""

    def __init__(self, files: DeviceFiles, fd: int, *, name: str) -> None:
        self._files = files
        self.fd = fd
        self.name = name

    def _call(self, operation: str, argument: bytearray | int = 0, fds: Sequence[int] = ()) -> int:
        try:
            return self._files.ioctl(self.fd, abi.REQUESTS[operation], argument, fds=fds)
        except OSError as error:
            raise passthrough_error(operation, self.name, error) from error

    # -- the iommufd

    def bind(self, iommufd: int) -> int:
        """Take the device into an iommufd; return its id there. Once per fd."""
        layout = abi.S_BIND
        buf = layout.pack(iommufd=iommufd)[: abi.BIND_MIN_SIZE]
        layout.put(buf, "argsz", len(buf))
        self._call("VFIO_DEVICE_BIND_IOMMUFD", buf, (layout.offsets["iommufd"],) if iommufd >= 0 else ())
        return layout.get(buf, "out_devid")

    def bound(self) -> bool:
        """Say whether this fd is bound, without changing anything: until then GET_INFO is EINVAL (vfio_main.c)."""
        try:
            self.info()
        except PassthroughError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True

    def attach(self, page_table: int) -> int:
        """Let the device reach an address space or a page table, in place of the one before; return the id of its page table.

        Attaching again to the same one changes nothing.
        """
        buf = abi.S_ATTACH.pack(pt_id=page_table)[: abi.ATTACH_MIN_SIZE]
        abi.S_ATTACH.put(buf, "argsz", len(buf))
        self._call("VFIO_DEVICE_ATTACH_IOMMUFD_PT", buf)
        return abi.S_ATTACH.get(buf, "pt_id")

    def detach(self) -> None:
        """Let the device reach nothing; without effect when it reaches nothing already."""
        buf = abi.S_DETACH.pack()[: abi.DETACH_MIN_SIZE]
        abi.S_DETACH.put(buf, "argsz", len(buf))
        self._call("VFIO_DEVICE_DETACH_IOMMUFD_PT", buf)

    # -- what it is

    def info(self) -> DeviceInfo:
        """VFIO_DEVICE_GET_INFO."""
        layout, buf = abi.S_DEVICE_INFO, abi.S_DEVICE_INFO.pack()
        self._call("VFIO_DEVICE_GET_INFO", buf)
        flags = layout.get(buf, "flags")
        return DeviceInfo(
            layout.get(buf, "num_regions"),
            layout.get(buf, "num_irqs"),
            bool(flags & abi.DEVICE_CAN_RESET),
            bool(flags & abi.DEVICE_IS_PCI),
        )

    def region_info(self, index: int) -> RegionInfo:
        """VFIO_DEVICE_GET_REGION_INFO. A region that this device does not have is one of size 0, or EINVAL."""
        layout, buf = abi.S_REGION_INFO, abi.S_REGION_INFO.pack(index=index)
        self._call("VFIO_DEVICE_GET_REGION_INFO", buf)
        flags = layout.get(buf, "flags")
        return RegionInfo(
            layout.get(buf, "size"),
            layout.get(buf, "offset"),
            bool(flags & abi.REGION_READ),
            bool(flags & abi.REGION_WRITE),
            bool(flags & abi.REGION_MMAP),
        )

    def irq_info(self, index: int) -> IrqInfo:
        """VFIO_DEVICE_GET_IRQ_INFO."""
        layout, buf = abi.S_IRQ_INFO, abi.S_IRQ_INFO.pack(index=index)
        self._call("VFIO_DEVICE_GET_IRQ_INFO", buf)
        return IrqInfo(layout.get(buf, "count"), bool(layout.get(buf, "flags") & abi.IRQ_EVENTFD))

    def migration(self) -> Migration | None:
        """Say what the driver can do of the migration protocol; None when it has none of it."""
        flags = self._feature(abi.FEATURE_MIGRATION, abi.S_FEATURE_MIGRATION.size)
        if flags is None:
            return None
        value = abi.S_FEATURE_MIGRATION.get(flags, "flags")
        return Migration(
            bool(value & abi.MIGRATION_STOP_COPY),
            bool(value & abi.MIGRATION_P2P),
            bool(value & abi.MIGRATION_PRE_COPY),
        )

    def dma_logging(self) -> bool:
        """Say whether the device can log by itself what it writes, without starting it."""
        return self._probe(abi.FEATURE_DMA_LOGGING_START, abi.FEATURE_SET)

    def _probe(self, feature: int, access: int) -> bool:
        buf = abi.S_FEATURE.pack(flags=feature | access | abi.FEATURE_PROBE)
        try:
            self._call("VFIO_DEVICE_FEATURE", buf)
        except PassthroughError as error:
            if error.errno == errno.ENOTTY:
                return False
            raise
        return True

    def _feature(self, feature: int, size: int) -> bytes | None:
        if not self._probe(feature, abi.FEATURE_GET):
            return None
        buf = abi.S_FEATURE.pack(bytes(size), flags=feature | abi.FEATURE_GET)
        self._call("VFIO_DEVICE_FEATURE", buf)
        return bytes(buf[abi.S_FEATURE.size :])

    # -- interrupts

    def set_irqs(self, index: int, eventfds: Sequence[int], *, start: int = 0) -> None:
        """Deliver interrupts of one kind, from the vector `start` on, to eventfds; -1 takes one away. Again: the new ones count."""
        flags = abi.IRQ_SET_DATA_EVENTFD | abi.IRQ_SET_ACTION_TRIGGER
        data = struct.pack(f"<{len(eventfds)}i", *eventfds)
        buf = abi.S_IRQ_SET.pack(data, flags=flags, index=index, start=start, count=len(eventfds))
        words = [abi.S_IRQ_SET.size + 4 * place for place, fd in enumerate(eventfds) if fd >= 0]
        self._call("VFIO_DEVICE_SET_IRQS", buf, words)

    def irqs_on(self, index: int) -> bool:
        """Say whether interrupts of one kind are on, without changing anything.

        The first vector is asked to trigger if 0 is true: EINVAL says that this kind is off (drivers/vfio/pci/vfio_pci_intrs.c).
        """
        if not self.irq_info(index).vectors:
            return False
        flags = abi.IRQ_SET_DATA_BOOL | abi.IRQ_SET_ACTION_TRIGGER
        try:
            self._call("VFIO_DEVICE_SET_IRQS", abi.S_IRQ_SET.pack(b"\0", flags=flags, index=index, count=1))
        except PassthroughError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True

    def disable_irqs(self, index: int) -> None:
        """Turn off all interrupts of one kind; without effect when they are off: the kernel would say EINVAL."""
        if self.irqs_on(index):
            flags = abi.IRQ_SET_DATA_NONE | abi.IRQ_SET_ACTION_TRIGGER
            self._call("VFIO_DEVICE_SET_IRQS", abi.S_IRQ_SET.pack(flags=flags, index=index))

    def trigger_irqs(self, index: int, count: int, *, start: int = 0) -> None:
        """Signal eventfds as if the device had interrupted: for what may have been lost while nobody listened."""
        flags = abi.IRQ_SET_DATA_NONE | abi.IRQ_SET_ACTION_TRIGGER
        self._call(
            "VFIO_DEVICE_SET_IRQS", abi.S_IRQ_SET.pack(flags=flags, index=index, start=start, count=count)
        )

    # -- the device itself

    def reset(self) -> None:
        """VFIO_DEVICE_RESET: by function, power state or bus, whichever the device has; EINVAL when it has none."""
        self._call("VFIO_DEVICE_RESET")

    def read(self, region: int, offset: int, length: int) -> bytes:
        """Read from a region."""
        where = self._within(region, offset, length, "read")
        try:
            data = self._files.pread(self.fd, length, where)
        except OSError as error:
            raise self._access("read", region, offset, error) from error
        if len(data) != length:
            raise self._access("read", region, offset, OSError(errno.EIO, ""))
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write to a region."""
        where = self._within(region, offset, len(data), "write")
        try:
            done = self._files.pwrite(self.fd, data, where)
        except OSError as error:
            raise self._access("write", region, offset, error) from error
        if done != len(data):
            raise self._access("write", region, offset, OSError(errno.EIO, ""))

    def map_region(self, region: int) -> mmap.mmap:
        """Map a whole region; the caller closes it. EINVAL where the region cannot be mapped."""
        info = self.region_info(region)
        try:
            if not info.mappable:
                raise OSError(errno.EINVAL, "")
            return self._files.mmap(self.fd, info.size, info.offset)
        except OSError as error:
            raise self._access("map", region, 0, error) from error

    def _within(self, region: int, offset: int, length: int, what: str) -> int:
        info = self.region_info(region)
        if offset < 0 or offset + length > info.size:
            raise self._access(what, region, offset, OSError(errno.EINVAL, ""))
        return info.offset + offset

    def _access(self, what: str, region: int, offset: int, error: OSError) -> PassthroughError:
        return passthrough_error(f"{what} region {region} at {offset:#x} of", self.name, error)
