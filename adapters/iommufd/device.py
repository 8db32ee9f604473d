# SPDX-License-Identifier: Apache-2.0
"""`Iommufd`: one open /dev/iommu, its address spaces (IOAS) and page tables (HWPT). Addresses and lengths are bytes.

Objects have ids, given out from 1 upwards, the lowest free one first (drivers/iommu/iommufd/main.c). All of it ends with the last copy of
the fd. Failures are `PassthroughError`s.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from ..chardev import DeviceFiles
from ..cstruct import CStruct
from ..passthrough_errors import PassthroughError, passthrough_error
from . import abi

MAP_READ_WRITE = abi.MAP_READABLE | abi.MAP_WRITEABLE
_MOST_RANGES = 256


class HwInfo(NamedTuple):
    """The IOMMU behind a bound device."""

    kind: str
    dirty_tracking: bool


class IovaRanges(NamedTuple):
    """Where an address space may be mapped: ranges as (first, last) byte, and the alignment of every mapping."""

    ranges: tuple[tuple[int, int], ...]
    alignment: int


def open_iommufd(files: DeviceFiles, path: str = abi.PATH) -> int:
    """Open a new, empty iommufd; return the fd, which the caller owns."""
    try:
        return files.open(path)
    except OSError as error:
        raise passthrough_error("open iommufd", path, error) from error


class Iommufd:
    """What can be asked of an open iommufd. The fd stays the caller's. `name` is what messages call it."""

    def __init__(self, files: DeviceFiles, fd: int, *, name: str = abi.PATH) -> None:
        self._files = files
        self.fd = fd
        self.name = name

    def _call(
        self,
        operation: str,
        buf: bytearray,
        *,
        fds: tuple[int, ...] = (),
        pointers: dict[int, bytearray] | None = None,
        about: str = "",
    ) -> bytearray:
        try:
            self._files.ioctl(self.fd, abi.REQUESTS[operation], buf, fds=fds, pointers=pointers or {})
        except OSError as error:
            raise passthrough_error(operation, f"{self.name} {about}".rstrip(), error) from error
        return buf

    # -- address spaces

    def alloc_ioas(self) -> int:
        """Make an empty address space; return its id."""
        buf = self._call("IOMMU_IOAS_ALLOC", abi.S_IOAS_ALLOC.pack())
        return abi.S_IOAS_ALLOC.get(buf, "out_ioas_id")

    def map_file(
        self, ioas: int, fd: int, start: int, length: int, iova: int | None, *, writable: bool = True
    ) -> int:
        """Let devices of an address space reach `length` bytes of a memfd from `start` on; return at which address.

        `iova` is where (None: the kernel chooses). Every page is pinned. Whole pages only.
        """
        flags = abi.MAP_READABLE | (abi.MAP_WRITEABLE if writable else 0)
        flags |= 0 if iova is None else abi.MAP_FIXED_IOVA
        layout = abi.S_IOAS_MAP_FILE
        buf = layout.pack(flags=flags, ioas_id=ioas, fd=fd, start=start, length=length, iova=iova or 0)
        fds = (layout.offsets["fd"],) if fd >= 0 else ()
        self._call("IOMMU_IOAS_MAP_FILE", buf, fds=fds, about=_where(ioas, iova, length))
        return layout.get(buf, "iova")

    def map(self, ioas: int, address: int, length: int, iova: int | None, *, writable: bool = True) -> int:
        """Map memory of this process by its virtual address. It dies with the process and cannot be carried: see `map_file`."""
        flags = abi.MAP_READABLE | (abi.MAP_WRITEABLE if writable else 0)
        flags |= 0 if iova is None else abi.MAP_FIXED_IOVA
        buf = abi.S_IOAS_MAP.pack(flags=flags, ioas_id=ioas, user_va=address, length=length, iova=iova or 0)
        self._call("IOMMU_IOAS_MAP", buf, about=_where(ioas, iova, length))
        return abi.S_IOAS_MAP.get(buf, "iova")

    def unmap(self, ioas: int, iova: int, length: int) -> int:
        """Take whole mappings out of an address space; return how many bytes were mapped there."""
        buf = abi.S_IOAS_UNMAP.pack(ioas_id=ioas, iova=iova, length=length)
        self._call("IOMMU_IOAS_UNMAP", buf, about=_where(ioas, iova, length))
        return abi.S_IOAS_UNMAP.get(buf, "length")

    def copy(self, source: int, source_iova: int, length: int, target: int, target_iova: int) -> None:
        """Map in one address space what is mapped in another; neither needs the memory at hand."""
        buf = abi.S_IOAS_COPY.pack(
            flags=MAP_READ_WRITE | abi.MAP_FIXED_IOVA,
            dst_ioas_id=target,
            src_ioas_id=source,
            length=length,
            dst_iova=target_iova,
            src_iova=source_iova,
        )
        self._call("IOMMU_IOAS_COPY", buf, about=_where(source, source_iova, length))

    def mapped(self, ioas: int, iova: int, length: int) -> bool:
        """Say whether a whole range is mapped, without changing anything.

        The range is copied onto itself: IOAS_COPY looks at the source first and says ENOENT when it is not there, then at the target and
        says EEXIST when it is (drivers/iommu/iommufd/ioas.c, iommufd_ioas_copy).
        """
        try:
            self.copy(ioas, iova, length, ioas, iova)
        except PassthroughError as error:
            if error.errno in (errno.EEXIST, errno.ENOENT):
                return error.errno == errno.EEXIST
            raise
        raise AssertionError("a mapping was copied onto itself")

    def iova_ranges(self, ioas: int) -> IovaRanges:
        """Return where this address space may be mapped: what all attached devices can reach and none has reserved."""
        memory = bytearray(abi.S_IOVA_RANGE.size * _MOST_RANGES)
        layout = abi.S_IOAS_IOVA_RANGES
        buf = layout.pack(ioas_id=ioas, num_iovas=_MOST_RANGES)
        pointers = {layout.offsets["allowed_iovas"]: memory}
        self._call("IOMMU_IOAS_IOVA_RANGES", buf, pointers=pointers, about=f"ioas {ioas}")
        size, one = abi.S_IOVA_RANGE.size, abi.S_IOVA_RANGE
        found = min(layout.get(buf, "num_iovas"), _MOST_RANGES)
        ranges = (
            (one.get(memory, "start", at * size), one.get(memory, "last", at * size)) for at in range(found)
        )
        return IovaRanges(tuple(ranges), layout.get(buf, "out_iova_alignment"))

    def change_process(self) -> None:
        """Account every pinned page to this process from now on, after the fd came from another one."""
        self._call("IOMMU_IOAS_CHANGE_PROCESS", abi.S_IOAS_CHANGE_PROCESS.pack())

    # -- page tables and devices

    def alloc_hwpt(self, device: int, parent: int, *, dirty_tracking: bool = False) -> int:
        """Make a page table of its own for a bound device over an address space; return its id."""
        flags = abi.HWPT_ALLOC_DIRTY_TRACKING if dirty_tracking else 0
        buf = abi.S_HWPT_ALLOC.pack(flags=flags, dev_id=device, pt_id=parent)
        self._call("IOMMU_HWPT_ALLOC", buf, about=f"device {device} ioas {parent}")
        return abi.S_HWPT_ALLOC.get(buf, "out_hwpt_id")

    def hw_info(self, device: int) -> HwInfo:
        """Say what IOMMU a bound device is behind."""
        buf = self._call("IOMMU_GET_HW_INFO", abi.S_HW_INFO.pack(dev_id=device), about=f"device {device}")
        kind = abi.S_HW_INFO.get(buf, "out_data_type")
        capabilities = abi.S_HW_INFO.get(buf, "out_capabilities")
        return HwInfo(abi.HW_TYPES.get(kind, str(kind)), bool(capabilities & abi.HW_CAP_DIRTY_TRACKING))

    def destroy(self, object_id: int) -> None:
        """Destroy an address space or a page table that nothing uses."""
        self._call("IOMMU_DESTROY", abi.S_DESTROY.pack(id=object_id), about=f"object {object_id}")

    # -- what is there

    def ioas_ids(self, among: range) -> list[int]:
        """Return the ids of this range that are address spaces, without changing anything."""
        return [
            one for one in among if self._is("IOMMU_IOAS_IOVA_RANGES", abi.S_IOAS_IOVA_RANGES, "ioas_id", one)
        ]

    def device_ids(self, among: range) -> list[int]:
        """Return the ids of this range that are bound devices, without changing anything."""
        return [one for one in among if self._is("IOMMU_GET_HW_INFO", abi.S_HW_INFO, "dev_id", one)]

    def hwpt_ids(self, among: range) -> list[int]:
        """Return the ids of this range that are page tables, without changing anything: a bitmap of no page is asked for."""
        return [
            one
            for one in among
            if self._is("IOMMU_HWPT_GET_DIRTY_BITMAP", abi.S_HWPT_GET_DIRTY_BITMAP, "hwpt_id", one)
        ]

    def _is(self, operation: str, layout: CStruct, field: str, one: int) -> bool:
        """Ask for an object by a call that fits one kind only: ENOENT is the answer for ids of others and for unused ones."""
        try:
            self._files.ioctl(self.fd, abi.REQUESTS[operation], layout.pack(**{field: one}))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.EOVERFLOW):
                return error.errno != errno.ENOENT
            raise passthrough_error(operation, f"{self.name} object {one}", error) from error
        return True


def _where(ioas: int, iova: int | None, length: int) -> str:
    return f"ioas {ioas}" + ("" if iova is None else f" {iova:#x}+{length:#x}")
