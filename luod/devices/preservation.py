# SPDX-License-Identifier: Apache-2.0
"""The old kernel: what is asked of it, in which order, and what happens where it cannot carry devices.

    preserve   memfds, then iommufds, then devices, into one session            while the guest runs
    quiet      interrupts off, D0, off the bus, reset: every step an effect     at FREEZE, vCPUs stopped
    check      the order rules once more                                        before READY
    resume     the plans again: interrupts and bus mastering come back          at RESUME or ABORT

Where the kernel has no handler for iommufd or VFIO files (PRESERVE_FD says ENOENT, and nothing has changed), the policy of the session
decides: "preserve" is `NoHandler`, which its client says as NACK; "reattach" keeps the memory and leaves plans that open, bind and
map anew. The inventory shows which it was.
"""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from ..adapters import memfd
from ..adapters.liveupdate.errors import KernelError, NotPreservable, TokenExists
from ..adapters.vfio.config_space import ConfigSpace
from ..engine.plan import PlanRunner
from ..engine.ports import Kernel
from ..engine.runner import Engine
from ..states.errors import LuodError
from ..states.events import Devices, Resource
from ..states.names import parse_token
from . import rules
from .guest import Guest, device_plans, plans, quieting
from .host import Host
from .steps import facts_of, kinds_on, require_spoken

PROBE_TOKEN = 1


class NoHandler(LuodError):
    """This kernel cannot carry passthrough devices, and the session's policy does not allow to re-attach them. For a NACK."""

    errno = "ENOENT"

    def __init__(self, kind: str, token: str) -> None:
        super().__init__(
            f"PRESERVE_FD {kind} {token}: ENOENT: Linux {os.uname().release} has no live-update handler for {kind} files",
            hint='subscribe with devices="reattach" to have memory carried and devices reset and re-attached, or update '
            "without this guest",
        )
        self.token = token


class Support(msgspec.Struct, frozen=True):
    """Whether the running kernel carries a kind of file, and in words."""

    kind: str
    carried: bool
    detail: str


def support(kernel: Kernel, kind: Literal["iommufd", "vfio"], fd: int) -> Support:
    """Ask the running kernel whether it would carry the file behind `fd`, in a session made for the question and closed again.

    No session of anybody is touched; the file is not preserved afterwards. Needs the right to make sessions. A bare iommufd will
    do to ask for its kind; a device must be bound and attached, since its handler answers ENOENT for one that is not.
    """
    session = kernel.create_session(f"luod.probe-{os.getpid()}")
    try:
        kernel.preserve_fd(session, PROBE_TOKEN, fd)
    except NotPreservable:
        release = os.uname().release
        return Support(kind, False, f"Linux {release} has no live-update handler for {kind} files")
    except KernelError as error:
        return Support(kind, True, f"the handler answers: {error.message}")
    finally:
        os.close(session)
    return Support(kind, True, "it can be preserved")


def observe(guest: Guest, host: Host) -> Guest:
    """Return the guest with what its bound devices are now, so that the plans can check for them."""
    devices = tuple(
        msgspec.structs.replace(one, facts=facts_of(host.device(one.token, one.address)))
        for one in guest.devices
    )
    return msgspec.structs.replace(guest, devices=devices)


async def set_up(engine: Engine, host: Host, stream: str, guest: Guest) -> None:
    """Open, map, bind and attach everything, the memfds being in `Host.fds` already; what stands is left as it is.

    Raises `engine.plan.StepFailed`, and `NotMerged` before anything is opened where this kernel does not speak what `own_tables` needs.
    """
    planned = device_plans(guest, "reattach")
    require_spoken(host, planned)
    await PlanRunner(engine, stream, planned).run()


class Preservation:
    """One guest on its way over an update. `stream` names its effects in `engine`: the one that `set_up` was given."""

    def __init__(
        self, engine: Engine, host: Host, stream: str, guest: Guest, *, devices: Devices = "preserve"
    ) -> None:
        self._engine = engine
        self._host = host
        self._stream = stream
        self.guest = guest
        self.devices = devices
        self.outcome: Devices = "preserve"
        """What became of the devices, known after `preserve`."""

    def preserve(self) -> list[Resource]:
        """Ask the kernel for everything, in order; return the inventory for PRESERVED. Asking again is safe.

        Raises `OrderViolated` and `NotMerged` before the kernel is asked, `NoHandler`, and `KernelError` for what else it refuses.
        """
        require_spoken(self._host, device_plans(self.guest, "reattach"))
        asked = self.asked()
        rules.enforce([*self._sealed(), *rules.before_preserving(asked)])
        outcome: Devices = "preserve"
        for one in asked:
            if one.kind == "iommufd" and self.devices == "reattach" and self._shared():
                outcome = "reattach"
                break
            if one.kind == "vfio":  # so this kernel carries what it rests on
                rules.enforce(rules.own_page_table(self._shared()))
            try:
                self._host.kernel.preserve_fd(
                    self._host.session_fd, parse_token(one.token), self._fd(one.kind, one.token)
                )
            except TokenExists:
                continue
            except NotPreservable as error:
                if one.kind == "memfd":
                    raise
                if self.devices == "preserve" or one.kind == "vfio":
                    raise NoHandler(one.kind, one.token) from error
                outcome = "reattach"
                break
        self.outcome = outcome
        return plans(self.guest, self.outcome)

    def asked(self) -> list[rules.Asked]:
        """Return the calls in their order, each with what it rests on."""
        guest, into = self.guest, self._stream
        memories = [rules.Asked(one.token, "memfd", into) for one in guest.memories]
        spaces = [
            rules.Asked(
                one.token, "iommufd", into, tuple(dict.fromkeys(each.memory for each in one.mappings))
            )
            for one in guest.spaces
        ]
        return [
            *memories,
            *spaces,
            *(rules.Asked(one.token, "vfio", into, (one.space,)) for one in guest.devices),
        ]

    def _shared(self) -> list[str]:
        return [one.token for one in self.guest.spaces if not one.own_tables]

    def _sealed(self) -> list[rules.Violation]:
        mapped = {each.memory for one in self.guest.spaces for each in one.mappings}
        return [
            violation
            for token in sorted(mapped)
            for violation in rules.before_mapping(token, sealed=sealed(self._host.memory(token)))
        ]

    def _fd(self, kind: str, token: str) -> int:
        if kind == "memfd":
            return self._host.memory(token)
        if kind == "iommufd":
            return self._host.iommufd(token).fd
        return self._host.device(token, "").fd

    async def quiet(self) -> None:
        """Quiet every device, vCPUs being stopped. Raises `StepFailed` for one that does not obey, `OrderViolated` as `check`."""
        await PlanRunner(self._engine, self._stream, quieting(self.guest)).run()
        self.check()

    def check(self) -> None:
        """See that the freeze in the kernel will find every device as it must be: it could only fail the whole reboot."""
        rules.enforce(rules.before_the_jump(standing(self.guest, self._host)))

    async def resume(self) -> None:
        """Have interrupts and bus mastering on again, when the update is undone. A device that was reset stays reset."""
        await set_up(self._engine, self._host, self._stream, self.guest)


def sealed(fd: int) -> bool:
    """Say whether a memfd has the three seals that fix its size."""
    return memfd.inspect(fd).sealed_for_preservation


def standing(guest: Guest, host: Host) -> list[rules.Standing]:
    """Ask every device how it stands."""
    found: list[rules.Standing] = []
    for one in guest.devices:
        device = host.device(one.token, one.address)
        found.append(
            rules.Standing(one.label or one.address, kinds_on(device), ConfigSpace(device).power_state())
        )
    return found
