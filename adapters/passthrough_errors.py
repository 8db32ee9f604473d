# SPDX-License-Identifier: Apache-2.0
"""What the kernel refuses of iommufd and VFIO, by name.

    KernelError              liveupdate/errors.py: .errno, .operation, .subject
      PassthroughError
        NotBoundToVfio       the device belongs to another driver, or is gone
        TakenElsewhere       somebody else has the device, its group, or the address range
        NotPermitted         rights, limits, or an interrupt remapping that is not there
        NoSuchObject         an id that this iommufd does not have
        WrongOrder           a call before the one that it needs
        MappingRefused       memory that cannot be mapped there or like this
        TooOld               this kernel does not know the call
        NotMerged            no released kernel knows the call; it was not made

An errno means different things on different calls, so the class is chosen by operation and errno together
(drivers/vfio/device_cdev.c, vfio_main.c, group.c, pci/vfio_pci_core.c; drivers/iommu/iommufd of Linux 7.3).
"""

from __future__ import annotations

import errno as codes

from .liveupdate.errors import KernelError


class PassthroughError(KernelError):
    """A call on a passthrough device or its address space failed."""


class NotBoundToVfio(PassthroughError):
    """The device is not in the hands of vfio-pci, or is gone."""


class TakenElsewhere(PassthroughError):
    """Somebody else holds it."""


class NotPermitted(PassthroughError):
    """This process may not, or the host is not set up so that anybody may."""


class NoSuchObject(PassthroughError):
    """An id or a range that is not there."""


class WrongOrder(PassthroughError):
    """A call that another one must come before, or that may come only once."""


class MappingRefused(PassthroughError):
    """The memory cannot be mapped there, or like this."""


class TooOld(PassthroughError):
    """This kernel does not know the call."""


class NotMerged(PassthroughError):
    """A call that is only proposed (`adapters.proposed`), on a kernel that may have given its number to another. It was not made."""


_Row = tuple[type[PassthroughError], str]

_TAKEN = "find the holder with `fuser -v` on its node in /dev/vfio, and end it"
_MEMLOCK = "raise RLIMIT_MEMLOCK (LimitMEMLOCK= of the unit) above the size of all guest memory: every mapped page is pinned"
_UNSAFE = (
    "without interrupt remapping the kernel refuses: turn it on in the firmware, or take the risk with "
    "iommufd.allow_unsafe_interrupts=1 (type 1: vfio_iommu_type1.allow_unsafe_interrupts=1) on the command line; else "
    "run as a user who may use the device"
)
_DRIVER = "bind the device to vfio-pci (driver_override), then look up its node again"
_NO_IOMMUFD = "this kernel has no iommufd (CONFIG_IOMMUFD, Linux 6.2); use the legacy groups"
_NO_CDEV = "the device is not bound to vfio-pci, or this kernel has no VFIO cdevs (CONFIG_VFIO_DEVICE_CDEV, Linux 6.6)"

_BY_OPERATION: dict[tuple[str, int], _Row] = {
    ("open iommufd", codes.ENOENT): (TooOld, _NO_IOMMUFD),
    ("open iommufd", codes.ENODEV): (TooOld, _NO_IOMMUFD),
    ("open iommufd", codes.EACCES): (NotPermitted, "give this user /dev/iommu (group of the node)"),
    ("open vfio", codes.ENOENT): (NotBoundToVfio, _NO_CDEV),
    ("open vfio", codes.ENODEV): (NotBoundToVfio, _DRIVER),
    ("open vfio", codes.ENXIO): (NotBoundToVfio, _DRIVER),
    ("open vfio", codes.EBUSY): (TakenElsewhere, _TAKEN),
    ("open vfio", codes.EACCES): (NotPermitted, "give this user the node in /dev/vfio"),
    ("open vfio", codes.EPERM): (NotPermitted, "give this user the node in /dev/vfio"),
    ("IOMMU_IOAS_MAP_FILE", codes.EEXIST): (
        MappingRefused,
        "something is mapped in that range already: unmap it first",
    ),
    ("IOMMU_IOAS_MAP", codes.EEXIST): (
        MappingRefused,
        "something is mapped in that range already: unmap it first",
    ),
    ("IOMMU_IOAS_MAP_FILE", codes.ENOMEM): (NotPermitted, _MEMLOCK),
    ("IOMMU_IOAS_MAP", codes.ENOMEM): (NotPermitted, _MEMLOCK),
    ("IOMMU_IOAS_MAP_FILE", codes.EPERM): (
        NotPermitted,
        "the memfd was opened read-only, or is sealed against writing",
    ),
    ("IOMMU_IOAS_MAP_FILE", codes.EBADF): (MappingRefused, "pass an open memfd"),
    ("IOMMU_IOAS_MAP_FILE", codes.EINVAL): (
        MappingRefused,
        "only memfds can be mapped, whole pages of them, inside the file, at an address that the device can reach and "
        "that is not reserved (see IOVA_RANGES)",
    ),
    ("IOMMU_IOAS_MAP_FILE", codes.EOPNOTSUPP): (
        MappingRefused,
        "this kind of file cannot be mapped: pass a memfd",
    ),
    ("IOMMU_IOAS_MAP_FILE", codes.ENOTTY): (TooOld, "MAP_FILE came with Linux 6.13: map by address instead"),
    ("IOMMU_IOAS_CHANGE_PROCESS", codes.EINVAL): (
        MappingRefused,
        "something is mapped by address: only what MAP_FILE mapped can change hands",
    ),
    ("IOMMU_IOAS_CHANGE_PROCESS", codes.ENOTTY): (TooOld, "CHANGE_PROCESS came with Linux 6.13"),
    ("IOMMU_IOAS_UNMAP", codes.ENOENT): (
        NoSuchObject,
        "a mapping is unmapped whole, with the range it was made with",
    ),
    ("IOMMU_IOAS_UNMAP", codes.EBUSY): (TakenElsewhere, "the device driver still uses the range"),
    ("IOMMU_DESTROY", codes.EBUSY): (WrongOrder, "detach the devices that use it first"),
    ("IOMMU_HWPT_ALLOC", codes.EOPNOTSUPP): (MappingRefused, "this IOMMU cannot do what the flags ask for"),
    ("VFIO_DEVICE_BIND_IOMMUFD", codes.EINVAL): (
        WrongOrder,
        "the device is bound already, through this fd or another one (only closing that undoes it), or the fd is that of a "
        "legacy group",
    ),
    ("VFIO_DEVICE_BIND_IOMMUFD", codes.EBUSY): (
        TakenElsewhere,
        "a device of its IOMMU group has another owner, such as a program that uses the legacy group: "
        + _TAKEN,
    ),
    ("VFIO_DEVICE_BIND_IOMMUFD", codes.EPERM): (NotPermitted, _UNSAFE),
    ("VFIO_DEVICE_BIND_IOMMUFD", codes.EBADF): (WrongOrder, "open /dev/iommu first"),
    ("VFIO_DEVICE_BIND_IOMMUFD", codes.EBADFD): (WrongOrder, "the fd to bind to must be one of /dev/iommu"),
    ("VFIO_DEVICE_BIND_IOMMUFD", codes.ENODEV): (NotBoundToVfio, _DRIVER),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", codes.EINVAL): (
        WrongOrder,
        "bind the device first, and to the iommufd that has this address space; a mapping may lie where the device "
        "cannot reach",
    ),
    ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", codes.EADDRINUSE): (
        MappingRefused,
        "a mapping lies in a range that is reserved for this device (see IOVA_RANGES): map that memory elsewhere",
    ),
    ("VFIO_DEVICE_RESET", codes.EINVAL): (
        PassthroughError,
        "this device cannot be reset by itself; quiet it through its own registers",
    ),
    ("VFIO_DEVICE_SET_IRQS", codes.EBADF): (WrongOrder, "pass open eventfds"),
    ("VFIO_DEVICE_SET_IRQS", codes.EINVAL): (
        WrongOrder,
        "one kind of interrupt at a time: turn the other off first, and ask GET_IRQ_INFO how many there are",
    ),
    ("VFIO_GROUP_SET_CONTAINER", codes.EPERM): (
        TakenElsewhere,
        "not every device of the IOMMU group is bound to vfio-pci (or to nothing): bind them all",
    ),
    ("VFIO_SET_IOMMU", codes.EPERM): (NotPermitted, _UNSAFE),
    ("VFIO_GROUP_GET_DEVICE_FD", codes.ENODEV): (NotBoundToVfio, _DRIVER),
    ("VFIO_IOMMU_MAP_DMA", codes.ENOMEM): (NotPermitted, _MEMLOCK),
    ("VFIO_IOMMU_MAP_DMA", codes.EEXIST): (
        MappingRefused,
        "something is mapped in that range already: unmap it first",
    ),
}

_BY_ERRNO: dict[int, _Row] = {
    codes.ENODEV: (NotBoundToVfio, _DRIVER),
    codes.EBUSY: (TakenElsewhere, _TAKEN),
    codes.ENOTTY: (TooOld, "this kernel does not know the call, or the fd is of another kind"),
    codes.EPERM: (NotPermitted, _UNSAFE),
    codes.EACCES: (NotPermitted, "give this user the node"),
    codes.EIO: (
        PassthroughError,
        "the device does not answer: it is in a low-power state, its memory decoding is off, or it is broken",
    ),
    codes.EMFILE: (PassthroughError, "raise RLIMIT_NOFILE (LimitNOFILE= of the unit); nothing was touched"),
}


def passthrough_error(operation: str, subject: str, error: OSError) -> PassthroughError:
    """Turn the errno of a failed call into the error that says what it means there and what to do next."""
    errno = error.errno or codes.EIO
    row = _BY_OPERATION.get((operation, errno)) or _BY_ERRNO.get(errno)
    if row is None and operation.startswith("IOMMU_") and errno == codes.ENOENT:
        row = (NoSuchObject, "this iommufd has no object or no mapping of that number")
    if row is None and errno == codes.EINVAL and operation.startswith("VFIO_DEVICE_"):
        row = (WrongOrder, "bind the device to an iommufd first; until then it answers nothing else")
    kind, hint = row or (PassthroughError, "see the kernel log")
    return kind(operation, subject, errno, hint=hint)
