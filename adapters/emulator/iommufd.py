# SPDX-License-Identifier: Apache-2.0
"""An open /dev/iommu: its objects and its ioctls, as drivers/iommu/iommufd of Linux 7.3 has them, and the two that are proposed.

The order of checks is the kernel's: number, `size`, tail, flags and reserved words, ids, and then the object's own rules.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .. import proposed
from ..cstruct import CStruct
from ..iommufd import abi
from ..memfd import F_GET_SEALS
from .address_space import FIXED_IOVA, READABLE, TOP, WRITEABLE, AddressSpace, Area, Memory
from .handlers import Refused
from .memfd_files import TMPFS_MAGIC, filesystem_magic
from .open_file import DeviceCall

_MAP_FLAGS = FIXED_IOVA | WRITEABLE | READABLE
_HWPT_ALLOC_MINIMUM = abi.S_HWPT_ALLOC.offsets["data_type"]
_HW_INFO_MINIMUM = 32
_GET_DIRTY_BITMAP = abi.REQUESTS["IOMMU_HWPT_GET_DIRTY_BITMAP"]
_STRUCTS = {
    abi.DESTROY: abi.S_DESTROY,
    abi.IOAS_ALLOC: abi.S_IOAS_ALLOC,
    abi.IOAS_COPY: abi.S_IOAS_COPY,
    abi.IOAS_IOVA_RANGES: abi.S_IOAS_IOVA_RANGES,
    abi.IOAS_MAP: abi.S_IOAS_MAP,
    abi.IOAS_MAP_FILE: abi.S_IOAS_MAP_FILE,
    abi.IOAS_UNMAP: abi.S_IOAS_UNMAP,
    abi.HWPT_ALLOC: abi.S_HWPT_ALLOC,
    abi.GET_HW_INFO: abi.S_HW_INFO,
    abi.IOAS_CHANGE_PROCESS: abi.S_IOAS_CHANGE_PROCESS,
    _GET_DIRTY_BITMAP: abi.S_HWPT_GET_DIRTY_BITMAP,
    proposed.HWPT_LIVEUPDATE_MARK_PRESERVE: proposed.S_HWPT_MARK_PRESERVE,
    proposed.HWPT_LU_RESTORE: proposed.S_HWPT_RESTORE,
}
_MINIMUM = {abi.HWPT_ALLOC: _HWPT_ALLOC_MINIMUM, abi.GET_HW_INFO: _HW_INFO_MINIMUM}


class Bound(Protocol):
    """A device bound to an iommufd, as the iommufd sees it."""

    bdf: str
    translated: bool

    @property
    def space(self) -> AddressSpace | None:
        """Return what the device's transfers are translated through now."""
        ...

    def attach(self, hwpt: Hwpt) -> None:
        """Make the device use a page table."""
        ...


@dataclass(eq=False)
class Ioas:
    """An IOAS object."""

    space: AddressSpace = field(default_factory=AddressSpace)


@dataclass(eq=False)
class Hwpt:
    """A page table. `token` is that of MARK_PRESERVE; `restored` says that it came with a live update.

    `translates` is False for one without an IOMMU domain. `automatic` ones were made by attaching an IOAS and end with their users.
    """

    id: int
    space: AddressSpace
    translates: bool = True
    token: int | None = None
    automatic: bool = False
    restored: bool = False
    preserved: bool = False
    users: set[Bound] = field(default_factory=set[Bound])


@dataclass(eq=False)
class Device:
    """The object of a bound device."""

    bound: Bound


@dataclass(eq=False)
class Arrived:
    """A page table that came with a live update: its mappings, which devices it serves, and whether an object was made of it."""

    space: AddressSpace
    bdfs: set[str] = field(default_factory=set[str])
    hwpt: Hwpt | None = None
    reclaimed: bool = False


Object = Ioas | Hwpt | Device


class IommufdFile:
    """One open iommufd. `arrived` is what a retrieved one brought along, by token; None for one that was opened."""

    requests: Mapping[int, tuple[str, CStruct | None]] = {
        number: (name, _STRUCTS[number]) for name, number in {**abi.REQUESTS, **proposed.REQUESTS}.items()
    }
    queries = frozenset({abi.IOAS_IOVA_RANGES, abi.GET_HW_INFO, _GET_DIRTY_BITMAP})

    def __init__(
        self, label: str, *, speaks_proposed: bool = False, arrived: dict[int, Arrived] | None = None
    ) -> None:
        self.label = label
        self.arrived = arrived
        self.objects: dict[int, Object] = {}
        self._calls: dict[int, Callable[[DeviceCall, bytearray], None]] = {
            abi.DESTROY: self._destroy,
            abi.IOAS_ALLOC: self._ioas_alloc,
            abi.IOAS_COPY: self._copy,
            abi.IOAS_IOVA_RANGES: self._ranges,
            abi.IOAS_MAP: self._map,
            abi.IOAS_MAP_FILE: self._map_file,
            abi.IOAS_UNMAP: self._unmap,
            abi.HWPT_ALLOC: self._hwpt_alloc,
            abi.GET_HW_INFO: self._hw_info,
            abi.IOAS_CHANGE_PROCESS: self._change_process,
            _GET_DIRTY_BITMAP: self._dirty_bitmap,
        }
        if speaks_proposed:
            self._calls[proposed.HWPT_LIVEUPDATE_MARK_PRESERVE] = self._mark_preserve
            self._calls[proposed.HWPT_LU_RESTORE] = self._restore

    def ioctl(self, call: DeviceCall) -> int:
        """Run an ioctl."""
        if call.request not in self._calls:
            raise Refused(errno.ENOTTY)
        struct = _STRUCTS[call.request]
        argument = call.take(_MINIMUM.get(call.request, struct.size), struct.size)
        self._calls[call.request](call, argument)
        call.give(argument)
        return 0

    def pread(self, length: int, offset: int) -> bytes:
        """Refuse: an iommufd cannot be read."""
        raise Refused(errno.EINVAL)

    def pwrite(self, data: bytes, offset: int) -> int:
        """Refuse: an iommufd cannot be written."""
        raise Refused(errno.EINVAL)

    def release(self) -> None:
        """Drop every mapping. No device is bound any more: each holds a reference on its iommufd."""
        for found in self.objects.values():
            if isinstance(found, Ioas):
                found.space.close()
        self.objects.clear()
        for one in (self.arrived or {}).values():
            one.space.close()

    # -- objects ---------------------------------------------------------------------------------------------------------------

    def add(self, found: Object) -> int:
        """Give an object its id: the lowest free one."""
        number = next(number for number in itertools.count(1) if number not in self.objects)
        self.objects[number] = found
        return number

    def ioas(self, number: int) -> Ioas:
        """Return an IOAS; ENOENT."""
        found = self.objects.get(number)
        if not isinstance(found, Ioas):
            raise Refused(errno.ENOENT)
        return found

    def hwpts(self) -> list[Hwpt]:
        """Return the page tables, oldest first."""
        return [found for found in self.objects.values() if isinstance(found, Hwpt)]

    def page_table(self, number: int, device: Bound) -> Hwpt:
        """Return what `pt_id` of an attach means: a page table, or an IOAS, which gets one. ENOENT, EINVAL for another object."""
        found = self.objects.get(number)
        if found is None:
            raise Refused(errno.ENOENT)
        if isinstance(found, Hwpt):
            return found
        if isinstance(found, Device):
            raise Refused(errno.EINVAL)
        for hwpt in self.hwpts():
            if hwpt.automatic and hwpt.space is found.space and hwpt.translates == device.translated:
                return hwpt
        return self._new_hwpt(found, device, automatic=True)

    def _new_hwpt(self, ioas: Ioas, device: Bound, *, automatic: bool = False) -> Hwpt:
        ioas.space.add_table()
        hwpt = Hwpt(0, ioas.space, translates=device.translated, automatic=automatic)
        hwpt.id = self.add(hwpt)
        return hwpt

    def drop_user(self, hwpt: Hwpt, device: Bound) -> None:
        """A device does not use a page table any more."""
        hwpt.users.discard(device)
        if hwpt.automatic and not hwpt.users and self.objects.pop(hwpt.id, None) is not None:
            hwpt.space.tables -= 1

    def reclaimed(self) -> bool:
        """Whether every page table that came was made an object of, and no device uses one of them any more."""
        return all(
            one.reclaimed and not (one.hwpt is not None and one.hwpt.users)
            for one in (self.arrived or {}).values()
        )

    # -- calls -----------------------------------------------------------------------------------------------------------------

    def _destroy(self, _call: DeviceCall, argument: bytearray) -> None:
        number = abi.S_DESTROY.get(argument, "id")
        found = self.objects.get(number)
        if found is None:
            raise Refused(errno.ENOENT)
        if isinstance(found, Device):
            raise Refused(errno.EBUSY)
        if isinstance(found, Hwpt):
            if found.users or found.preserved:
                raise Refused(errno.EBUSY)
            found.space.tables -= 1
        elif any(hwpt.space is found.space for hwpt in self.hwpts()):
            raise Refused(errno.EBUSY)
        else:
            found.space.close()
        del self.objects[number]

    def _ioas_alloc(self, _call: DeviceCall, argument: bytearray) -> None:
        if abi.S_IOAS_ALLOC.get(argument, "flags"):
            raise Refused(errno.EOPNOTSUPP)
        abi.S_IOAS_ALLOC.put(argument, "out_ioas_id", self.add(Ioas()))

    def _ranges(self, call: DeviceCall, argument: bytearray) -> None:
        struct = abi.S_IOAS_IOVA_RANGES
        if struct.get(argument, "__reserved"):
            raise Refused(errno.EOPNOTSUPP)
        space = self.ioas(struct.get(argument, "ioas_id")).space
        room = struct.get(argument, "num_iovas")
        found = space.ranges()
        memory = call.pointers.get(struct.offsets["allowed_iovas"], bytearray())
        for index, (start, last) in enumerate(found[:room]):
            piece = abi.S_IOVA_RANGE.pack(start=start, last=last)
            memory[index * len(piece) : (index + 1) * len(piece)] = piece
        struct.put(argument, "num_iovas", len(found))
        struct.put(argument, "out_iova_alignment", space.alignment)
        if room < len(found):
            call.give(argument)  # how many there are is told together with the refusal
            raise Refused(errno.EMSGSIZE)

    def _map_flags(self, flags: int) -> None:
        if flags & ~_MAP_FLAGS:
            raise Refused(errno.EOPNOTSUPP)
        if not flags & (WRITEABLE | READABLE):
            raise Refused(errno.EINVAL)

    def _map(self, _call: DeviceCall, argument: bytearray) -> None:
        struct = abi.S_IOAS_MAP
        values = struct.unpack(argument)
        flags = values["flags"]
        if flags & ~_MAP_FLAGS or values["__reserved"]:
            raise Refused(errno.EOPNOTSUPP)
        self._map_flags(flags)
        if values["iova"] >= TOP or values["length"] >= TOP:
            raise Refused(errno.EOVERFLOW)
        space = self.ioas(values["ioas_id"]).space
        place = values["iova"] if flags & FIXED_IOVA else None
        struct.put(argument, "iova", space.map(place, values["length"], flags, None))

    def _map_file(self, call: DeviceCall, argument: bytearray) -> None:
        struct = abi.S_IOAS_MAP_FILE
        values = struct.unpack(argument)
        self._map_flags(values["flags"])
        if values["iova"] >= TOP or values["length"] >= TOP:
            raise Refused(errno.EOVERFLOW)
        space = self.ioas(values["ioas_id"]).space
        if values["start"] + values["length"] > TOP:
            raise Refused(errno.EOVERFLOW)
        memory = _file(call, struct.offsets["fd"], values["start"] + values["length"])
        place = values["iova"] if values["flags"] & FIXED_IOVA else None
        try:
            iova = space.map(place, values["length"], values["flags"], memory, values["start"])
        except Refused:
            memory.close()
            raise
        struct.put(argument, "iova", iova)

    def _unmap(self, _call: DeviceCall, argument: bytearray) -> None:
        struct = abi.S_IOAS_UNMAP
        space = self.ioas(struct.get(argument, "ioas_id")).space
        struct.put(
            argument, "length", space.unmap(struct.get(argument, "iova"), struct.get(argument, "length"))
        )

    def _copy(self, _call: DeviceCall, argument: bytearray) -> None:
        struct = abi.S_IOAS_COPY
        values = struct.unpack(argument)
        self._map_flags(values["flags"])
        if max(values["length"], values["dst_iova"], values["src_iova"]) >= TOP:
            raise Refused(errno.EOVERFLOW)
        source = self.ioas(values["src_ioas_id"]).space
        pieces = source.cut(values["src_iova"], values["length"])
        target = self.ioas(values["dst_ioas_id"]).space
        place = values["dst_iova"] if values["flags"] & FIXED_IOVA else None
        struct.put(argument, "dst_iova", _copy_into(target, place, pieces, values["length"], values["flags"]))

    def _hwpt_alloc(self, _call: DeviceCall, argument: bytearray) -> None:
        struct = abi.S_HWPT_ALLOC
        values = struct.unpack(argument)
        if values["__reserved"] or values["__reserved2"]:
            raise Refused(errno.EOPNOTSUPP)
        device = self.objects.get(values["dev_id"])
        if not isinstance(device, Device):
            raise Refused(errno.ENOENT)
        parent = self.objects.get(values["pt_id"])
        if not isinstance(parent, Ioas):
            raise Refused(errno.EINVAL)
        if values["data_type"] or values["data_len"] or values["flags"]:
            raise Refused(errno.EOPNOTSUPP)  # no nesting and no dirty tracking in this IOMMU
        struct.put(argument, "out_hwpt_id", self._new_hwpt(parent, device.bound).id)

    def _hw_info(self, _call: DeviceCall, argument: bytearray) -> None:
        struct = abi.S_HW_INFO
        if struct.get(argument, "flags"):
            raise Refused(errno.EOPNOTSUPP)
        if not isinstance(self.objects.get(struct.get(argument, "dev_id")), Device):
            raise Refused(errno.ENOENT)
        struct.put(argument, "data_len", 0)
        struct.put(argument, "out_data_type", 0)

    def _dirty_bitmap(self, _call: DeviceCall, argument: bytearray) -> None:
        values = abi.S_HWPT_GET_DIRTY_BITMAP.unpack(argument)
        if values["flags"] & ~1 or values["__reserved"]:
            raise Refused(errno.EOPNOTSUPP)
        if not isinstance(self.objects.get(values["hwpt_id"]), Hwpt):
            raise Refused(errno.ENOENT)
        raise Refused(errno.EOPNOTSUPP)

    def _change_process(self, _call: DeviceCall, argument: bytearray) -> None:
        if abi.S_IOAS_CHANGE_PROCESS.get(argument, "__reserved"):
            raise Refused(errno.EOPNOTSUPP)
        spaces = [found.space for found in self.objects.values() if isinstance(found, Ioas)]
        if any(area.memory is None for space in spaces for area in space.areas):
            raise Refused(errno.EINVAL)

    # -- proposed --------------------------------------------------------------------------------------------------------------

    def _mark_preserve(self, _call: DeviceCall, argument: bytearray) -> None:
        struct = proposed.S_HWPT_MARK_PRESERVE
        hwpt = self.objects.get(struct.get(argument, "hwpt_id"))
        if not isinstance(hwpt, Hwpt):
            raise Refused(errno.ENOENT)
        token = struct.get(argument, "hwpt_token")
        if any(other.token == token for other in self.hwpts()):
            raise Refused(errno.EADDRINUSE)
        hwpt.token = token

    def _restore(self, _call: DeviceCall, argument: bytearray) -> None:
        struct = proposed.S_HWPT_RESTORE
        if self.arrived is None:
            raise Refused(errno.ENOTTY)
        one = self.arrived.get(struct.get(argument, "hwpt_token"))
        if one is None or one.reclaimed:
            raise Refused(errno.ENOENT)
        bound = {found.bound.bdf: found.bound for found in self.objects.values() if isinstance(found, Device)}
        if one.bdfs - bound.keys():
            raise Refused(errno.ENODEV)
        one.reclaimed = True
        one.space.tables += 1
        one.hwpt = Hwpt(0, one.space, restored=True)
        one.hwpt.id = self.add(one.hwpt)
        for bdf in one.bdfs:
            # One that was switched to another page table before is not brought back to this one.
            if bound[bdf].space is one.space:
                bound[bdf].attach(one.hwpt)
        struct.put(argument, "pt_id", one.hwpt.id)


def _file(call: DeviceCall, offset: int, end: int) -> Memory:
    """Return a reference of its own on a file of the caller, up to byte `end` of it; EBADF."""
    file = call.files.get(offset)
    if file is None:
        raise Refused(errno.EBADF)
    fd = file.fileno()
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or filesystem_magic(fd) != TMPFS_MAGIC or end > facts.st_size:
        return Memory(os.dup(fd), pinnable=False)
    return Memory(os.dup(fd), fcntl.fcntl(fd, F_GET_SEALS))


def _copy_into(target: AddressSpace, place: int | None, pieces: list[Area], length: int, flags: int) -> int:
    """Map the pieces one behind the other. A part that does not fit takes back those before it."""
    if place is None:
        probe = target.map(None, length, flags, None)
        target.unmap(probe, length)
        place = probe
    done = 0
    try:
        for piece in pieces:
            memory = piece.memory.share() if piece.memory is not None else None
            try:
                target.map(place + piece.iova, piece.length, flags, memory, piece.start)
            except Refused:
                if memory is not None:
                    memory.close()
                raise
            done = piece.iova + piece.length
    except Refused:
        if done:
            target.unmap(place, done)
        raise
    return place
