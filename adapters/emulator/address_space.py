# SPDX-License-Identifier: Apache-2.0
"""I/O address spaces: what an IOAS of iommufd maps where, and how a device reaches memory through it.

Errnos and their order are those of drivers/iommu/iommufd/{ioas,io_pagetable}.c of Linux 7.3. An area maps a memfd, or memory of the
process (IOAS_MAP), which an emulator cannot see: such an area has no `memory`, and a device that touches it faults.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .. import proposed
from .handlers import Refused

PAGE = 4096
TOP = (1 << 64) - 1
APERTURE = (1 << 48) - 1
"""The last address that the IOMMU translates."""
RESERVED = (0xFEE00000, 0xFEEFFFFF)
"""Where x86 has its interrupt messages: no mapping may touch it."""

FIXED_IOVA, WRITEABLE, READABLE = 1, 2, 4


class IommuFault(Exception):
    """A device touched an address that is not mapped for it."""


@dataclass(eq=False)
class Memory:
    """A file as mapped: a descriptor of our own, and the seals it had at that moment.

    `pinnable` is False for what is no memfd, or too short: the kernel sees that when it first pins pages.
    """

    fd: int
    seals: int = 0
    pinnable: bool = True

    @property
    def identity(self) -> tuple[int, int]:
        """The inode, by which a memfd is known to be the one that a session preserves."""
        facts = os.fstat(self.fd)
        return facts.st_dev, facts.st_ino

    def share(self) -> Memory:
        """Return another reference."""
        return Memory(os.dup(self.fd), self.seals, self.pinnable)

    def close(self) -> None:
        """Drop the reference."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(frozen=True)
class Area:
    """One mapping, `length` bytes from `iova`, to byte `start` of `memory`."""

    iova: int
    length: int
    flags: int
    memory: Memory | None
    start: int = 0

    @property
    def last(self) -> int:
        """Its last address."""
        return self.iova + self.length - 1


@dataclass(eq=False)
class AddressSpace:
    """The mappings of one IOAS, or of a page table that came with a live update."""

    areas: list[Area] = field(default_factory=list[Area])
    immutable: bool = False
    """Preserved, or restored: nothing may be changed."""
    tables: int = 0
    """Page tables over it. The first one brings the limits of the IOMMU, and pins what is mapped."""

    @property
    def alignment(self) -> int:
        """What addresses and lengths must be multiples of."""
        return PAGE if self.tables else 1

    def add_table(self) -> None:
        """Make a page table over it: EADDRINUSE for a mapping out of the IOMMU's reach, EINVAL for one of no memory."""
        for area in self.areas:
            if not _reachable(area.iova, area.last):
                raise Refused(errno.EADDRINUSE)
            if area.memory is not None and not area.memory.pinnable:
                raise Refused(errno.EINVAL)
        self.tables += 1

    def map(self, iova: int | None, length: int, flags: int, memory: Memory | None, start: int = 0) -> int:
        """Map and return where; `iova` is None for anywhere. The address space owns `memory` from then on."""
        if self.immutable:
            raise Refused(proposed.IMMUTABLE_ERRNO)
        if not length or length % self.alignment:
            raise Refused(errno.EINVAL)
        if iova is None:
            iova = self._find(length)
        else:
            self._check_place(iova, length)
        if self.tables and memory is not None and not memory.pinnable:
            raise Refused(errno.EINVAL)
        self.areas.append(Area(iova, length, flags, memory, start))
        self.areas.sort(key=lambda area: area.iova)
        return iova

    def _check_place(self, iova: int, length: int) -> None:
        if iova % self.alignment:
            raise Refused(errno.EINVAL)
        if iova + length - 1 > TOP:
            raise Refused(errno.EOVERFLOW)
        last = iova + length - 1
        if self.tables and not _reachable(iova, last):
            raise Refused(errno.EINVAL)
        if any(area.iova <= last and area.last >= iova for area in self.areas):
            raise Refused(errno.EEXIST)

    def _find(self, length: int) -> int:
        place = PAGE
        for first, last in sorted([(area.iova, area.last) for area in self.areas] + [RESERVED]):
            if place + length <= first:
                break
            place = max(place, last + 1)
        if place + length - 1 > APERTURE:
            raise Refused(errno.ENOSPC)
        return place

    def unmap(self, iova: int, length: int) -> int:
        """Unmap whole areas and return how many bytes; 0 to the end of the range stands for all of them."""
        everything = iova == 0 and length == TOP
        if not everything and (iova >= TOP or length >= TOP or not length or iova + length - 1 > TOP):
            raise Refused(errno.EOVERFLOW if length else errno.EINVAL)
        if self.immutable:
            raise Refused(proposed.IMMUTABLE_ERRNO)
        last = iova + length - 1
        doomed = [area for area in self.areas if area.iova <= last and area.last >= iova]
        if any(area.iova < iova or area.last > last for area in doomed) or not (doomed or everything):
            raise Refused(errno.ENOENT)
        for area in doomed:
            self.areas.remove(area)
            if area.memory is not None:
                area.memory.close()
        return sum(area.length for area in doomed)

    def cut(self, iova: int, length: int) -> list[Area]:
        """Return what is mapped in a range, as areas that begin at offset 0; ENOENT where a part of it is not."""
        return [replace(area, iova=area.iova - iova) for area in self._covering(iova, length)]

    def _covering(self, iova: int, length: int) -> Iterator[Area]:
        place, end = iova, iova + length
        for area in self.areas:
            if area.last < place or place >= end:
                continue
            if area.iova > place:
                break
            stop = min(end, area.last + 1)
            yield replace(area, iova=place, length=stop - place, start=area.start + place - area.iova)
            place = stop
        if place < end:
            raise Refused(errno.ENOENT)

    # -- what a device does

    def read(self, iova: int, length: int) -> bytes:
        """Read memory as a device does. IommuFault."""
        return b"".join(
            os.pread(memory.fd, count, start) for memory, start, count in self._reach(iova, length, READABLE)
        )

    def write(self, iova: int, data: bytes) -> None:
        """Write memory as a device does. IommuFault."""
        done = 0
        for memory, start, count in self._reach(iova, len(data), WRITEABLE):
            os.pwrite(memory.fd, data[done : done + count], start)
            done += count

    def _reach(self, iova: int, length: int, flag: int) -> list[tuple[Memory, int, int]]:
        try:
            pieces = list(self._covering(iova, length))
        except Refused as refusal:
            raise IommuFault(f"{iova:#x}") from refusal
        reached: list[tuple[Memory, int, int]] = []
        for piece in pieces:
            if piece.memory is None or not piece.flags & flag:
                raise IommuFault(f"{piece.iova:#x}")
            reached.append((piece.memory, piece.start, piece.length))
        return reached

    def ranges(self) -> list[tuple[int, int]]:
        """Return what may be mapped: first and last address of each range."""
        return [(0, RESERVED[0] - 1), (RESERVED[1] + 1, APERTURE)] if self.tables else [(0, TOP)]

    def close(self) -> None:
        """Drop every mapping."""
        for area in self.areas:
            if area.memory is not None:
                area.memory.close()
        self.areas.clear()


def _reachable(first: int, last: int) -> bool:
    return last <= APERTURE and (last < RESERVED[0] or first > RESERVED[1])
