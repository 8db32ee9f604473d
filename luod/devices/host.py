# SPDX-License-Identifier: Apache-2.0
"""`Host`: what the steps of a plan need of the world, with a real kernel behind it or an emulated one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..adapters.chardev import DeviceFiles
from ..adapters.iommufd.abi import PATH
from ..adapters.iommufd.device import Iommufd
from ..adapters.vfio.device import VfioDevice
from ..engine.errors import EffectFailed
from ..engine.ports import Kernel
from .fds import HeldFds


class PciBus(Protocol):
    """Where PCI devices are found, such as `adapters.vfio.pci.PciDevices`."""

    def driver(self, address: str) -> str:
        """Return the driver that has a device."""
        ...

    def bind(self, address: str) -> None:
        """Give a device to vfio-pci."""
        ...

    def node(self, address: str) -> str:
        """Return the path of the device's cdev."""
        ...

    def holders(self, path: str) -> list[str]:
        """Return who has a node open, where that can be seen."""
        ...


@dataclass
class Host:
    """One guest's view: device files, the descriptors it has, its session.

    `session_fd` is the session of the guest, -1 while there is none; `iommufd_path` the node to open.
    """

    files: DeviceFiles
    kernel: Kernel
    pci: PciBus
    fds: HeldFds = field(default_factory=HeldFds)
    session_fd: int = -1
    iommufd_path: str = PATH
    accounted: set[str] = field(default_factory=set[str])
    """Iommufds whose pinned pages are accounted to this very process."""

    def memory(self, token: str) -> int:
        """Return the memfd of a memory. Raises `EffectFailed` while it is not there."""
        return self._there(token, "memory", self.fds.own(token))

    def iommufd(self, token: str) -> Iommufd:
        """Return an iommufd that is open."""
        return Iommufd(
            self.files, self._there(token, "iommufd", self.fds.find(token)), name=f"iommufd {token}"
        )

    def device(self, token: str, address: str) -> VfioDevice:
        """Return a device that is open."""
        return VfioDevice(
            self.files, self._there(token, "device", self.fds.find(token)), name=address or token
        )

    def _there(self, token: str, what: str, fd: int | None) -> int:
        if fd is None:
            raise EffectFailed(
                f"{what} {token} is not open in this process",
                errno="EBADF",
                hint="run the steps of its plan that come before",
            )
        return fd

    def eventfds(self, token: str, index: int, vectors: int) -> list[int] | None:
        """Return the eventfds of a device's interrupts of one kind, None unless this process has all of them."""
        found = [self.fds.own(eventfd_name(token, index, vector)) for vector in range(vectors)]
        return None if None in found else [fd for fd in found if fd is not None]


def eventfd_name(token: str, index: int, vector: int) -> str:
    """Name the eventfd of a vector in `Host.fds`: a VMM that has its own (irqfds of KVM) keeps them there under these names."""
    return f"{token}/irq{index}.{vector}"
