# SPDX-License-Identifier: Apache-2.0
"""Handler plug-ins for what is proposed upstream and not merged: live update of iommufds and of vfio-pci devices.

    --handler luod.adapters.emulator.passthrough:add               page tables can be taken up again ("phase 2")
    --handler luod.adapters.emulator.passthrough:add_phase_one     as posted: an iommufd goes over and does not come back

The numbers and strings are in `adapters.proposed`. What is preserved: of an iommufd the marked page tables with their mappings, of a
device its identity and which page table it uses. The device itself is reset when it is frozen, and there is no unfreeze.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from .. import proposed
from ..memfd import PRESERVATION_SEALS
from .address_space import AddressSpace, Area, Memory
from .board import VFIO_PCI, ArrivedDevice, ArrivedIommufd, Board
from .handlers import File, FileHandler, HandlerRegistry, Payload, Refused, RetrieveStatus, SessionView
from .iommufd import Arrived, Hwpt, IommufdFile
from .memfd_files import MemfdState
from .open_file import opened
from .pci_function import D0
from .vfio_cdev import CdevFile


@dataclass(eq=False)
class PreservedHwpt:
    """A marked page table in an outgoing session: its mappings, each with the preserved memfd that it is of."""

    hwpt: Hwpt
    areas: list[tuple[Area, MemfdState]]


@dataclass(eq=False)
class PreservedIommufd:
    """An iommufd in an outgoing session. `carried` is what crosses the jump, once it is made."""

    page_tables: dict[int, PreservedHwpt]
    carried: ArrivedIommufd | None = None


@dataclass(eq=False)
class PreservedDevice:
    """A device in an outgoing session."""

    iommufd: PreservedIommufd
    hwpt_token: int


def _iommufd(file: File) -> IommufdFile:
    found = opened(file)
    if not isinstance(found, IommufdFile):
        raise TypeError(f"not an iommufd: {file!r}")
    return found


def _cdev(file: File) -> CdevFile:
    found = opened(file)
    if not isinstance(found, CdevFile):
        raise TypeError(f"not a VFIO device: {file!r}")
    return found


class IommufdHandler(FileHandler):
    """iommufds."""

    kind = "iommufd"

    def __init__(self, compatible: str, board: Board) -> None:
        super().__init__(compatible)
        self._board = board
        board.speaks_proposed = True

    def can_preserve(self, file: File) -> bool:
        """Every iommufd."""
        return isinstance(opened(file), IommufdFile)

    def get_id(self, file: File) -> Hashable:
        """The open file."""
        return id(opened(file))

    def preserve(self, file: File, session: SessionView, /) -> PreservedIommufd:
        """Take the marked page tables, and make their address spaces immutable."""
        marked = [hwpt for hwpt in _iommufd(file).hwpts() if hwpt.token is not None]
        if any(not hwpt.translates for hwpt in marked):
            raise Refused(errno.EINVAL)
        memfds = {
            _identity(file): data for _, _, file, data in session.preserved() if isinstance(data, MemfdState)
        }
        taken = [PreservedHwpt(hwpt, _areas(hwpt.space, memfds)) for hwpt in marked]
        for one in taken:
            one.hwpt.preserved = True
            one.hwpt.space.immutable = True
        return PreservedIommufd({one.hwpt.token: one for one in taken if one.hwpt.token is not None})

    def unpreserve(self, file: File, data: PreservedIommufd) -> None:
        """Let the address spaces be changed again."""
        for one in data.page_tables.values():
            one.hwpt.preserved = False
            one.hwpt.space.immutable = one.hwpt.restored

    def carry(self, file: File, data: PreservedIommufd) -> ArrivedIommufd:
        """Map the same addresses to the memory that the memfds have become."""
        page_tables = {token: Arrived(_carried(one.areas)) for token, one in data.page_tables.items()}
        data.carried = ArrivedIommufd(page_tables)
        return data.carried

    def discard(self, payload: ArrivedIommufd) -> None:
        """Drop the page tables."""
        payload.close()

    def boot(self, payload: ArrivedIommufd) -> None:
        """Keep the page tables: devices use them before anybody retrieves anything."""
        self._board.hold(payload)

    def retrieve(self, payload: ArrivedIommufd) -> File:
        """Make an iommufd that can take the page tables up again, one by one."""
        payload.file = self._board.new_iommufd(payload.page_tables)
        return self._board.publish(payload.file)

    def can_finish(self, payload: ArrivedIommufd, status: RetrieveStatus, /) -> bool:
        """Not before every page table was taken up again and is used by no device any more."""
        return status == "retrieved" and payload.file is not None and payload.file.reclaimed()

    def inspect(self, payload: Payload, /) -> Mapping[str, object]:
        """The tokens of the page tables."""
        if isinstance(payload, PreservedIommufd | ArrivedIommufd):
            return {"page_tables": [f"{token:#x}" for token in payload.page_tables]}
        return {}


def _identity(file: File) -> tuple[int, int]:
    return Memory(file.fileno()).identity


def _areas(
    space: AddressSpace, memfds: Mapping[tuple[int, int], MemfdState]
) -> list[tuple[Area, MemfdState]]:
    """Return the mappings with their memfds: EINVAL for what is no file or was not sealed, ENOENT for a memfd of no token here."""
    taken: list[tuple[Area, MemfdState]] = []
    for area in space.areas:
        if area.memory is None:
            raise Refused(errno.EINVAL)
        if area.memory.seals & PRESERVATION_SEALS != PRESERVATION_SEALS:
            raise Refused(errno.EINVAL)
        found = memfds.get(area.memory.identity)
        if found is None:
            raise Refused(proposed.NOT_IN_SESSION_ERRNO)
        taken.append((area, found))
    return taken


def _carried(areas: list[tuple[Area, MemfdState]]) -> AddressSpace:
    space = AddressSpace()
    for area, memfd in areas:
        if memfd.successor is None:
            raise RuntimeError("an iommufd is carried before its memfds")
        memory = Memory(memfd.successor.fd, memfd.seals).share()
        space.map(area.iova, area.length, area.flags, memory, area.start)
    space.immutable = True
    return space


class IommufdPhaseOneHandler(IommufdHandler):
    """iommufds as the posted series has them: RETRIEVE_FD is refused, and FINISH with it, for ever."""

    def retrieve(self, payload: ArrivedIommufd) -> File:
        """Refuse."""
        raise Refused(proposed.RETRIEVE_PHASE_ONE_ERRNO)

    def can_finish(self, _payload: ArrivedIommufd, _status: RetrieveStatus, /) -> bool:
        """Never."""
        return False


class VfioHandler(FileHandler):
    """vfio-pci devices that were opened by their own node."""

    kind = "vfio-pci"
    can_unfreeze = False

    def __init__(self, compatible: str, board: Board) -> None:
        super().__init__(compatible)
        self._board = board

    def can_preserve(self, file: File) -> bool:
        """Physical functions only."""
        found = opened(file)
        return isinstance(found, CdevFile) and not found.function.option.vf

    def get_id(self, file: File) -> Hashable:
        """The open file."""
        return id(opened(file))

    def preserve(self, file: File, session: SessionView, /) -> PreservedDevice:
        """Take the device and its page table: ENOENT without its iommufd in the session or unattached, EINVAL if it is not marked."""
        cdev = _cdev(file)
        iommufd = next(
            (
                data
                for _, _, other, data in session.preserved()
                if isinstance(data, PreservedIommufd) and cdev.bound and opened(other) is cdev.iommufd
            ),
            None,
        )
        if iommufd is None:
            raise Refused(proposed.NOT_IN_SESSION_ERRNO)
        if cdev.hwpt is None:
            raise Refused(errno.ENOENT)
        # One that was marked after its iommufd was preserved is not among those that will be carried.
        if cdev.hwpt.token is None or cdev.hwpt.token not in iommufd.page_tables:
            raise Refused(errno.EINVAL)
        cdev.preserved = True
        return PreservedDevice(iommufd, cdev.hwpt.token)

    def unpreserve(self, file: File, data: PreservedDevice) -> None:
        """Let it be attached elsewhere again. A frozen one stays frozen."""
        _cdev(file).preserved = False

    def freeze(self, file: File, data: PreservedDevice, session: SessionView) -> None:
        """Reset the device and cut its file off: EINVAL while an interrupt is on or it is not in D0."""
        cdev = _cdev(file)
        if cdev.function.irq_index is not None or cdev.function.power_state != D0:
            raise Refused(errno.EINVAL)
        cdev.function.quiesce()
        cdev.frozen = True

    def carry(self, file: File, data: PreservedDevice) -> ArrivedDevice:
        """Take the address on the bus."""
        carried = data.iommufd.carried
        if carried is None:
            raise RuntimeError("a device is carried before its iommufd")
        page_table = carried.page_tables[data.hwpt_token]
        page_table.bdfs.add(_cdev(file).bdf)
        return ArrivedDevice(_cdev(file).bdf, carried, page_table)

    def boot(self, payload: ArrivedDevice) -> None:
        """Claim the device, and attach its page table."""
        self._board.claim(payload)

    def discard(self, payload: ArrivedDevice) -> None:
        """Let the device go."""
        self._board.unclaim(payload)

    def retrieve(self, payload: ArrivedDevice) -> File:
        """Make a file like that of the device node: ENODEV unless the device is there and the host has bound it to vfio-pci."""
        slot = self._board.slot_at(payload.bdf)
        if slot is None or slot.driver != VFIO_PCI:
            raise Refused(errno.ENODEV)
        return self._board.publish(
            CdevFile(slot.function, may_bind=lambda iommufd: iommufd is payload.iommufd.file)
        )

    def can_finish(self, payload: ArrivedDevice, status: RetrieveStatus, /) -> bool:
        """Not before the retrieved file is bound."""
        slot = self._board.slot_at(payload.bdf)
        return status == "retrieved" and slot is not None and slot.function.opener is not None

    def finish(self, payload: ArrivedDevice, status: RetrieveStatus) -> None:
        """End the claim: the device may be opened by its node again."""
        self._board.unclaim(payload)


def add(registry: HandlerRegistry) -> None:
    """Add both kinds, and the ioctls that go with them."""
    _add(registry, IommufdHandler)


def add_phase_one(registry: HandlerRegistry) -> None:
    """Add both kinds as far as they are posted."""
    _add(registry, IommufdPhaseOneHandler)


def _add(registry: HandlerRegistry, iommufds: type[IommufdHandler]) -> None:
    board = registry.board
    registry.register(
        IommufdHandler.kind, proposed.IOMMUFD_COMPATIBLE, lambda compatible: iommufds(compatible, board)
    )
    registry.register(
        VfioHandler.kind, proposed.VFIO_PCI_COMPATIBLE, lambda compatible: VfioHandler(compatible, board)
    )
