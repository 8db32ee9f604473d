# SPDX-License-Identifier: Apache-2.0
"""The legacy way to a device: its IOMMU group and a container of type 1, for hosts without cdevs (Linux before 6.6).

    container  /dev/vfio/vfio     the address space
    group      /dev/vfio/N        put into the container; only then has the container an IOMMU, and the group devices

Nothing of this can be carried by a live update: the proposed handlers take cdevs only.
"""

from __future__ import annotations

from typing import NamedTuple

from ..chardev import DeviceFiles
from ..passthrough_errors import PassthroughError, passthrough_error
from . import abi

CONTAINER = f"{abi.GROUPS}/vfio"


class GroupStatus(NamedTuple):
    """Whether every device of the group is free for VFIO, and whether the group is in a container."""

    viable: bool
    in_container: bool


def open_container(files: DeviceFiles, path: str = CONTAINER) -> int:
    """Open a new container and see that it speaks the one version there is; return the fd, which the caller owns."""
    fd = _open(files, path)
    version = Container(files, fd).version()
    if version != abi.API_VERSION:
        raise PassthroughError(
            "VFIO_GET_API_VERSION", path, 0, detail=f"version {version}", hint="luod speaks 0"
        )
    return fd


def open_group(files: DeviceFiles, number: int) -> int:
    """Open an IOMMU group; return the fd, which the caller owns. EBUSY when somebody else has it."""
    return _open(files, f"{abi.GROUPS}/{number}")


def _open(files: DeviceFiles, path: str) -> int:
    try:
        return files.open(path)
    except OSError as error:
        raise passthrough_error("open vfio", path, error) from error


class Container:
    """An address space of type 1. The fd stays the caller's."""

    def __init__(self, files: DeviceFiles, fd: int, *, name: str = CONTAINER) -> None:
        self._files = files
        self.fd = fd
        self.name = name

    def _call(self, operation: str, argument: bytearray | int = 0, about: str = "") -> int:
        try:
            return self._files.ioctl(self.fd, abi.REQUESTS[operation], argument)
        except OSError as error:
            raise passthrough_error(operation, f"{self.name} {about}".rstrip(), error) from error

    def version(self) -> int:
        """VFIO_GET_API_VERSION."""
        return self._call("VFIO_GET_API_VERSION")

    def has_type1v2(self) -> bool:
        """Say whether the kernel has the type 1 IOMMU, version 2."""
        return bool(self._call("VFIO_CHECK_EXTENSION", abi.TYPE1v2_IOMMU))

    def set_type1v2(self) -> None:
        """Give the container its IOMMU. A group must be in it by then."""
        self._call("VFIO_SET_IOMMU", abi.TYPE1v2_IOMMU)

    def page_sizes(self) -> int:
        """Return the page sizes of the IOMMU, one bit each."""
        buf = abi.S_TYPE1_INFO.pack()
        self._call("VFIO_IOMMU_GET_INFO", buf)
        return abi.S_TYPE1_INFO.get(buf, "iova_pgsizes")

    def map_dma(self, address: int, iova: int, length: int, *, writable: bool = True) -> None:
        """Let devices reach memory of this process, by its virtual address."""
        flags = abi.DMA_MAP_READ | (abi.DMA_MAP_WRITE if writable else 0)
        buf = abi.S_TYPE1_MAP.pack(flags=flags, vaddr=address, iova=iova, size=length)
        self._call("VFIO_IOMMU_MAP_DMA", buf, f"{iova:#x}+{length:#x}")

    def unmap_dma(self, iova: int, length: int) -> int:
        """Take mappings away; return how many bytes were mapped."""
        buf = abi.S_TYPE1_UNMAP.pack(iova=iova, size=length)
        self._call("VFIO_IOMMU_UNMAP_DMA", buf, f"{iova:#x}+{length:#x}")
        return abi.S_TYPE1_UNMAP.get(buf, "size")


class Group:
    """An IOMMU group. The fd stays the caller's."""

    def __init__(self, files: DeviceFiles, fd: int, *, name: str) -> None:
        self._files = files
        self.fd = fd
        self.name = name

    def _call(self, operation: str, argument: bytearray | int = 0, fds: tuple[int, ...] = ()) -> int:
        try:
            return self._files.ioctl(self.fd, abi.REQUESTS[operation], argument, fds=fds)
        except OSError as error:
            raise passthrough_error(operation, self.name, error) from error

    def status(self) -> GroupStatus:
        """VFIO_GROUP_GET_STATUS."""
        buf = abi.S_GROUP_STATUS.pack()
        self._call("VFIO_GROUP_GET_STATUS", buf)
        flags = abi.S_GROUP_STATUS.get(buf, "flags")
        return GroupStatus(bool(flags & abi.GROUP_VIABLE), bool(flags & abi.GROUP_CONTAINER_SET))

    def set_container(self, container: int) -> None:
        """Put the group into a container."""
        self._call("VFIO_GROUP_SET_CONTAINER", bytearray(container.to_bytes(4, "little", signed=True)), (0,))

    def unset_container(self) -> None:
        """Take the group out again; EBUSY while a device fd is open."""
        self._call("VFIO_GROUP_UNSET_CONTAINER")

    def device(self, address: str) -> int:
        """Return a new fd of a device of the group, by its PCI address; it is the caller's, and works at once."""
        return self._call("VFIO_GROUP_GET_DEVICE_FD", bytearray(address.encode("ascii") + b"\0"))
