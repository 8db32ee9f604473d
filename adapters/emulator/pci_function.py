# SPDX-License-Identifier: Apache-2.0
"""A PCI function of the emulated machine: configuration space, power states, interrupts, and the engine of QEMU's `edu` device.

Its registers, in BAR 0 (QEMU, docs/specs/edu.rst):

    0x00 identification    0x04 answers the complement of what was written    0x24 interrupt status    0x60 raise    0x64 acknowledge
    0x80 DMA source        0x88 destination        0x90 bytes        0x98 command: 1 start, 2 towards memory, 4 interrupt when done

The engine's own 4096 bytes are at 0x40000; the other side of a transfer is an I/O address, which the IOMMU translates. A transfer
is complete when the write of the command returns.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from .address_space import AddressSpace, IommuFault
from .handlers import File, Refused

CONFIG_SIZE = 256
BAR_SIZE = 1 << 20
VENDOR, DEVICE, IDENTIFICATION = 0x1234, 0x11E8, 0x010000ED
BUFFER, BUFFER_SIZE = 0x40000, 4096
START, TO_MEMORY, INTERRUPT = 1, 2, 4
DMA_DONE = 0x100

COMMAND, STATUS, CAPABILITIES = 0x04, 0x06, 0x34
MEMORY_SPACE, BUS_MASTER, INTX_DISABLE = 1 << 1, 1 << 2, 1 << 10
_COMMAND_BITS = 0x0547
PM, MSI_CAP = 0x40, 0x50
PM_CONTROL = PM + 4
D0, D3HOT = 0, 3

INTX, MSI, MSIX, ERR, REQ = range(5)
IRQ_COUNTS = {INTX: 1, MSI: 1, MSIX: 0, ERR: 1, REQ: 1}
"""Interrupts by index, as VFIO counts them."""


@dataclass(frozen=True)
class DeviceOption:
    """How a device of the machine is set up: `NAME[,bdf=B][,driver=D][,vf][,noiommu]`.

    `name` is that of its node under /dev/vfio/devices, `driver` what the host binds it to at every boot (empty: nothing), `vf` makes it
    a virtual function, `noiommu` one that no IOMMU translates for.
    """

    name: str
    bdf: str
    driver: str = "vfio-pci"
    vf: bool = False
    noiommu: bool = False

    @classmethod
    def parse(cls, text: str, number: int) -> DeviceOption:
        """Read the option; `number` gives a default address. ValueError."""
        name, *words = text.split(",")
        values = {"bdf": f"0000:00:{number + 4:02x}.0", "driver": "vfio-pci"}
        flags: set[str] = set()
        for word in words:
            key, separator, value = word.partition("=")
            if separator and key in values:
                values[key] = value
            elif word in ("vf", "noiommu"):
                flags.add(word)
            else:
                raise ValueError(f"{text!r}: {word!r} is not bdf=, driver=, vf or noiommu")
        if not name:
            raise ValueError(f"{text!r}: a device needs a name")
        return cls(name, values["bdf"], values["driver"], "vf" in flags, "noiommu" in flags)


class PciFunction:
    """The hardware. What it translates its transfers through (`space`) is set by the IOMMU; the eventfds by the driver.

    `opener` is the open file that has the device, `transfers` counts what its engine moved, `faults` says what it could not move.
    """

    def __init__(self, option: DeviceOption) -> None:
        self.option = option
        self.name = option.name
        self.bdf = option.bdf
        self.space: AddressSpace | None = None
        self.opener: object | None = None
        self.irq_index: int | None = None
        self.vectors: dict[int, list[File | None]] = {}
        self.transfers = 0
        self.faults: list[str] = []
        self.power_on()

    # -- power and reset -------------------------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Come up as after a cold start."""
        config = self.config = bytearray(CONFIG_SIZE)
        for offset, width, value in (
            (0x00, 2, VENDOR), (0x02, 2, DEVICE), (STATUS, 2, 0x10), (0x08, 1, 0x10), (0x0B, 1, 0xFF), (0x2C, 2, 0x1AF4),
            (0x2E, 2, 0x1100), (CAPABILITIES, 1, PM), (0x3D, 1, 1), (PM, 2, MSI_CAP << 8 | 0x01), (PM + 2, 2, 0x0803),
            (MSI_CAP, 2, 0x0005), (MSI_CAP + 2, 2, 0x0080),
        ):  # fmt: skip
            config[offset : offset + width] = value.to_bytes(width, "little")
        self.reset()

    def reset(self) -> None:
        """Reset the engine; the configuration is put back by whoever resets it."""
        self.registers: dict[int, int] = {}
        self.buffer = bytearray(BUFFER_SIZE)
        self.interrupts = 0

    def quiesce(self) -> None:
        """Reset, and leave nothing switched on: no bus mastering, no memory space. INTx stays disabled if it is."""
        self.reset()
        self.command &= INTX_DISABLE

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self.config[COMMAND : COMMAND + 2], "little")

    @command.setter
    def command(self, value: int) -> None:
        self.config[COMMAND : COMMAND + 2] = value.to_bytes(2, "little")

    @property
    def power_state(self) -> int:
        """0 for D0, 3 for D3hot."""
        return self.config[PM_CONTROL] & 3

    @power_state.setter
    def power_state(self, value: int) -> None:
        self.config[PM_CONTROL] = self.config[PM_CONTROL] & ~3 | value

    # -- configuration space ---------------------------------------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """Read configuration space."""
        return bytes(self.config[offset : offset + length])

    def write_config(self, offset: int, data: bytes) -> None:
        """Write the command register and the power state; everything else cannot be written through VFIO."""
        changed = bytearray(self.config)
        changed[offset : offset + len(data)] = data
        self.command = int.from_bytes(changed[COMMAND : COMMAND + 2], "little") & _COMMAND_BITS
        if (changed[PM_CONTROL] & 3) in (D0, D3HOT):
            self.power_state = changed[PM_CONTROL] & 3

    # -- BAR 0 -----------------------------------------------------------------------------------------------------------------

    def _awake(self) -> None:
        if self.power_state != D0 or not self.command & MEMORY_SPACE:
            raise Refused(errno.EIO)

    def read_bar(self, offset: int, length: int) -> bytes:
        """Read registers; EIO while memory space is disabled or the function sleeps."""
        self._awake()
        value = {0x00: IDENTIFICATION, 0x24: self.interrupts}.get(offset, self.registers.get(offset, 0))
        return (value & (1 << 8 * length) - 1).to_bytes(length, "little")

    def write_bar(self, offset: int, data: bytes) -> None:
        """Write a register; EIO as above."""
        self._awake()
        value = int.from_bytes(data, "little")
        match offset:
            case 0x04:
                self.registers[offset] = value ^ 0xFFFFFFFF
            case 0x60:
                self.interrupts |= value
                self._signal()
            case 0x64:
                self.interrupts &= ~value
            case 0x80 | 0x88 | 0x90:
                self.registers[offset] = value
            case 0x98 if value & START:
                self._transfer(value)
            case _:
                pass

    def _transfer(self, command: int) -> None:
        source, target, count = (self.registers.get(at, 0) for at in (0x80, 0x88, 0x90))
        place = (source if command & TO_MEMORY else target) - BUFFER
        try:
            if not self.command & BUS_MASTER:
                raise IommuFault("no bus mastering")
            if not 0 <= place <= place + count <= BUFFER_SIZE:
                raise IommuFault(f"{place + BUFFER:#x} is not in the buffer")
            if self.space is None:
                raise IommuFault("no page table")
            if command & TO_MEMORY:
                self.space.write(target, bytes(self.buffer[place : place + count]))
            else:
                self.buffer[place : place + count] = self.space.read(source, count)
            self.transfers += 1
        except IommuFault as fault:
            self.faults.append(str(fault))
        if command & INTERRUPT:
            self.interrupts |= DMA_DONE
            self._signal()

    # -- interrupts ------------------------------------------------------------------------------------------------------------

    def _signal(self) -> None:
        if self.irq_index is not None:
            self.trigger(self.irq_index, 0)

    def trigger(self, index: int, vector: int) -> None:
        """Signal the eventfd of a vector, if it has one."""
        listeners = self.vectors.get(index, [])
        listener = listeners[vector] if vector < len(listeners) else None
        if listener is not None:
            os.write(listener.fileno(), (1).to_bytes(8, "little"))

    def enable(self, index: int) -> None:
        """Switch a kind of interrupt on, with no eventfds yet."""
        self.vectors[index] = [None] * IRQ_COUNTS[index]
        if index in (INTX, MSI, MSIX):
            self.irq_index = index

    def listen(self, index: int, vector: int, eventfd: File | None) -> None:
        """Set the eventfd of a vector."""
        old = self.vectors[index][vector]
        if old is not None:
            old.close()
        self.vectors[index][vector] = eventfd

    def disable(self, index: int) -> None:
        """Switch a kind of interrupt off."""
        for eventfd in self.vectors.pop(index, []):
            if eventfd is not None:
                eventfd.close()
        if self.irq_index == index:
            self.irq_index = None

    def disable_all(self) -> None:
        """Switch every kind of interrupt off."""
        for index in list(self.vectors):
            self.disable(index)
