# SPDX-License-Identifier: Apache-2.0
"""Request numbers and structs of /dev/iommu, from include/uapi/linux/iommufd.h of Linux 7.3.

All numbers are `_IO(';', nr)`, `0x3B00 | nr`. Every struct begins with its u32 `size`; a kernel takes a longer struct than it knows when
the rest is zero (E2BIG otherwise), refuses one that is too short (EINVAL), and answers ENOTTY to a number that it does not know.
`tests/vfio/test_abi.py` has a C compiler compare all of this with the header.
"""

from __future__ import annotations

from ..cstruct import CStruct

PATH = "/dev/iommu"

REQUESTS = {
    "IOMMU_DESTROY": 0x3B80,
    "IOMMU_IOAS_ALLOC": 0x3B81,
    "IOMMU_IOAS_COPY": 0x3B83,
    "IOMMU_IOAS_IOVA_RANGES": 0x3B84,
    "IOMMU_IOAS_MAP": 0x3B85,
    "IOMMU_IOAS_UNMAP": 0x3B86,
    "IOMMU_HWPT_ALLOC": 0x3B89,
    "IOMMU_GET_HW_INFO": 0x3B8A,
    "IOMMU_HWPT_GET_DIRTY_BITMAP": 0x3B8C,
    "IOMMU_IOAS_MAP_FILE": 0x3B8F,
    "IOMMU_IOAS_CHANGE_PROCESS": 0x3B92,
}
"""Name in the header -> number."""

DESTROY = REQUESTS["IOMMU_DESTROY"]
IOAS_ALLOC = REQUESTS["IOMMU_IOAS_ALLOC"]
IOAS_COPY = REQUESTS["IOMMU_IOAS_COPY"]
IOAS_IOVA_RANGES = REQUESTS["IOMMU_IOAS_IOVA_RANGES"]
IOAS_MAP = REQUESTS["IOMMU_IOAS_MAP"]
IOAS_UNMAP = REQUESTS["IOMMU_IOAS_UNMAP"]
HWPT_ALLOC = REQUESTS["IOMMU_HWPT_ALLOC"]
GET_HW_INFO = REQUESTS["IOMMU_GET_HW_INFO"]
IOAS_MAP_FILE = REQUESTS["IOMMU_IOAS_MAP_FILE"]
IOAS_CHANGE_PROCESS = REQUESTS["IOMMU_IOAS_CHANGE_PROCESS"]

S_DESTROY = CStruct("iommu_destroy", "u32 size", "u32 id")
S_IOAS_ALLOC = CStruct("iommu_ioas_alloc", "u32 size", "u32 flags", "u32 out_ioas_id")
S_IOVA_RANGE = CStruct("iommu_iova_range", "u64 start", "u64 last")
S_IOAS_IOVA_RANGES = CStruct(
    "iommu_ioas_iova_ranges",
    "u32 size", "u32 ioas_id", "u32 num_iovas", "u32 __reserved", "u64 allowed_iovas", "u64 out_iova_alignment",
)  # fmt: skip
S_IOAS_MAP = CStruct(
    "iommu_ioas_map",
    "u32 size", "u32 flags", "u32 ioas_id", "u32 __reserved", "u64 user_va", "u64 length", "u64 iova",
)  # fmt: skip
S_IOAS_MAP_FILE = CStruct(
    "iommu_ioas_map_file",
    "u32 size", "u32 flags", "u32 ioas_id", "s32 fd", "u64 start", "u64 length", "u64 iova",
)  # fmt: skip
S_IOAS_COPY = CStruct(
    "iommu_ioas_copy",
    "u32 size", "u32 flags", "u32 dst_ioas_id", "u32 src_ioas_id", "u64 length", "u64 dst_iova", "u64 src_iova",
)  # fmt: skip
S_IOAS_UNMAP = CStruct("iommu_ioas_unmap", "u32 size", "u32 ioas_id", "u64 iova", "u64 length")
S_HWPT_ALLOC = CStruct(
    "iommu_hwpt_alloc",
    "u32 size", "u32 flags", "u32 dev_id", "u32 pt_id", "u32 out_hwpt_id", "u32 __reserved", "u32 data_type",
    "u32 data_len", "u64 data_uptr", "u32 fault_id", "u32 __reserved2",
)  # fmt: skip
S_HW_INFO = CStruct(
    "iommu_hw_info",
    "u32 size", "u32 flags", "u32 dev_id", "u32 data_len", "u64 data_uptr", "u32 out_data_type",
    "u8 out_max_pasid_log2", "pad[3] __reserved", "u64 out_capabilities",
)  # fmt: skip
S_HWPT_GET_DIRTY_BITMAP = CStruct(
    "iommu_hwpt_get_dirty_bitmap",
    "u32 size", "u32 hwpt_id", "u32 flags", "u32 __reserved", "u64 iova", "u64 length", "u64 page_size", "u64 data",
)  # fmt: skip
S_IOAS_CHANGE_PROCESS = CStruct("iommu_ioas_change_process", "u32 size", "u32 __reserved")

STRUCTS = (
    S_DESTROY, S_IOAS_ALLOC, S_IOVA_RANGE, S_IOAS_IOVA_RANGES, S_IOAS_MAP, S_IOAS_MAP_FILE, S_IOAS_COPY, S_IOAS_UNMAP,
    S_HWPT_ALLOC, S_HW_INFO, S_HWPT_GET_DIRTY_BITMAP, S_IOAS_CHANGE_PROCESS,
)  # fmt: skip

CONSTANTS = {
    "IOMMU_IOAS_MAP_FIXED_IOVA": 1,
    "IOMMU_IOAS_MAP_WRITEABLE": 2,
    "IOMMU_IOAS_MAP_READABLE": 4,
    "IOMMU_HWPT_ALLOC_NEST_PARENT": 1,
    "IOMMU_HWPT_ALLOC_DIRTY_TRACKING": 2,
    "IOMMU_HW_CAP_DIRTY_TRACKING": 1,
    "IOMMU_HW_INFO_TYPE_NONE": 0,
    "IOMMU_HW_INFO_TYPE_INTEL_VTD": 1,
    "IOMMU_HW_INFO_TYPE_ARM_SMMUV3": 2,
    "IOMMU_HW_INFO_TYPE_AMD": 4,
}
"""Flags and values by their names in the header."""

MAP_FIXED_IOVA = CONSTANTS["IOMMU_IOAS_MAP_FIXED_IOVA"]
MAP_WRITEABLE = CONSTANTS["IOMMU_IOAS_MAP_WRITEABLE"]
MAP_READABLE = CONSTANTS["IOMMU_IOAS_MAP_READABLE"]
HWPT_ALLOC_NEST_PARENT = CONSTANTS["IOMMU_HWPT_ALLOC_NEST_PARENT"]
HWPT_ALLOC_DIRTY_TRACKING = CONSTANTS["IOMMU_HWPT_ALLOC_DIRTY_TRACKING"]
HW_CAP_DIRTY_TRACKING = CONSTANTS["IOMMU_HW_CAP_DIRTY_TRACKING"]

HW_TYPES = {
    CONSTANTS["IOMMU_HW_INFO_TYPE_NONE"]: "none",
    CONSTANTS["IOMMU_HW_INFO_TYPE_INTEL_VTD"]: "intel-vtd",
    CONSTANTS["IOMMU_HW_INFO_TYPE_ARM_SMMUV3"]: "arm-smmuv3",
    CONSTANTS["IOMMU_HW_INFO_TYPE_AMD"]: "amd",
}
"""`out_data_type` of GET_HW_INFO in words."""
