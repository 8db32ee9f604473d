# SPDX-License-Identifier: Apache-2.0
"""The two ioctls of an iommufd that are proposed for live update and are in no released kernel (`adapters.proposed`).

Linux 7.3 answers ENOTTY to the first. Failures are `PassthroughError`s.
"""

from __future__ import annotations

from .. import proposed
from ..chardev import DeviceFiles
from ..passthrough_errors import passthrough_error
from . import abi


def _call(files: DeviceFiles, fd: int, name: str, buf: bytearray, about: str) -> bytearray:
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
