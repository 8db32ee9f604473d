# SPDX-License-Identifier: Apache-2.0
"""The steps of plans as effects: each with the call, and with a probe that asks whether it stands without changing anything.

| step | how it is asked for |
| --- | --- |
| memfd.retrieve, iommufd.open, iommufd.retrieve, vfio.open, vfio.retrieve | whether this process, or the keeper, has the fd |
| iommufd.ioas_alloc, vfio.bind, iommufd.hwpt_alloc, iommufd.hwpt_restore | the objects of the iommufd, by kind and in order |
| iommufd.map_file | the range copied onto itself: EEXIST or ENOENT |
| vfio.irqs, vfio.irqs_off | a trigger that is no trigger: EINVAL when off |
| vfio.bus_master, vfio.bus_master_off, vfio.wake | the configuration space |
| pci.take | sysfs |
| memfd.check, vfio.check, vfio.attach, iommufd.mark_preserve, vfio.trigger, vfio.reset | not at all: to do them again changes nothing |
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ..adapters import memfd
from ..adapters.iommufd import liveupdate
from ..adapters.iommufd.device import open_iommufd
from ..adapters.passthrough_errors import PassthroughError, TakenElsewhere, TooOld, WrongOrder
from ..adapters.vfio import abi
from ..adapters.vfio.config_space import ConfigSpace
from ..adapters.vfio.device import VfioDevice, open_device
from ..adapters.vfio.pci import VFIO_PCI
from ..engine.errors import EffectFailed
from ..engine.plan import steps_of
from ..engine.ports import Absent, Done, Effect, Intent, Json, Probe, Unknown
from ..states.events import Resource
from ..states.names import parse_token
from . import rules
from .guest import Facts
from .host import Host, eventfd_name

Args = dict[str, Any]
Result = dict[str, Json]
OBJECT_IDS = range(1, 129)
"""Ids of an iommufd that are asked for: more objects than a guest's plan makes."""


class Step:
    """One kind of step. `repeatable`: it may be made again without being asked for."""

    carried = False

    def __init__(
        self,
        make: Callable[[Args], Result],
        ask: Callable[[Args], Probe] | None = None,
        *,
        repeatable: bool = False,
    ) -> None:
        self.repeatable = repeatable or ask is None
        self._make = make
        self._ask = ask

    def apply(self, intent: Intent) -> Result:
        """Make the call."""
        return self._make(intent.args)

    def probe(self, intent: Intent) -> Probe:
        """Ask whether it stands."""
        return Unknown("making it again changes nothing") if self._ask is None else self._ask(intent.args)


def effects(host: Host) -> dict[str, Effect]:
    """Return the effects of every step that plans of `guest.plans` and `guest.quieting` have, on one host."""
    memories, spaces, devices = MemorySteps(host), SpaceSteps(host), DeviceSteps(host)
    return {
        "memfd.retrieve": Step(memories.retrieve, memories.had),
        "memfd.check": Step(memories.check),
        "iommufd.open": Step(spaces.open, spaces.had),
        "iommufd.retrieve": Step(spaces.retrieve, spaces.had),
        "iommufd.ioas_alloc": Step(spaces.alloc_ioas, spaces.ioas_there),
        "iommufd.map_file": Step(spaces.map_file, spaces.mapped),
        "iommufd.change_process": Step(spaces.change_process, spaces.accounted),
        "iommufd.hwpt_alloc": Step(spaces.alloc_hwpt, spaces.hwpt_there),
        "iommufd.hwpt_restore": Step(spaces.restore_hwpt, spaces.hwpt_there),
        "iommufd.mark_preserve": Step(spaces.mark_preserve),
        "pci.take": Step(devices.take, devices.taken),
        "vfio.open": Step(devices.open, devices.had),
        "vfio.retrieve": Step(devices.retrieve, devices.had),
        "vfio.bind": Step(devices.bind, devices.bound),
        "vfio.check": Step(devices.check),
        "vfio.attach": Step(devices.attach),
        "vfio.irqs": Step(devices.irqs, devices.irqs_on),
        "vfio.bus_master": Step(devices.bus_master, devices.is_bus_master),
        "vfio.trigger": Step(devices.trigger),
        "vfio.irqs_off": Step(devices.irqs_off, devices.irqs_are_off),
        "vfio.wake": Step(devices.wake, devices.awake),
        "vfio.bus_master_off": Step(devices.bus_master_off, devices.is_no_bus_master),
        "vfio.reset": Step(devices.reset),
    }


PROPOSED = {
    "iommufd.hwpt_restore": "IOMMU_HWPT_LU_RESTORE",
    "iommufd.mark_preserve": "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE",
}
"""Kinds of steps whose call is not merged into any kernel."""


def require_spoken(host: Host, resources: Iterable[Resource], *, hint: str = liveupdate.REATTACH) -> None:
    """See that this kernel knows every call of these plans, before the first step of them is made. Raises `NotMerged`."""
    for step in steps_of(resources):
        if step.kind in PROPOSED:
            liveupdate.require(
                host.files, PROPOSED[step.kind], f"of step {step.id} ({step.label})", hint=hint
            )


def _whether(there: bool, result: Result | None = None) -> Probe:
    return Done(result or {}) if there else Absent()


class MemorySteps:
    """memfd.*: guest memory out of the session."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def retrieve(self, args: Args) -> Result:
        """RETRIEVE_FD. Again, it gives another fd of the same file."""
        token = args["memory"]
        fd = self.host.kernel.retrieve_fd(self.host.session_fd, parse_token(token))
        self.host.fds.keep(token, fd)
        return {}

    def had(self, args: Args) -> Probe:
        """Ask whether this process has the fd."""
        return _whether(self.host.fds.own(args["memory"]) is not None)

    def check(self, args: Args) -> Result:
        """Compare the size, and see that the memory can be written."""
        facts = memfd.inspect(self.host.memory(args["memory"]))
        if facts.size != args["size"]:
            raise EffectFailed(
                f"memory {args['memory']} has {facts.size} bytes, {args['size']} were preserved", errno="EIO"
            )
        if not facts.writable:
            raise EffectFailed(
                f"memory {args['memory']} cannot be written: it came back with the seals {' '.join(facts.seal_names)}",
                errno="EPERM",
                hint="create it with MFD_EXEC: F_SEAL_EXEC makes the next kernel seal it against writing",
            )
        return {"seals": list(facts.seal_names)}


class SpaceSteps:
    """iommufd.*: the address space and what is mapped in it."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def open(self, args: Args) -> Result:
        """Open an empty iommufd; the keeper has it before the step counts as made."""
        fd = open_iommufd(self.host.files, self.host.iommufd_path)
        self.host.fds.keep(args["iommufd"], fd, lasting=True)
        self.host.accounted.add(args["iommufd"])
        return {}

    def retrieve(self, args: Args) -> Result:
        """RETRIEVE_FD of a preserved iommufd."""
        token = args["iommufd"]
        fd = self.host.kernel.retrieve_fd(self.host.session_fd, parse_token(token))
        self.host.fds.keep(token, fd, lasting=True)
        return {}

    def had(self, args: Args) -> Probe:
        """Ask whether this process or the keeper has the fd."""
        return _whether(self.host.fds.find(args["iommufd"]) is not None)

    def alloc_ioas(self, args: Args) -> Result:
        """Make the one address space."""
        return {"ioas_id": self.host.iommufd(args["iommufd"]).alloc_ioas()}

    def ioas_there(self, args: Args) -> Probe:
        """Look for an address space."""
        ids = self.host.iommufd(args["iommufd"]).ioas_ids(OBJECT_IDS)
        return Done({"ioas_id": ids[0]}) if ids else Absent()

    def map_file(self, args: Args) -> Result:
        """Map memory for devices, once its size is sealed."""
        fd = self.host.memory(args["memory"])
        sealed = memfd.inspect(fd).sealed_for_preservation
        rules.enforce(rules.before_mapping(args["memory"], sealed=sealed))
        iova = self.host.iommufd(args["iommufd"]).map_file(
            args["ioas_id"], fd, args["start"], args["length"], args["iova"], writable=args["writable"]
        )
        return {"iova": iova}

    def mapped(self, args: Args) -> Probe:
        """Ask whether the range is mapped."""
        iommufd = self.host.iommufd(args["iommufd"])
        return _whether(iommufd.mapped(args["ioas_id"], args["iova"], args["length"]), {"iova": args["iova"]})

    def change_process(self, args: Args) -> Result:
        """Have pinned pages accounted to this process, where another one mapped them; older kernels leave them where they are."""
        token = args["iommufd"]
        if token in self.host.accounted:
            return {"changed": False}
        try:
            self.host.iommufd(token).change_process()
        except TooOld:
            return {"changed": False}
        self.host.accounted.add(token)
        return {"changed": True}

    def accounted(self, args: Args) -> Probe:
        """Know whether it was this process that mapped them."""
        return _whether(args["iommufd"] in self.host.accounted)

    def alloc_hwpt(self, args: Args) -> Result:
        """Make a page table for one device."""
        return {"hwpt_id": self.host.iommufd(args["iommufd"]).alloc_hwpt(args["device_id"], args["ioas_id"])}

    def restore_hwpt(self, args: Args) -> Result:
        """Take up the page table of a device that came with the update (proposed)."""
        fd = self.host.iommufd(args["iommufd"]).fd
        return {"hwpt_id": liveupdate.restore_hwpt(self.host.files, fd, parse_token(args["table"]))}

    def mark_preserve(self, args: Args) -> Result:
        """Say that a device's page table is to be carried by the next update (proposed)."""
        fd = self.host.iommufd(args["iommufd"]).fd
        try:
            liveupdate.mark_preserve(self.host.files, fd, args["hwpt_id"], parse_token(args["table"]))
        except PassthroughError as error:
            if error.errno != errno.EADDRINUSE:  # it is marked already
                raise
        return {}

    def hwpt_there(self, args: Args) -> Probe:
        """Look for the page table of the device in this place."""
        ids = self.host.iommufd(args["iommufd"]).hwpt_ids(OBJECT_IDS)
        return Done({"hwpt_id": ids[args["place"]]}) if len(ids) > args["place"] else Absent()


class DeviceSteps:
    """vfio.* and pci.*: one device from its driver to its interrupts, and back to quiet."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def _device(self, args: Args) -> VfioDevice:
        return self.host.device(args["device"], args["address"])

    # -- from the driver to the page table

    def take(self, args: Args) -> Result:
        """Give the device to vfio-pci: the choice of a driver does not last over a boot."""
        self.host.pci.bind(args["address"])
        return {}

    def taken(self, args: Args) -> Probe:
        """Ask who has it."""
        return _whether(self.host.pci.driver(args["address"]) == VFIO_PCI)

    def open(self, args: Args) -> Result:
        """Open the cdev; the keeper has it before the step counts as made."""
        node = self.host.pci.node(args["address"])
        try:
            fd = open_device(self.host.files, node)
        except TakenElsewhere as error:
            raise self._named(error, node) from error
        self.host.fds.keep(args["device"], fd, lasting=True)
        return {"node": node}

    def retrieve(self, args: Args) -> Result:
        """RETRIEVE_FD of a preserved device."""
        fd = self.host.kernel.retrieve_fd(self.host.session_fd, parse_token(args["device"]))
        self.host.fds.keep(args["device"], fd, lasting=True)
        return {}

    def had(self, args: Args) -> Probe:
        """Ask whether this process or the keeper has the fd."""
        return _whether(self.host.fds.find(args["device"]) is not None)

    def bind(self, args: Args) -> Result:
        """Take the device into its iommufd; the kernel resets it, where it can be reset."""
        try:
            return {"device_id": self._device(args).bind(self.host.iommufd(args["iommufd"]).fd)}
        except (TakenElsewhere, WrongOrder) as error:
            raise self._named(error, self.host.pci.node(args["address"])) from error

    def bound(self, args: Args) -> Probe:
        """Ask whether it is bound, and as which: the devices of an iommufd have their ids in the order of the plan."""
        if not self._device(args).bound():
            return Absent()
        ids = self.host.iommufd(args["iommufd"]).device_ids(OBJECT_IDS)
        if len(ids) <= args["place"]:
            return Unknown(f"{args['address']} is bound, but not to the iommufd of its plan")
        return Done({"device_id": ids[args["place"]]})

    def check(self, args: Args) -> Result:
        """See that it is the device of which the plan speaks."""
        recorded, found = msgspec.convert(args["facts"], Facts), facts_of(self._device(args))
        for field in Facts.__struct_fields__:
            if getattr(recorded, field) != getattr(found, field):
                raise EffectFailed(
                    f"{args['address']} is another device than the one that was preserved: its {field} are "
                    f"{getattr(found, field)}, {getattr(recorded, field)} are recorded",
                    errno="ENODEV",
                    hint="devices were moved or exchanged, or got other addresses: put it back, or give the guest another",
                )
        return {}

    def attach(self, args: Args) -> Result:
        """Let the device reach its address space."""
        return {"hwpt_id": self._device(args).attach(args["page_table"])}

    # -- running

    def irqs(self, args: Args) -> Result:
        """Deliver interrupts to the eventfds that the VMM has put into `Host.fds`, or to new ones."""
        token, index, vectors = args["device"], args["index"], args["vectors"]
        for vector in range(vectors):
            name = eventfd_name(token, index, vector)
            if self.host.fds.own(name) is None:
                self.host.fds.keep(name, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self._device(args).set_irqs(index, self.host.eventfds(token, index, vectors) or [])
        return {}

    def irqs_on(self, args: Args) -> Probe:
        """Ask whether interrupts are on, and reach this process: eventfds of another one are nobody's."""
        here = self.host.eventfds(args["device"], args["index"], args["vectors"]) is not None
        return _whether(here and self._device(args).irqs_on(args["index"]))

    def bus_master(self, args: Args) -> Result:
        """Let the device begin transfers."""
        ConfigSpace(self._device(args)).set_bus_master(True)
        return {}

    def is_bus_master(self, args: Args) -> Probe:
        """Read the command register."""
        return _whether(ConfigSpace(self._device(args)).bus_master())

    def trigger(self, args: Args) -> Result:
        """Signal every vector once: an interrupt may have been lost while nobody listened."""
        self._device(args).trigger_irqs(args["index"], args["vectors"])
        return {}

    # -- quiet

    def irqs_off(self, args: Args) -> Result:
        """Turn off every kind of interrupt."""
        device = self._device(args)
        for index in abi.IRQ_NAMES:
            device.disable_irqs(index)
        return {}

    def irqs_are_off(self, args: Args) -> Probe:
        """Ask for each kind."""
        return _whether(not kinds_on(self._device(args)))

    def wake(self, args: Args) -> Result:
        """Bring the device to D0."""
        ConfigSpace(self._device(args)).set_power_state(0)
        return {}

    def awake(self, args: Args) -> Probe:
        """Read its power state."""
        return _whether(ConfigSpace(self._device(args)).power_state() == 0)

    def bus_master_off(self, args: Args) -> Result:
        """Stop every transfer that the device begins."""
        ConfigSpace(self._device(args)).set_bus_master(False)
        return {}

    def is_no_bus_master(self, args: Args) -> Probe:
        """Read the command register."""
        return _whether(not ConfigSpace(self._device(args)).bus_master())

    def reset(self, args: Args) -> Result:
        """Reset the device where it can be reset; the others stay off the bus."""
        device = self._device(args)
        can = device.info().can_reset
        if can:
            device.reset()
        return {"reset": can}

    def _named(self, error: PassthroughError, node: str) -> PassthroughError:
        """Say who has the node open besides this process; the kernel's EINVAL does not even say that somebody has."""
        others = [one for one in self.host.pci.holders(node) if not one.startswith(f"{os.getpid()} ")]
        if not others:
            return error
        return TakenElsewhere(
            error.operation,
            error.subject,
            error.errno,
            detail=f"{node} is held by {', '.join(others)}",
            hint="end it, or let it close the device",
        )


def facts_of(device: VfioDevice) -> Facts:
    """Read what tells a bound device from another."""
    info = device.info()
    regions = tuple(device.region_info(index).size for index in range(min(info.regions, abi.CONFIG + 1)))
    irqs = tuple(device.irq_info(index).vectors for index in abi.IRQ_NAMES)
    return Facts(str(ConfigSpace(device).identity()), regions, irqs)


def kinds_on(device: VfioDevice) -> tuple[str, ...]:
    """Return the kinds of interrupts that are on."""
    return tuple(name for index, name in abi.IRQ_NAMES.items() if device.irqs_on(index))
