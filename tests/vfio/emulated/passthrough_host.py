# SPDX-License-Identifier: Apache-2.0
"""A host with passthrough devices for tests: fds that are closed at the end, a guest that is set up in one call, and DMA that is looked at.

memfd, sealed  <- IOVA -  IOAS  <-  HWPT (marked HWPT_TOKEN)  <- attached -  edu
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luod.adapters import memfd
from luod.adapters.cstruct import CStruct
from luod.adapters.emulator import pci_function as edu
from luod.adapters.emulator.control import Control
from luod.adapters.emulator.device_files import EmulatedDeviceFiles
from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator
from luod.adapters.iommufd import liveupdate
from luod.adapters.iommufd.device import Iommufd, open_iommufd
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate.errors import KernelError
from luod.adapters.vfio import abi
from luod.adapters.vfio.config_space import ConfigSpace
from luod.adapters.vfio.device import VfioDevice, open_device
from luod.engine.ports import KexecImage

PLUGIN = "luod.adapters.emulator.passthrough:add"
PHASE_ONE = "luod.adapters.emulator.passthrough:add_phase_one"
DEVICES = ("vfio0", "vfio1,bdf=0000:00:05.0", "vfio2,vf,bdf=0000:00:06.0", "vfio3,noiommu,bdf=0000:00:07.0")
SIZE = 64 * 1024
IOVA = 0x100000
RAM, IOMMUFD, CDEV, OTHER_CDEV = 0x10, 0x20, 0x30, 0x31
HWPT_TOKEN = 0x77
CMDLINE = "liveupdate=on kho=on"


@contextlib.contextmanager
def refused(code: int) -> Iterator[None]:
    """What is inside must end with that errno."""
    try:
        yield
    except (KernelError, OSError) as error:
        if error.errno != code:
            raise AssertionError(f"errno {error.errno} instead of {code}: {error}") from error
        return
    raise AssertionError(f"nothing was refused; errno {code} was due")


@dataclass
class Guest:
    """What is set up for one guest: fds of its memory and its iommufd, and its device."""

    ram: int
    iommufd: Iommufd
    device: VfioDevice
    device_id: int
    ioas: int
    hwpt: int


class Host:
    """One machine. Its fds are dead after a jump; `fresh` closes them."""

    def __init__(self, emulator: Emulator, control: Control) -> None:
        self.emulator = emulator
        self.control = control
        self.files = EmulatedDeviceFiles(emulator.directory)
        self.kernel = open_kernel("emulated", directory=emulator.directory)
        self._fds: list[int] = []

    # -- fds

    def own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def close(self, *fds: int) -> None:
        for fd in fds:
            self._fds.remove(fd)
            os.close(fd)

    def fresh(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def memory(self, size: int = SIZE, *, sealed: bool = True) -> int:
        fd = self.own(memfd.create("ram", size))
        if sealed:
            memfd.seal_for_preservation(fd)
        return fd

    def eventfd(self) -> int:
        return self.own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def iommufd(self) -> Iommufd:
        return Iommufd(self.files, self.own(open_iommufd(self.files)))

    def device(self, name: str = "vfio0") -> VfioDevice:
        fd = self.own(open_device(self.files, f"{abi.DEVICES}/{name}"))
        return VfioDevice(self.files, fd, name=name)

    def raw(self, fd: int, request: int, argument: bytearray, fds: Sequence[int] = ()) -> bytearray:
        """Make an ioctl with exactly these bytes."""
        self.files.ioctl(fd, request, argument, fds=fds)
        return argument

    # -- guests

    def guest(self, name: str = "vfio0", *, sealed: bool = True, mark: int | None = HWPT_TOKEN) -> Guest:
        """Set up a whole guest."""
        ram, iommufd, device = self.memory(sealed=sealed), self.iommufd(), self.device(name)
        device_id = device.bind(iommufd.fd)
        ioas = iommufd.alloc_ioas()
        iommufd.map_file(ioas, ram, 0, SIZE, IOVA)
        hwpt = iommufd.alloc_hwpt(device_id, ioas)
        device.attach(hwpt)
        ConfigSpace(device).set_bus_master(True)
        if mark is not None:
            liveupdate.mark_preserve(self.files, iommufd.fd, hwpt, mark)
        return Guest(ram, iommufd, device, device_id, ioas, hwpt)

    def session(self, name: str = "vm") -> int:
        return self.own(self.kernel.create_session(name))

    def preserve(self, session: int, guest: Guest) -> None:
        """Memory, then iommufd, then device."""
        for token, fd in ((RAM, guest.ram), (IOMMUFD, guest.iommufd.fd), (CDEV, guest.device.fd)):
            self.kernel.preserve_fd(session, token, fd)

    def load(self, **image: Any) -> None:
        self.kernel.load(KexecImage(stub_image(self.emulator.directory / "image", **image), None, CMDLINE))

    def jump(self, **image: Any) -> None:
        """Load and reboot; every fd from before is dead and closed."""
        self.load(**image)
        self.control.kexec()
        self.fresh()

    def carried(self, name: str = "vfio0") -> int:
        """Take a guest through a reboot; return its retrieved session."""
        guest = self.guest(name)
        os.pwrite(guest.ram, b"carried", 0)
        self.preserve(self.session(), guest)
        self.jump()
        return self.retrieved_session()

    def retrieved_session(self, name: str = "vm") -> int:
        return self.own(self.kernel.retrieve_session(name))

    def retrieve(self, session: int, token: int) -> int:
        return self.own(self.kernel.retrieve_fd(session, token))

    def retrieved_iommufd(self, session: int) -> Iommufd:
        return Iommufd(self.files, self.retrieve(session, IOMMUFD))

    def retrieved_device(self, session: int) -> VfioDevice:
        return VfioDevice(self.files, self.retrieve(session, CDEV), name="retrieved")

    def restore_hwpt(self, iommufd: Iommufd, token: int = HWPT_TOKEN) -> int:
        return liveupdate.restore_hwpt(self.files, iommufd.fd, token)

    # -- what a device does

    def dma(self, device: VfioDevice, ram: int, iova: int = IOVA, *, at: int = 4096) -> bool:
        """Have the device copy the first 64 bytes of a memory to `at`; say whether they came."""
        pattern = os.urandom(64)
        os.pwrite(ram, pattern, 0)
        os.pwrite(ram, bytes(64), at)
        self.copy(device, iova, iova + at)
        return os.pread(ram, 64, at) == pattern

    def copy(self, device: VfioDevice, source: int, target: int) -> None:
        """Have the device copy 64 bytes by way of its own buffer."""
        for start, end, command in (
            (source, edu.BUFFER, edu.START),
            (edu.BUFFER, target, edu.START | edu.TO_MEMORY),
        ):
            for register, value in ((0x80, start), (0x88, end), (0x90, 64), (0x98, command)):
                device.write(abi.BAR0, register, value.to_bytes(8, "little"))

    def state(self, name: str = "vfio0") -> dict[str, Any]:
        found: dict[str, Any] = self.control.state()["devices"][name]
        return found

    def calls(self, op: str) -> list[dict[str, Any]]:
        return [call for call in self.control.audit() if call["op"] == op]


def signalled(eventfd: int) -> bool:
    """Whether an eventfd was written to; it is emptied."""
    if not select.select([eventfd], [], [], 0)[0]:
        return False
    os.read(eventfd, 8)
    return True


def short(struct: CStruct, size: int, **values: int) -> bytearray:
    """A struct cut off, or drawn out with zeros, to `size`, and saying so."""
    buf = struct.pack(**values)
    buf = bytearray(buf[:size].ljust(size, b"\0"))
    buf[:4] = size.to_bytes(4, "little")
    return buf


@contextlib.contextmanager
def started(
    directory: Path, *, handlers: Sequence[str] = (PLUGIN,), devices: Sequence[str] = DEVICES, **options: Any
) -> Iterator[Host]:
    with (
        Emulator.start(directory / "emu", handlers=handlers, devices=devices, **options) as emulator,
        emulator.control(timeout=30) as control,
    ):
        control.spare(os.getpid())
        host = Host(emulator, control)
        try:
            yield host
        finally:
            host.fresh()
