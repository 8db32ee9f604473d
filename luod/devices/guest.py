# SPDX-License-Identifier: Apache-2.0
"""What a guest has of passthrough, as data, and the plans that follow from it.

    memory 0x10   <- maps -   space 0x20   <- attached -   device 0x30
    (a memfd)                 (an iommufd with one I/O address space)   (a VFIO cdev)

Each has a token of the session. Where the kernel carries a kind, its token is preserved and its plan begins with RETRIEVE_FD; where it
does not, the plan begins with opening anew, and the resource says so by its kind: `iommufd-reopened`, `vfio-reattached`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from ..adapters.vfio.abi import IRQ_NAMES
from ..states.events import Devices, Resource, Step


class Memory(msgspec.Struct, frozen=True):
    """Guest memory in a memfd of `size` bytes. `checksum` is the caller's, kept with it."""

    token: str
    size: int
    label: str = ""
    checksum: str = ""


class Mapping(msgspec.Struct, frozen=True):
    """`length` bytes of the memory of that token, from `start` on, which devices reach at `iova`. Bytes, whole pages."""

    memory: str
    iova: int
    length: int
    start: int = 0
    writable: bool = True


class Space(msgspec.Struct, frozen=True):
    """An iommufd with one I/O address space. With `own_tables` each of its devices has a page table of its own (HWPT_ALLOC).

    A kernel that carries devices carries page tables: those of a space without `own_tables` cannot be. To mark them takes a call that is
    only proposed, so that every other kernel refuses `own_tables` (`NotMerged`).
    """

    token: str
    mappings: tuple[Mapping, ...] = ()
    label: str = ""
    own_tables: bool = False


class Irqs(msgspec.Struct, frozen=True):
    """Interrupts that are on: their kind (abi.INTX, MSI or MSIX) and how many vectors."""

    index: int
    vectors: int = 1

    @property
    def name(self) -> str:
        """The kind in words."""
        return IRQ_NAMES.get(self.index, str(self.index))


class Facts(msgspec.Struct, frozen=True):
    """What tells a device from another at the same address: ids ("8086:10c9"), sizes of regions, numbers of interrupts."""

    identity: str
    regions: tuple[int, ...]
    irqs: tuple[int, ...]


class Device(msgspec.Struct, frozen=True):
    """A PCI device bound to the space of that token. With `take` the plan itself gives it to vfio-pci, which needs root."""

    token: str
    address: str
    space: str
    irqs: tuple[Irqs, ...] = ()
    bus_master: bool = True
    label: str = ""
    take: bool = False
    facts: Facts | None = None


class Guest(msgspec.Struct, frozen=True):
    """All of it."""

    memories: tuple[Memory, ...] = ()
    spaces: tuple[Space, ...] = ()
    devices: tuple[Device, ...] = ()

    def devices_of(self, space: Space) -> list[Device]:
        """Return the devices of a space, in their order: their place is how an iommufd is asked for them."""
        return [one for one in self.devices if one.space == space.token]


def plans(guest: Guest, devices: Devices) -> list[Resource]:
    """Return the inventory: memories, then spaces, then devices, each with its restore plan."""
    return [*(memory_resource(one) for one in guest.memories), *device_plans(guest, devices)]


def as_fields(resources: Iterable[Resource]) -> list[dict[str, Any]]:
    """Return an inventory as PRESERVED takes it."""
    return [msgspec.to_builtins(one) for one in resources]


def from_fields(fields: Iterable[Any]) -> list[Resource]:
    """Read an inventory as CLAIM brings it."""
    return msgspec.convert(list(fields), list[Resource])


def memory_resource(memory: Memory) -> Resource:
    """Return a memory with its plan."""
    args: dict[str, Any] = {"memory": memory.token, "size": memory.size}
    plan = (Step("memfd.retrieve", {"memory": memory.token}), Step("memfd.check", args))
    return Resource(memory.token, "memfd", memory.size, memory.label, memory.checksum, plan)


def device_plans(guest: Guest, devices: Devices) -> list[Resource]:
    """Return spaces and devices with their plans, which also are what sets them up the first time (with "reattach")."""
    carried = devices == "preserve"
    spaces = [
        Resource(
            one.token,
            "iommufd" if carried else "iommufd-reopened",
            label=one.label,
            plan=tuple(_space_steps(one, carried)),
        )
        for one in guest.spaces
    ]
    by_token = {one.token: one for one in guest.spaces}
    return spaces + [
        Resource(
            one.token,
            "vfio" if carried else "vfio-reattached",
            label=one.label or one.address,
            plan=tuple(_device_steps(guest, one, by_token[one.space], carried)),
        )
        for one in guest.devices
    ]


def quieting(guest: Guest) -> list[Resource]:
    """Return what is done to each device at the freeze: no interrupts, awake, off the bus, and reset where it can be."""
    steps = ("vfio.irqs_off", "vfio.wake", "vfio.bus_master_off", "vfio.reset")
    return [
        Resource(
            one.token,
            "vfio",
            label=one.label or one.address,
            plan=tuple(Step(step, _named(one)) for step in steps),
        )
        for one in guest.devices
    ]


def _from(token: str, step: str, field: str) -> dict[str, str]:
    return {"from": f"{token}/{step}", "field": field}


def _named(device: Device) -> dict[str, Any]:
    return {"device": device.token, "address": device.address}


def _space_steps(space: Space, carried: bool) -> list[Step]:
    it = {"iommufd": space.token}
    ioas = _from(space.token, "iommufd.ioas_alloc", "ioas_id")
    maps = [
        Step(
            f"iommufd.map_file#{one.iova:#x}",
            {
                **it, "ioas_id": ioas, "memory": one.memory, "start": one.start, "length": one.length,
                "iova": one.iova, "writable": one.writable,
            },
        )
        for one in space.mappings
    ]  # fmt: skip
    begin = Step("iommufd.retrieve" if carried else "iommufd.open", it)
    return [begin, Step("iommufd.ioas_alloc", it), *maps, Step("iommufd.change_process", it)]


def _device_steps(guest: Guest, device: Device, space: Space, carried: bool) -> list[Step]:
    it, token = _named(device), device.token
    place = guest.devices_of(space).index(device)
    ioas = _from(space.token, "iommufd.ioas_alloc", "ioas_id")
    steps = [Step("pci.take", {"address": device.address})] if device.take else []
    steps += [
        Step("vfio.retrieve" if carried else "vfio.open", it),
        Step("vfio.bind", {**it, "iommufd": space.token, "place": place}),
    ]
    if device.facts is not None:
        steps.append(Step("vfio.check", {**it, "facts": msgspec.to_builtins(device.facts)}))
    table = ioas
    if carried:
        # Its page table came along: it is taken up again, and given up by attaching the new one.
        restored = {"iommufd": space.token, "table": token, "place": 2 * place}
        steps.append(Step("iommufd.hwpt_restore", restored))
    if space.own_tables:
        made = {"iommufd": space.token, "ioas_id": ioas, "place": 2 * place + 1 if carried else place}
        made["device_id"] = _from(token, "vfio.bind", "device_id")
        steps.append(Step("iommufd.hwpt_alloc", made))
        table = _from(token, "iommufd.hwpt_alloc", "hwpt_id")
    steps.append(Step("vfio.attach", {**it, "page_table": table}))
    if space.own_tables:
        steps.append(
            Step("iommufd.mark_preserve", {"iommufd": space.token, "hwpt_id": table, "table": token})
        )
    for irqs in device.irqs:
        asked = {**it, "index": irqs.index, "vectors": irqs.vectors}
        steps.append(Step(f"vfio.irqs#{irqs.name}", asked))
    if device.bus_master:
        steps.append(Step("vfio.bus_master", it))
    for irqs in device.irqs:
        asked = {**it, "index": irqs.index, "vectors": irqs.vectors}
        steps.append(Step(f"vfio.trigger#{irqs.name}", asked))
    return steps
