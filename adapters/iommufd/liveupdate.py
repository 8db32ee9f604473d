# SPDX-License-Identifier: Apache-2.0
"""The two ioctls of an iommufd that are proposed for live update and are in no released kernel (`adapters.proposed`).

They are made only where the kernel is known to give these numbers that meaning (`DeviceFiles.speaks_proposed`): any other may have
given them to a call that does something else. Failures are `PassthroughError`s.
"""

from __future__ import annotations

import errno
import os

from .. import proposed
from ..chardev import DeviceFiles
from ..passthrough_errors import NotMerged, passthrough_error
from . import abi

REATTACH = 'leave out own_tables and subscribe with devices="reattach": memory is carried, devices are reset and re-attached'


def require(files: DeviceFiles, name: str, subject: str, *, hint: str = REATTACH) -> None:
    """See that a proposed call may be made here. Raises `NotMerged`; nothing but the machine itself is asked."""
    try:
        speaks = files.speaks_proposed()
    except OSError as error:
        raise passthrough_error(name, subject, error) from error
    if not speaks:
        raise NotMerged(
            name,
            subject,
            errno.EOPNOTSUPP,
            detail=f"this call is only proposed, no released kernel has it, and Linux {os.uname().release} may use its number "
            "for another",
            hint=hint,
        )


def _call(files: DeviceFiles, fd: int, name: str, buf: bytearray, about: str) -> bytearray:
    require(files, name, f"{abi.PATH} {about}")
    try:
        files.ioctl(fd, proposed.REQUESTS[name], buf)
    except OSError as error:
        raise passthrough_error(name, f"{abi.PATH} {about}", error) from error
    return buf


def mark_preserve(files: DeviceFiles, fd: int, hwpt: int, token: int) -> None:
    """Say that a page table is to be carried by a live update, under a token. Once; it cannot be taken back. EADDRINUSE, ENOENT."""
    buf = proposed.S_HWPT_MARK_PRESERVE.pack(hwpt_id=hwpt, hwpt_token=token)
    _call(files, fd, "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE", buf, f"page table {hwpt} token {token:#x}")


def restore_hwpt(files: DeviceFiles, fd: int, token: int) -> int:
    """Take up a page table that came with a live update; return its id. Once. ENOENT; ENODEV while one of its devices is not bound."""
    buf = proposed.S_HWPT_RESTORE.pack(hwpt_token=token)
    _call(files, fd, "IOMMU_HWPT_LU_RESTORE", buf, f"page table token {token:#x}")
    return proposed.S_HWPT_RESTORE.get(buf, "pt_id")
