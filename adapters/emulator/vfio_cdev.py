# SPDX-License-Identifier: Apache-2.0
"""An open VFIO device (/dev/vfio/devices/vfioN) of the emulated machine: what vfio-pci of Linux 7.3 does with a simple PCI function.

The order of checks is that of drivers/vfio/{vfio_main,device_cdev}.c and drivers/vfio/pci/{vfio_pci_core,vfio_pci_intrs}.c. Nothing but
BIND_IOMMUFD works before it; the binding ends with the last close.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

from .. import proposed
from ..cstruct import CStruct
from ..vfio import abi
from .address_space import AddressSpace
from .handlers import File, Refused
from .iommufd import Device, Hwpt, IommufdFile
from .memfd_files import Descriptor
from .open_file import DeviceCall, opened
from .pci_function import BAR_SIZE, CONFIG_SIZE, D0, D3HOT, INTX, IRQ_COUNTS, MEMORY_SPACE, PciFunction

REGIONS, IRQS = 9, 5
_REGION_SHIFT = 40
_REGION_SIZES = {abi.BAR0: BAR_SIZE, abi.CONFIG: CONFIG_SIZE}
_VGA = 8
_BIND_TOKEN = 1

_DATA_NONE, _DATA_BOOL, _DATA_EVENTFD = 1, 2, 4
_MASK, _UNMASK, _TRIGGER = 8, 16, 32
_DATA_WIDTH = {_DATA_NONE: 0, _DATA_BOOL: 1, _DATA_EVENTFD: 4}

_STRUCTS = {
    abi.DEVICE_GET_INFO: abi.S_DEVICE_INFO,
    abi.DEVICE_GET_REGION_INFO: abi.S_REGION_INFO,
    abi.DEVICE_GET_IRQ_INFO: abi.S_IRQ_INFO,
    abi.DEVICE_SET_IRQS: abi.S_IRQ_SET,
    abi.DEVICE_FEATURE: abi.S_FEATURE,
    abi.DEVICE_BIND_IOMMUFD: abi.S_BIND,
    abi.DEVICE_ATTACH_IOMMUFD_PT: abi.S_ATTACH,
    abi.DEVICE_DETACH_IOMMUFD_PT: abi.S_DETACH,
}
_FEATURE_INDEX = 0xFFFF
_LOW_POWER_ENTRY, _LOW_POWER_EXIT = 3, 5


class CdevFile:
    """One open device. `only` is the iommufd that a retrieved one may be bound to (by its table of arrived page tables)."""

    requests: Mapping[int, tuple[str, CStruct | None]] = {
        number: (name, _STRUCTS.get(number))
        for name, number in abi.REQUESTS.items()
        if name.startswith("VFIO_DEVICE")
    }
    queries = frozenset(
        {abi.DEVICE_GET_INFO, abi.DEVICE_GET_REGION_INFO, abi.DEVICE_GET_IRQ_INFO, abi.DEVICE_FEATURE}
    )

    def __init__(
        self,
        function: PciFunction,
        *,
        may_bind: Callable[[IommufdFile], bool] = lambda _: True,
        on_release: Callable[[CdevFile], None] = lambda _: None,
    ) -> None:
        self.label = function.name
        self.function = function
        self.bdf = function.bdf
        self.translated = not function.option.noiommu
        self.iommufd: IommufdFile | None = None
        self.hwpt: Hwpt | None = None
        self.preserved = False
        self.frozen = False
        self._may_bind = may_bind
        self._on_release = on_release
        self._held: File | None = None
        self._id = 0
        self._calls: dict[int, Callable[[DeviceCall], None]] = {
            abi.DEVICE_ATTACH_IOMMUFD_PT: self._attach,
            abi.DEVICE_DETACH_IOMMUFD_PT: self._detach,
            abi.DEVICE_GET_INFO: self._info,
            abi.DEVICE_GET_REGION_INFO: self._region_info,
            abi.DEVICE_GET_IRQ_INFO: self._irq_info,
            abi.DEVICE_SET_IRQS: self._set_irqs,
            abi.DEVICE_RESET: lambda _: self.function.reset(),
            abi.DEVICE_FEATURE: self._feature,
        }

    @property
    def bound(self) -> bool:
        """Whether it is bound to an iommufd, which is what opens the device."""
        return self.iommufd is not None

    @property
    def space(self) -> AddressSpace | None:
        """What the device's transfers are translated through now."""
        return self.function.space

    def release(self) -> None:
        """Disable the device, and let go of its page table and its iommufd."""
        if self.iommufd is not None:
            self._leave()
            self.function.space = None
            self.function.disable_all()
            self.function.quiesce()
            self.function.opener = None
            self.iommufd.objects.pop(self._id, None)
            self.iommufd = None
        if self._held is not None:
            self._held.close()
            self._held = None
        self._on_release(self)

    # -- calls -----------------------------------------------------------------------------------------------------------------

    def ioctl(self, call: DeviceCall) -> int:
        """Run an ioctl."""
        self._alive()
        if call.request == abi.DEVICE_BIND_IOMMUFD:
            self._bind(call)
            return 0
        if not self.bound:
            raise Refused(errno.EINVAL)
        run = self._calls.get(call.request)
        if run is None:
            raise Refused(errno.ENOTTY)
        run(call)
        return 0

    def _alive(self) -> None:
        if self.frozen:
            raise Refused(errno.EIO)

    def _bind(self, call: DeviceCall) -> None:
        argument = call.take(abi.BIND_MIN_SIZE, abi.S_BIND.size)
        values = abi.S_BIND.unpack(argument)
        if values["iommufd"] < 0 or values["flags"] & ~_BIND_TOKEN:
            raise Refused(errno.EINVAL)
        if self.bound:
            raise Refused(errno.EINVAL)
        place = abi.S_BIND.offsets["iommufd"]
        file = call.files.get(place)
        if file is None:
            raise Refused(errno.EBADF)
        iommufd = opened(file)
        if not isinstance(iommufd, IommufdFile):
            raise Refused(errno.EBADFD)
        if not self._may_bind(iommufd):
            raise Refused(errno.EPERM)
        if self.function.opener is not None:
            raise Refused(errno.EINVAL)  # open through another file already
        self._held = call.keep(place)
        self.iommufd = iommufd
        self._id = iommufd.add(Device(self))
        self.function.opener = self
        self.function.reset()
        self.function.command = MEMORY_SPACE
        self.function.power_state = D0
        abi.S_BIND.put(argument, "out_devid", self._id)
        call.give(argument)

    def _attach(self, call: DeviceCall) -> None:
        argument = call.take(abi.ATTACH_MIN_SIZE, abi.S_ATTACH.size)
        values = abi.S_ATTACH.unpack(argument)
        if values["flags"]:
            raise Refused(errno.EINVAL if values["flags"] & ~1 else errno.EOPNOTSUPP)
        assert self.iommufd is not None
        hwpt = self.iommufd.page_table(values["pt_id"], self)
        if self.preserved and hwpt is not self.hwpt:
            raise Refused(proposed.IMMUTABLE_ERRNO)
        self.attach(hwpt)
        abi.S_ATTACH.put(argument, "pt_id", hwpt.id)
        call.give(argument)

    def attach(self, hwpt: Hwpt) -> None:
        """Use a page table, instead of the one used until now."""
        if hwpt is not self.hwpt:
            self._leave()
            self.hwpt = hwpt
            hwpt.users.add(self)
        self.function.space = hwpt.space if hwpt.translates else None

    def _leave(self) -> None:
        if self.hwpt is not None and self.iommufd is not None:
            self.iommufd.drop_user(self.hwpt, self)
            self.hwpt = None

    def _detach(self, call: DeviceCall) -> None:
        argument = call.take(abi.DETACH_MIN_SIZE, abi.S_DETACH.size)
        if abi.S_DETACH.get(argument, "flags"):
            raise Refused(errno.EINVAL)
        if self.preserved:
            raise Refused(proposed.IMMUTABLE_ERRNO)
        self._leave()
        self.function.space = None

    def _info(self, call: DeviceCall) -> None:
        struct = abi.S_DEVICE_INFO
        argument = _short(call, struct.offsets["cap_offset"], struct.size)
        flags = abi.DEVICE_IS_PCI | abi.DEVICE_CAN_RESET
        for name, value in (
            ("flags", flags),
            ("num_regions", REGIONS),
            ("num_irqs", IRQS),
            ("cap_offset", 0),
        ):
            struct.put(argument, name, value)
        call.give(argument)

    def _region_info(self, call: DeviceCall) -> None:
        struct = abi.S_REGION_INFO
        argument = _short(call, struct.size, struct.size)
        index = struct.get(argument, "index")
        if index >= REGIONS or index == _VGA:
            raise Refused(errno.EINVAL)
        size = _REGION_SIZES.get(index, 0)
        struct.put(argument, "flags", abi.REGION_READ | abi.REGION_WRITE if size else 0)
        struct.put(argument, "size", size)
        struct.put(argument, "offset", index << _REGION_SHIFT)
        call.give(argument)

    def _irq_info(self, call: DeviceCall) -> None:
        struct = abi.S_IRQ_INFO
        argument = _short(call, struct.size, struct.size)
        index = struct.get(argument, "index")
        if index >= IRQS:
            raise Refused(errno.EINVAL)
        flags = abi.IRQ_EVENTFD
        flags |= (
            abi.CONSTANTS["VFIO_IRQ_INFO_MASKABLE"] | abi.CONSTANTS["VFIO_IRQ_INFO_AUTOMASKED"]
            if index == INTX
            else 0
        )
        flags |= abi.CONSTANTS["VFIO_IRQ_INFO_NORESIZE"] if index in (abi.MSI, abi.MSIX) else 0
        struct.put(argument, "flags", flags)
        struct.put(argument, "count", IRQ_COUNTS[index])
        call.give(argument)

    # -- interrupts ------------------------------------------------------------------------------------------------------------

    def _set_irqs(self, call: DeviceCall) -> None:
        struct = abi.S_IRQ_SET
        values = call.whole(struct)
        flags, index, start, count = (values[name] for name in ("flags", "index", "start", "count"))
        data = flags & (_DATA_NONE | _DATA_BOOL | _DATA_EVENTFD)
        action = flags & (_MASK | _UNMASK | _TRIGGER)
        if index >= IRQS or data not in _DATA_WIDTH:
            raise Refused(errno.EINVAL)
        if flags & ~(data | action) or start >= IRQ_COUNTS[index] or start + count > IRQ_COUNTS[index]:
            raise Refused(errno.EINVAL)
        width = _DATA_WIDTH[data]
        if width and (not count or call.user_size() - struct.size < count * width):
            raise Refused(errno.EINVAL)
        if action != _TRIGGER:
            if index != INTX or action not in (_MASK, _UNMASK):
                raise Refused(errno.ENOTTY)
            return  # the line of this function is never masked: each signal is one
        self._trigger(call, data, index, start, count)

    def _trigger(self, call: DeviceCall, data: int, index: int, start: int, count: int) -> None:
        function, at = self.function, abi.S_IRQ_SET.size
        active = index in function.vectors
        if data == _DATA_NONE and not count and active:
            function.disable(index)
            return
        other = function.irq_index is not None and index <= abi.MSIX and function.irq_index != index
        if other or (not active and data != _DATA_EVENTFD):
            raise Refused(errno.EINVAL)
        if data != _DATA_EVENTFD:
            wanted = call.argument[at : at + count] if data == _DATA_BOOL else bytes([1]) * count
            for vector in (start + number for number in range(count) if wanted[number]):
                function.trigger(index, vector)
            return
        offsets = [at + 4 * number for number in range(count)]
        for offset in offsets:
            self._check_eventfd(call, offset)
        if not active:
            function.enable(index)
        for number, offset in enumerate(offsets):
            function.listen(index, start + number, call.files.pop(offset, None))

    @staticmethod
    def _check_eventfd(call: DeviceCall, offset: int) -> None:
        if int.from_bytes(call.argument[offset : offset + 4], "little", signed=True) < 0:
            call.files.pop(offset, None)
            return
        file = call.files.get(offset)
        if file is None:
            raise Refused(errno.EBADF)
        if (
            not isinstance(file, Descriptor)
            or os.readlink(f"/proc/self/fd/{file.fd}") != "anon_inode:[eventfd]"
        ):
            raise Refused(errno.EINVAL)

    # -- features --------------------------------------------------------------------------------------------------------------

    def _feature(self, call: DeviceCall) -> None:
        flags = call.whole(abi.S_FEATURE)["flags"]
        known = _FEATURE_INDEX | abi.FEATURE_GET | abi.FEATURE_SET | abi.FEATURE_PROBE
        asked = flags & (abi.FEATURE_GET | abi.FEATURE_SET)
        both = asked == abi.FEATURE_GET | abi.FEATURE_SET
        if flags & ~known or (both and not flags & abi.FEATURE_PROBE):
            raise Refused(errno.EINVAL)
        index = flags & _FEATURE_INDEX
        if index not in (_LOW_POWER_ENTRY, _LOW_POWER_EXIT):
            raise Refused(errno.ENOTTY)
        if asked & abi.FEATURE_GET or not flags & ~_FEATURE_INDEX:
            raise Refused(errno.EINVAL)
        if asked and not flags & abi.FEATURE_PROBE:
            self.function.power_state = D3HOT if index == _LOW_POWER_ENTRY else D0

    # -- regions ---------------------------------------------------------------------------------------------------------------

    def _region(self, offset: int, length: int) -> tuple[int, int]:
        self._alive()
        if not self.bound:
            raise Refused(errno.EINVAL)
        index, place = offset >> _REGION_SHIFT, offset & (1 << _REGION_SHIFT) - 1
        if index == abi.CONFIG and place + length > CONFIG_SIZE:
            raise Refused(errno.EFAULT)
        if index >= REGIONS or place >= _REGION_SIZES.get(index, 0):
            raise Refused(errno.EINVAL)
        return index, place

    def pread(self, length: int, offset: int) -> bytes:
        """Read from a region."""
        index, place = self._region(offset, length)
        length = min(length, _REGION_SIZES[index] - place)
        if index == abi.CONFIG:
            return self.function.read_config(place, length)
        return self.function.read_bar(place, length)

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write to a region."""
        index, place = self._region(offset, len(data))
        data = data[: _REGION_SIZES[index] - place]
        if index == abi.CONFIG:
            self.function.write_config(place, data)
        else:
            self.function.write_bar(place, data)
        return len(data)


def _short(call: DeviceCall, minimum: int, known: int) -> bytearray:
    """Take a struct in as VFIO does: EINVAL if it is short, and what is more than the kernel knows is not looked at."""
    size = call.user_size()
    if size < minimum:
        raise Refused(errno.EINVAL)
    if len(call.argument) < min(size, known):
        raise Refused(errno.EFAULT)
    return bytearray(call.argument[: min(size, known)].ljust(known, b"\0"))
