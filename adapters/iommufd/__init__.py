# SPDX-License-Identifier: Apache-2.0
"""iommufd: I/O address spaces of devices, what a VMM asks of /dev/iommu."""
