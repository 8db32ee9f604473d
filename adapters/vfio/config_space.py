# SPDX-License-Identifier: Apache-2.0
"""The PCI configuration space of a VFIO device: who it is, whether it may use the bus, and its power state.

Offsets and bits are those of the PCI specification, by the names of include/uapi/linux/pci_regs.h.
"""

from __future__ import annotations

from typing import NamedTuple

from . import abi
from .device import VfioDevice

PCI_VENDOR_ID = 0x00
PCI_COMMAND = 0x04
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4
PCI_STATUS = 0x06
PCI_STATUS_CAP_LIST = 0x10
PCI_CAPABILITY_LIST = 0x34
PCI_CAP_ID_PM = 0x01
PCI_PM_CTRL = 4
PCI_PM_CTRL_STATE_MASK = 0x3

_LONGEST_LIST = 48
"""Capabilities that fit between 0x40 and 0xff."""


class Identity(NamedTuple):
    """Vendor and device id."""

    vendor: int
    device: int

    def __str__(self) -> str:
        return f"{self.vendor:04x}:{self.device:04x}"


class ConfigSpace:
    """The configuration space of a bound device."""

    def __init__(self, device: VfioDevice) -> None:
        self._device = device

    def _read(self, offset: int, length: int) -> int:
        return int.from_bytes(self._device.read(abi.CONFIG, offset, length), "little")

    def identity(self) -> Identity:
        """Return who the device is."""
        both = self._read(PCI_VENDOR_ID, 4)
        return Identity(both & 0xFFFF, both >> 16)

    def bus_master(self) -> bool:
        """Say whether the device may begin transfers by itself: DMA, and message-signalled interrupts."""
        return bool(self._read(PCI_COMMAND, 2) & PCI_COMMAND_MASTER)

    def set_bus_master(self, on: bool) -> None:
        """Let the device use the bus (with its memory decoding on, without which its registers do not answer), or stop it."""
        command = self._read(PCI_COMMAND, 2)
        wanted = command | PCI_COMMAND_MASTER | PCI_COMMAND_MEMORY if on else command & ~PCI_COMMAND_MASTER
        self._device.write(abi.CONFIG, PCI_COMMAND, wanted.to_bytes(2, "little"))

    def power_state(self) -> int:
        """Return the power state, 0 (D0, working) to 3 (D3hot); 0 for a device that knows no other."""
        place = self._capability(PCI_CAP_ID_PM)
        return 0 if place is None else self._read(place + PCI_PM_CTRL, 2) & PCI_PM_CTRL_STATE_MASK

    def set_power_state(self, state: int) -> None:
        """Bring the device into a power state; without effect on one that knows no other."""
        place = self._capability(PCI_CAP_ID_PM)
        if place is None:
            return
        control = self._read(place + PCI_PM_CTRL, 2) & ~PCI_PM_CTRL_STATE_MASK
        self._device.write(abi.CONFIG, place + PCI_PM_CTRL, (control | state).to_bytes(2, "little"))

    def _capability(self, wanted: int) -> int | None:
        if not self._read(PCI_STATUS, 2) & PCI_STATUS_CAP_LIST:
            return None
        place = self._read(PCI_CAPABILITY_LIST, 1) & ~3
        for _ in range(_LONGEST_LIST):
            if not place:
                return None
            if self._read(place, 1) == wanted:
                return place
            place = self._read(place + 1, 1) & ~3
        return None
