# SPDX-License-Identifier: Apache-2.0
"""A driver of QEMU's `edu` device over VFIO: its DMA engine copies memory into a buffer of the device and back, and interrupts.

Registers in region 0 (docs/specs/edu.rst of QEMU): 0x24 interrupt status, 0x64 acknowledge, 0x80 source, 0x88 destination, 0x90 count,
0x98 command (1 start, 2 from the device to memory, 4 interrupt when done). The buffer: 4 KiB at 0x40000. Addresses of memory have 28 bits.
"""

from __future__ import annotations

import os
import select

from luod.adapters.vfio.device import VfioDevice

IDENTITY = 0x010000ED
BUFFER = 0x40000
PAGE = 4096
PATIENCE_S = 20.0


class Edu:
    """The device, bound, attached, on the bus, with its MSI on `eventfd`."""

    def __init__(self, device: VfioDevice, eventfd: int) -> None:
        self.device = device
        self.eventfd = eventfd

    def identity(self) -> int:
        return int.from_bytes(self.device.read(0, 0, 4), "little")

    def _set(self, register: int, value: int, size: int = 8) -> None:
        self.device.write(0, register, value.to_bytes(size, "little"))

    def _transfer(self, source: int, target: int, command: int) -> None:
        self._set(0x80, source)
        self._set(0x88, target)
        self._set(0x90, PAGE)
        self._set(0x98, command | 1 | 4)
        if not select.select([self.eventfd], [], [], PATIENCE_S)[0]:
            raise AssertionError("the transfer ended without an interrupt")
        os.eventfd_read(self.eventfd)
        status = int.from_bytes(self.device.read(0, 0x24, 4), "little")
        self._set(0x64, status, 4)
        if int.from_bytes(self.device.read(0, 0x98, 8), "little") & 1:
            raise AssertionError("the transfer is not over")

    def copy(self, source: int, target: int) -> None:
        """Have the device read a page of memory at one address, and write it at another."""
        while select.select([self.eventfd], [], [], 0)[0]:
            os.eventfd_read(self.eventfd)  # the trigger of a restore plan
        self._transfer(source, BUFFER, 0)
        self._transfer(BUFFER, target, 2)


def checked_copy(edu: Edu, memory: int, iova: int, seed: bytes) -> int:
    """Let the device copy the first page of memory to the second; return how many bytes arrived."""
    wanted = (seed * PAGE)[:PAGE]
    os.pwrite(memory, wanted, 0)
    os.pwrite(memory, bytes(PAGE), PAGE)
    edu.copy(iova, iova + PAGE)
    if os.pread(memory, PAGE, PAGE) != wanted:
        raise AssertionError("the device did not write what it had read")
    return PAGE
