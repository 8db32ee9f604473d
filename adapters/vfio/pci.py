# SPDX-License-Identifier: Apache-2.0
"""PCI devices in sysfs: into the hands of vfio-pci and back, and where their nodes are.

`driver_override` names the one driver that may take a device (Documentation/ABI/testing/sysfs-bus-pci). It lasts until the next boot, so
the host binds devices again before any of them can be restored. Addresses are "0000:00:04.0".
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..passthrough_errors import NotBoundToVfio, NotPermitted, PassthroughError

VFIO_PCI = "vfio-pci"
ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


class PciDevices:
    """The PCI devices of a host. `sys`, `dev` and `proc` are where these are mounted."""

    def __init__(
        self, sys: Path = Path("/sys"), dev: Path = Path("/dev"), proc: Path = Path("/proc")
    ) -> None:
        self._bus = sys / "bus" / "pci"
        self._dev = dev
        self._proc = proc

    def _device(self, address: str) -> Path:
        if not ADDRESS.fullmatch(address):
            raise PassthroughError(
                "find PCI device",
                repr(address),
                errno.EINVAL,
                hint="an address looks like 0000:00:04.0, see lspci -D",
            )
        place = self._bus / "devices" / address
        if not place.is_dir():
            raise NotBoundToVfio(
                "find PCI device",
                address,
                errno.ENODEV,
                detail="there is no such device",
                hint="see lspci -D",
            )
        return place

    def driver(self, address: str) -> str:
        """Return the driver that has the device, empty when none has."""
        try:
            return (self._device(address) / "driver").readlink().name
        except FileNotFoundError:
            return ""

    def group(self, address: str) -> int:
        """Return the number of the device's IOMMU group. ENODEV when the host has no IOMMU that is on."""
        try:
            return int((self._device(address) / "iommu_group").readlink().name)
        except FileNotFoundError:
            raise NotPermitted(
                "find the IOMMU group of", address, errno.ENODEV, detail="it has none",
                hint="turn the IOMMU on: in the firmware, and with intel_iommu=on on the kernel command line",
            ) from None  # fmt: skip

    def companions(self, address: str) -> list[str]:
        """Return the other devices of its IOMMU group: they go with it or to nobody."""
        members = self._device(address) / "iommu_group" / "devices"
        return sorted(one.name for one in members.iterdir() if one.name != address)

    def bind(self, address: str, driver: str = VFIO_PCI) -> None:
        """Give the device to a driver, whoever has it now; without effect when that driver has it already.

        Raises `NotBoundToVfio` when the driver does not take it, `NotPermitted` without the right to write to sysfs.
        """
        self.group(address)
        if self.driver(address) == driver:
            return
        place = self._device(address)
        try:
            (place / "driver_override").write_text(driver + "\n", "ascii")
            if self.driver(address):
                (place / "driver" / "unbind").write_text(address, "ascii")
            (self._bus / "drivers_probe").write_text(address, "ascii")
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise NotPermitted(
                    "bind", address, error.errno, hint="run as root: sysfs is written to"
                ) from error
            raise NotBoundToVfio(
                "bind", address, error.errno or errno.EIO, hint=f"see the kernel log for what {driver} says"
            ) from error
        if self.driver(address) != driver:
            raise NotBoundToVfio(
                "bind", address, errno.ENODEV, detail=f"{driver} did not take it",
                hint=f"load the driver ({driver}), and see the kernel log: vfio-pci leaves out some devices (vfio_pci.disable_denylist)",
            )  # fmt: skip

    def release(self, address: str) -> None:
        """Take the device from its driver and let the host's own have it again."""
        place = self._device(address)
        try:
            if self.driver(address):
                (place / "driver" / "unbind").write_text(address, "ascii")
            (place / "driver_override").write_text("\n", "ascii")
            (self._bus / "drivers_probe").write_text(address, "ascii")
        except OSError as error:
            raise NotPermitted(
                "release", address, error.errno or errno.EIO, hint="run as root, and close the device first"
            ) from error

    def node(self, address: str) -> str:
        """Return the path of the device's cdev. Raises `NotBoundToVfio` while it has none."""
        place = self._device(address) / "vfio-dev"
        names = sorted(os.listdir(place)) if place.is_dir() else []
        if not names:
            driver = self.driver(address)
            raise NotBoundToVfio(
                "find the VFIO node of", address, errno.ENODEV,
                detail="it has none" if driver == VFIO_PCI else f"its driver is {driver or 'none'}, not {VFIO_PCI}",
                hint="this kernel has no VFIO cdevs (CONFIG_VFIO_DEVICE_CDEV): use its group"
                if driver == VFIO_PCI
                else f"write {VFIO_PCI} to its driver_override and bind it, in every boot",
            )  # fmt: skip
        return str(self._dev / "vfio" / "devices" / names[0])

    def holders(self, path: str) -> list[str]:
        """Return who has a node open, as "PID (name)", of the processes that this one may look into."""
        return sorted(self._holders(os.path.realpath(path)))

    def _holders(self, path: str) -> Iterable[str]:
        for process in self._proc.iterdir():
            if not process.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if any(_link(process / "fd" / one) == path for one in os.listdir(process / "fd")):
                    yield f"{process.name} ({(process / 'comm').read_text('utf-8', 'replace').strip()})"


def _link(path: Path) -> str:
    """Read a link that may be gone: listing a directory of descriptors opens one more."""
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""
