# SPDX-License-Identifier: Apache-2.0
"""Passthrough devices for lab machines: an Intel IOMMU and emulated PCI devices that the guest binds to vfio-pci.

    Machine(kernel, directory, board=BOARD, devices=QEMU_OPTIONS)   with boots whose `arguments` hold ARGUMENTS

QEMU's IOMMU has no interrupt remapping here (software emulation has no split irqchip), so the guest must be told that unsafe interrupts
will do. `edu` (docs/specs/edu.rst of QEMU) is a device made for teaching: its DMA engine copies between the bus and a buffer of its own.
"""

from __future__ import annotations

from .script import DEFAULT_ARGUMENTS

BOARD = "q35"
ARGUMENTS = f"{DEFAULT_ARGUMENTS} intel_iommu=on iommufd.allow_unsafe_interrupts=1 vfio_iommu_type1.allow_unsafe_interrupts=1"

EDU = "0000:00:10.0"
EDU_2 = "0000:00:11.0"
NVME = "0000:00:12.0"
NETWORK = "0000:00:13.0"
IGB = "0000:01:00.0"
"""It has virtual functions, whose numbers do not fit on the root bus: it sits behind a port of its own."""

QEMU_OPTIONS = (
    "-device", "intel-iommu,intremap=off,aw-bits=48",
    "-device", "edu,addr=0x10",
    "-device", "edu,addr=0x11",
    "-blockdev", "null-co,node-name=nothing,size=1048576",
    "-device", "nvme,drive=nothing,serial=luod,addr=0x12",
    "-device", "virtio-net-pci,addr=0x13,iommu_platform=on,disable-legacy=on,romfile=",
    "-device", "pcie-root-port,id=port1,addr=0x14,chassis=1,slot=1",
    "-device", "igb,bus=port1,romfile=",
)  # fmt: skip
