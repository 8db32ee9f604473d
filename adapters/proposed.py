# SPDX-License-Identifier: Apache-2.0
"""What is proposed upstream for live update of iommufd and VFIO and is NOT merged: every number and string of it, and only here.

No released kernel knows any of this; Linux 7.3 answers ENOTTY and ENOENT, a later one may answer otherwise. The emulator speaks it when
it is given the plug-ins of `emulator.passthrough`, and says so (`chardev.DeviceFiles.speaks_proposed`); a real kernel is never asked.
On the day the series are merged this file is what has to be compared with the headers.

Sources, and what is certain of it:

- `HWPT_LIVEUPDATE_MARK_PRESERVE`: iommu/iommufd series (v1: 20260203220948.2176157, patch 12; v5: 20260921004834.2601285). The struct is
  as posted. The number is not: the branch used 0x95, which in 7.3 is IOMMU_IOAS_NOIOMMU_GET_PA.
- `HWPT_LU_RESTORE`: an RFC branch before that series, whose cover letter leaves it to a "phase 2". Its fields are those of the RFC; their
  order and the number are ours.
- `IOMMUFD_COMPATIBLE`: the same series, include/linux/kho/abi/iommufd.h. It changes with every version of the data behind it.
- `VFIO_PCI_COMPATIBLE`: vfio/pci series (v5: 20260714151505.3466855), include/linux/kho/abi/vfio_pci.h. Likewise.
- `IMMUTABLE_ERRNO`: iommufd series, drivers/iommu/iommufd/io_pagetable.c.
- `NOT_IN_SESSION_ERRNO`: iommufd series, `liveupdate_get_token_outgoing()` in kernel/liveupdate/luo_file.c.
- `RETRIEVE_PHASE_ONE_ERRNO`: iommufd series, drivers/iommu/iommufd/liveupdate.c.
"""

from __future__ import annotations

import errno

from .cstruct import CStruct

_IOMMUFD_TYPE = ord(";") << 8

# The first numbers that 7.3 leaves free. They stand for whatever the merged header will say.
HWPT_LIVEUPDATE_MARK_PRESERVE = _IOMMUFD_TYPE | 0x96
HWPT_LU_RESTORE = _IOMMUFD_TYPE | 0x97

REQUESTS = {
    "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE": HWPT_LIVEUPDATE_MARK_PRESERVE,
    "IOMMU_HWPT_LU_RESTORE": HWPT_LU_RESTORE,
}
"""Name as posted -> number."""

S_HWPT_MARK_PRESERVE = CStruct(
    "iommu_hwpt_liveupdate_mark_preserve", "u32 size", "u32 hwpt_id", "u64 hwpt_token"
)
"""On an iommufd: this page table is to be carried, under a token that is unique in that iommufd (EADDRINUSE). There is no unmark."""

S_HWPT_RESTORE = CStruct(
    "iommu_hwpt_lu_restore",
    "u32 size", "u32 hwpt_alloc_flags", "u64 hwpt_token", "u32 pt_id", "u32 __reserved",
)  # fmt: skip
"""On a retrieved iommufd: make an object of the page table that came under this token; `pt_id` is its id.

ENOTTY on an iommufd that was not retrieved, ENOENT for a token that did not come or was reclaimed, ENODEV while a device that was
attached to it is not bound to this iommufd.
"""

IOMMUFD_COMPATIBLE = "iommufd-v1"
VFIO_PCI_COMPATIBLE = "vfio-pci-v1"

IMMUTABLE_ERRNO = errno.EBUSY
"""What a map, unmap or replacing attach answers while its address space is preserved."""
NOT_IN_SESSION_ERRNO = errno.ENOENT
"""What PRESERVE_FD answers when what the file depends on is not preserved in the same session."""
RETRIEVE_PHASE_ONE_ERRNO = errno.EOPNOTSUPP
"""What RETRIEVE_FD of an iommufd answers while only "phase 1" is there."""
