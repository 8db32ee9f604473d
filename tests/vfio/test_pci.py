# SPDX-License-Identifier: Apache-2.0
"""Finding and binding PCI devices, on a tree of files; what the kernel does when they are written, the test does when it is asked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from luod.adapters.passthrough_errors import NotBoundToVfio, NotPermitted, PassthroughError
from luod.adapters.vfio.pci import PciDevices

ADDRESS = "0000:00:04.0"


class Bus(PciDevices):
    """The tree, with one device of the driver `e1000e` in group 7; what the kernel does on a write is done by `settle`."""

    def __init__(self, root: Path, *, taken_by: str = "vfio-pci", iommu: bool = True) -> None:
        self.root = root
        self.place = root / "sys/bus/pci/devices" / ADDRESS
        self.place.mkdir(parents=True)
        self.taken_by = taken_by
        group = root / "sys/kernel/iommu_groups/7/devices"
        group.mkdir(parents=True)
        (group / ADDRESS).touch()
        (group / "0000:00:04.1").touch()
        if iommu:
            (self.place / "iommu_group").symlink_to(group.parent)
        for name in ("e1000e", "vfio-pci"):
            (root / "sys/bus/pci/drivers" / name).mkdir(parents=True)
        self.drive("e1000e")
        super().__init__(root / "sys", root / "dev", root / "proc")

    def drive(self, name: str) -> None:
        link = self.place / "driver"
        link.unlink(missing_ok=True)
        if name:
            link.symlink_to(self.root / "sys/bus/pci/drivers" / name)
        if name == "vfio-pci":
            (self.place / "vfio-dev/vfio3").mkdir(parents=True)

    def driver(self, address: str) -> str:
        """Let the kernel act on what has been written since, then look."""
        unbind = self.root / "sys/bus/pci/drivers/e1000e/unbind"
        probe = self.root / "sys/bus/pci/drivers_probe"
        if unbind.exists() and unbind.read_text() == ADDRESS:
            unbind.unlink()
            self.drive("")
        if probe.exists() and probe.read_text() == ADDRESS:
            probe.unlink()
            wanted = (self.place / "driver_override").read_text().strip()
            self.drive(self.taken_by if wanted == "vfio-pci" else "e1000e")
        return super().driver(address)


@pytest.fixture
def bus(tmp_path: Path) -> Bus:
    return Bus(tmp_path)


def test_a_device_is_taken_from_its_driver_and_found(bus: Bus) -> None:
    assert bus.driver(ADDRESS) == "e1000e"
    with pytest.raises(NotBoundToVfio, match="driver is e1000e") as caught:
        bus.node(ADDRESS)
    assert "driver_override" in caught.value.hint
    bus.bind(ADDRESS)
    assert bus.driver(ADDRESS) == "vfio-pci"
    assert bus.node(ADDRESS) == str(bus.root / "dev/vfio/devices/vfio3")
    assert bus.group(ADDRESS) == 7
    assert bus.companions(ADDRESS) == ["0000:00:04.1"]


def test_binding_what_is_bound_writes_nothing(bus: Bus) -> None:
    bus.bind(ADDRESS)
    (bus.place / "driver_override").unlink()
    bus.bind(ADDRESS)
    assert not (bus.place / "driver_override").exists()


def test_a_driver_that_does_not_take_the_device_is_an_error(tmp_path: Path) -> None:
    bus = Bus(tmp_path, taken_by="")
    with pytest.raises(NotBoundToVfio, match="vfio-pci did not take it") as caught:
        bus.bind(ADDRESS)
    assert "denylist" in caught.value.hint


def test_without_an_iommu_nothing_is_written(tmp_path: Path) -> None:
    bus = Bus(tmp_path, iommu=False)
    with pytest.raises(NotPermitted) as caught:
        bus.bind(ADDRESS)
    assert "intel_iommu=on" in caught.value.hint
    assert not (bus.place / "driver_override").exists()


def test_sysfs_that_may_not_be_written_is_named(bus: Bus, monkeypatch) -> None:
    def denied(path: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", denied)
    with pytest.raises(NotPermitted, match="EACCES"):
        bus.bind(ADDRESS)


@pytest.mark.parametrize("address", ["00:04.0", "0000:00:04.0/../0000:00:05.0", "", "0000:00:04.8"])
def test_what_is_no_address_reaches_no_file(bus: Bus, address: str) -> None:
    with pytest.raises(PassthroughError, match="EINVAL"):
        bus.bind(address)


def test_a_device_that_is_not_there_is_named(bus: Bus) -> None:
    with pytest.raises(NotBoundToVfio, match="no such device"):
        bus.node("0000:00:1f.0")


def test_who_has_a_node_open_is_named(tmp_path: Path) -> None:
    node = tmp_path / "vfio3"
    node.touch()
    with node.open():
        held = PciDevices().holders(str(node))
    assert held == [f"{os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"]
    assert PciDevices().holders(str(node)) == []
