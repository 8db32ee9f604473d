# SPDX-License-Identifier: Apache-2.0
"""The devices of the emulated machine over its boots, what the host has bound them to, and who may open them."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..iommufd import abi as iommufd_abi
from ..vfio import abi as vfio_abi
from .handlers import File, Refused
from .iommufd import Arrived, IommufdFile
from .open_file import OpenFile, Publish
from .pci_function import D0, DeviceOption, PciFunction
from .vfio_cdev import CdevFile

VFIO_PCI = "vfio-pci"


@dataclass(eq=False)
class ArrivedIommufd:
    """An iommufd between two kernels: its preserved page tables by token. `file` is set once it was retrieved."""

    page_tables: dict[int, Arrived]
    file: IommufdFile | None = None

    def close(self) -> None:
        """Drop the mappings, unless a retrieved file has them."""
        if self.file is None:
            for one in self.page_tables.values():
                one.space.close()


@dataclass(eq=False)
class ArrivedDevice:
    """A device between two kernels: its address on the bus, and the page table it was attached to."""

    bdf: str
    iommufd: ArrivedIommufd
    page_table: Arrived


@dataclass(eq=False)
class Slot:
    """A device in its place: what is bound to it now and at the next boot, and whether it came with a live update."""

    function: PciFunction
    driver: str
    next_driver: str
    arrived: ArrivedDevice | None = None


def _unconnected(_opened: OpenFile) -> File:
    raise Refused(errno.ENXIO)


@dataclass(eq=False)
class Board:
    """All devices, by the name of their node. `speaks_proposed` makes iommufds know the proposed ioctls."""

    slots: dict[str, Slot] = field(default_factory=dict[str, Slot])
    speaks_proposed: bool = False
    publish: Publish = _unconnected
    _opened: int = 0
    _arrived: list[ArrivedIommufd] = field(default_factory=list[ArrivedIommufd])

    @classmethod
    def of(cls, options: Iterable[DeviceOption]) -> Board:
        """Put the devices in. ValueError for a name or an address that is there twice."""
        board = cls()
        for option in options:
            taken = [slot.function.bdf for slot in board.slots.values()]
            if option.name in board.slots or option.bdf in taken:
                raise ValueError(f"two devices are called {option.name!r} or sit at {option.bdf}")
            board.slots[option.name] = Slot(PciFunction(option), option.driver, option.driver)
        return board

    def write_sysfs(self, root: Path) -> None:
        """Write what sysfs shows of the devices under `root`: driver, IOMMU group, and the name of the node. It cannot be written to."""
        bus = root / "bus" / "pci"
        for number, (name, slot) in enumerate(self.slots.items()):
            place = bus / "devices" / slot.function.bdf
            place.mkdir(parents=True, exist_ok=True)
            _link(place / "driver", bus / "drivers" / slot.driver if slot.driver else None)
            group = root / "kernel" / "iommu_groups" / str(number)
            (group / "devices" / slot.function.bdf).mkdir(parents=True, exist_ok=True)
            _link(place / "iommu_group", None if slot.function.option.noiommu else group)
            node = place / "vfio-dev" / name
            if slot.driver == VFIO_PCI:
                node.mkdir(parents=True, exist_ok=True)
            elif node.is_dir():
                node.rmdir()

    def boot(self) -> None:
        """Begin a boot: every device is reset, bound to what it is bound to at boot, and not translated for."""
        self.speaks_proposed = False
        for slot in self.slots.values():
            slot.function.disable_all()
            slot.function.power_on()
            slot.function.space = None
            slot.function.opener = None
            slot.driver = slot.next_driver
            slot.arrived = None
        for one in self._arrived:
            one.close()
        self._arrived.clear()

    def slot_at(self, bdf: str) -> Slot | None:
        """Return the device at an address of the bus."""
        return next((slot for slot in self.slots.values() if slot.function.bdf == bdf), None)

    def claim(self, arrived: ArrivedDevice) -> None:
        """Early boot: take a preserved device for its owner, its page table attached."""
        slot = self.slot_at(arrived.bdf)
        if slot is not None:
            slot.arrived = arrived
            slot.function.space = arrived.page_table.space

    def hold(self, arrived: ArrivedIommufd) -> None:
        """Early boot: keep preserved page tables until the next boot."""
        self._arrived.append(arrived)

    def unclaim(self, arrived: ArrivedDevice) -> None:
        """FINISH: the device is one like any other."""
        slot = self.slot_at(arrived.bdf)
        if slot is not None and slot.arrived is arrived:
            slot.arrived = None

    def bind(self, name: str, driver: str, *, at_boot: bool = False) -> None:
        """Bind a device to a driver, empty for none: now, or from the next boot on. ENODEV, EBUSY."""
        slot = self.slots.get(name)
        if slot is None:
            raise Refused(errno.ENODEV)
        if not at_boot:
            claimed = slot.arrived is not None and driver != VFIO_PCI
            if slot.driver != driver and (claimed or slot.function.opener is not None):
                raise Refused(errno.EBUSY)
            slot.driver = driver
        slot.next_driver = driver

    # -- opening ---------------------------------------------------------------------------------------------------------------

    def open(self, path: str) -> OpenFile:
        """Open a device node. ENOENT, and EBUSY for a device that came with a live update and was not finished."""
        if path == iommufd_abi.PATH and self.slots:
            return self.new_iommufd()
        folder, _, name = path.rpartition("/")
        slot = self.slots.get(name)
        if folder != vfio_abi.DEVICES or slot is None or slot.driver != VFIO_PCI:
            raise Refused(errno.ENOENT)
        if slot.arrived is not None:
            raise Refused(errno.EBUSY)
        return CdevFile(slot.function)

    def new_iommufd(self, arrived: dict[int, Arrived] | None = None) -> IommufdFile:
        """Make an open iommufd."""
        self._opened += 1
        return IommufdFile(f"iommufd{self._opened}", speaks_proposed=self.speaks_proposed, arrived=arrived)

    def state(self) -> dict[str, Any]:
        """Describe the devices for the harness."""
        return {name: _describe(slot) for name, slot in self.slots.items()}


def _link(link: Path, target: Path | None) -> None:
    link.unlink(missing_ok=True)
    if target is not None:
        link.symlink_to(target)


def _describe(slot: Slot) -> dict[str, Any]:
    function = slot.function
    file = function.opener if isinstance(function.opener, CdevFile) else None
    return {
        "bdf": function.bdf,
        "driver": slot.driver,
        "arrived": slot.arrived is not None,
        "bound": file.iommufd.label if file is not None and file.iommufd is not None else None,
        "hwpt": file.hwpt.id if file is not None and file.hwpt is not None else None,
        "frozen": file is not None and file.frozen,
        "command": function.command,
        "awake": function.power_state == D0,
        "interrupts": function.irq_index,
        "transfers": function.transfers,
        "faults": list(function.faults),
        "mappings": []
        if function.space is None
        else [{"iova": area.iova, "length": area.length} for area in function.space.areas],
    }
