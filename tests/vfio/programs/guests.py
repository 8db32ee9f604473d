# SPDX-License-Identifier: Apache-2.0
"""VMMs without vCPUs: each has memory in a memfd and one passthrough device, and takes part in updates with luod's devices library."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
from edu import PAGE, Edu, checked_copy

from luod.aclient import AsyncClient
from luod.adapters import memfd
from luod.adapters.chardev import SystemCalls
from luod.adapters.kernel import open_kernel
from luod.adapters.vfio import abi
from luod.adapters.vfio.pci import PciDevices
from luod.devices.fds import HeldFds, Keeper
from luod.devices.guest import Device, Guest, Irqs, Mapping, Memory, Space, as_fields, from_fields
from luod.devices.host import Host, eventfd_name
from luod.devices.preservation import NoHandler, Preservation, observe, set_up, standing
from luod.devices.restoration import Restoration, StepsOpen, plan_engine, reporting
from luod.engine.plan import StepFailed
from luod.engine.points import Points, nowhere
from luod.states.events import Devices, Policy, Resource

RUN = Path("/run/luod")
JOURNALS = Path("/run/vmm")
PATIENCE_S = 120.0
SIZE = 1 << 20
IOVA = 0x100000
MEMORY, SPACE, DEVICE = "0x10", "0x20", "0x30"
PROOF_AT = 16 * PAGE


def one_device(address: str, size: int = SIZE, irqs: tuple[Irqs, ...] = (Irqs(abi.MSI),)) -> Guest:
    return Guest(
        (Memory(MEMORY, size, "ram"),),
        (Space(SPACE, (Mapping(MEMORY, IOVA, size),)),),
        (Device(DEVICE, address, SPACE, irqs, take=True),),
    )


class CountedCalls(SystemCalls):
    """The system calls, each that succeeds noted in a file: what was really made, whoever made it."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def _note(self, what: str) -> None:
        with self._place.open("a", encoding="ascii") as file:
            file.write(what + "\n")

    def open(self, path: str) -> int:
        fd = super().open(path)
        self._note(f"open:{Path(path).name}")
        return fd

    def ioctl(self, fd: int, request: int, argument: Any = 0, **more: Any) -> int:
        result = super().ioctl(fd, request, argument, **more)
        self._note(f"{request:#x}")
        return result


class Vmm:
    """One guest. `pipe` takes JSON lines that say where it is."""

    def __init__(
        self,
        name: str,
        address: str,
        pipe: int,
        *,
        devices: Devices = "reattach",
        policy: Policy = "required",
        keeper: Keeper | None = None,
        files: SystemCalls | None = None,
        points: Points = nowhere,
        irqs: tuple[Irqs, ...] = (Irqs(abi.MSI),),
    ) -> None:
        self.name = name
        self.devices: Devices = devices
        self.policy: Policy = policy
        self._pipe = pipe
        self._points = points
        self.guest = one_device(address, irqs=irqs)
        self.address = address
        self.has_edu = irqs == (Irqs(abi.MSI),)
        self.host = Host(files or SystemCalls(), open_kernel("device"), PciDevices(), HeldFds(name, keeper))

    def report(self, at: str, **more: object) -> None:
        os.write(self._pipe, json.dumps({"at": at, **more}).encode() + b"\n")

    def engine(self) -> Any:
        return plan_engine(JOURNALS / self.name / "journal.db", self.host, points=self._points)

    def let_go(self) -> None:
        """Give the device back: the keeper must not have it either, or the next process goes on with memory that is gone."""
        for name in (DEVICE, SPACE):
            self.host.fds.forget(name)
        self.host.fds.close()

    def edu(self) -> Edu:
        eventfd = self.host.fds.own(eventfd_name(DEVICE, abi.MSI, 0))
        assert eventfd is not None
        return Edu(self.host.device(DEVICE, self.address), eventfd)

    def dma(self, seed: str) -> int:
        """Copy a page by the device, and leave a proof behind for the next kernel."""
        if not self.has_edu:
            return 0
        done = checked_copy(self.edu(), self.host.memory(MEMORY), IOVA, seed.encode())
        self.edu().copy(IOVA, IOVA + PROOF_AT)
        return done

    def proof(self, seed: str) -> bool:
        """Say whether what the device wrote in the old kernel is there."""
        return os.pread(self.host.memory(MEMORY), PAGE, PROOF_AT) == (seed.encode() * PAGE)[:PAGE]

    # -- the old kernel

    def first_boot(self) -> int:
        anyio.run(self._old_kernel)
        return 0

    async def _old_kernel(self) -> None:
        fd = memfd.create(self.name, SIZE)
        memfd.seal_for_preservation(fd)
        self.host.fds.keep(MEMORY, fd)
        async with self.engine() as engine:
            await set_up(engine, self.host, self.name, self.guest)
            self.guest = observe(self.guest, self.host)
            copied = self.dma(f"{self.name} before")
            preservation = Preservation(engine, self.host, self.name, self.guest, devices=self.devices)
            async with await AsyncClient.connect(
                RUN / "liveupdate.sock", PATIENCE_S, retry_until=time.monotonic() + PATIENCE_S
            ) as link:
                await link.hello(["freeze", "inventory"])
                await link.subscribe(self.name, policy=self.policy, devices=self.devices)
                self.report("subscribed", bytes=copied)
                await self._serve(link, preservation)
        self.let_go()
        self.report("aborted", bytes=copied)

    async def _serve(self, link: AsyncClient, preservation: Preservation) -> None:
        while True:
            event = await link.next_event(PATIENCE_S)
            match event.name:
                case "START_PRESERVATION":
                    self._hold(event.fds.pop(0))
                    try:
                        resources = preservation.preserve()
                    except NoHandler as error:
                        self.report("nacked", message=error.message, hint=error.hint)
                        await link.nack(self.name, error.errno, error.message, token=error.token)
                        continue
                    await link.preserved(self.name, as_fields(resources))
                    self.report(
                        "preserved", outcome=preservation.outcome, kinds=[one.kind for one in resources]
                    )
                case "FREEZE":
                    await preservation.quiet()
                    await link.ready(self.name)
                    self.report("ready", standing=[str(one) for one in standing(self.guest, self.host)])
                case "RESUME":
                    await preservation.resume()
                    self.report("resumed", bytes=self.dma(f"{self.name} before"))
                case "ABORT":
                    self._hold(-1)
                    await link.aborted(self.name)
                    return
                case _:
                    continue

    def _hold(self, fd: int) -> None:
        if self.host.session_fd >= 0:
            os.close(self.host.session_fd)
        self.host.session_fd = fd

    # -- the new kernel

    def second_boot(self) -> int:
        anyio.run(self._new_kernel)
        return 0

    async def _new_kernel(self) -> None:
        async with (
            await AsyncClient.connect(
                RUN / "liveupdate.sock", PATIENCE_S, retry_until=time.monotonic() + PATIENCE_S
            ) as link,
            self.engine() as engine,
        ):
            await link.hello(["freeze", "inventory", "progress"])
            await link.watch()
            claimed = await link.claim(self.name)
            self._hold(claimed.fds.pop(0))
            restoration = Restoration(
                engine,
                self.host,
                self.name,
                from_fields(claimed["resources"]),
                report=reporting(link, self.name),
            )
            try:
                restoration.finish()
            except StepsOpen as error:
                self.report("open", steps=error.steps)
            while True:
                try:
                    await restoration.run()
                    break
                except StepFailed as error:
                    self.report("failed", step=error.step.id, errno=error.errno, message=str(error))
                    await self._until_retried(link)
            proof = self.proof(f"{self.name} before")
            copied = self.dma(f"{self.name} after")
            restoration.finish()
            await link.finished(self.name)
        self.report("finished", bytes=copied, proof=proof)

    async def _until_retried(self, link: AsyncClient) -> None:
        while True:
            event = await link.next_event(PATIENCE_S, names=("PROGRESS",))
            if event.fields["record"]["type"].startswith("session.retried."):
                return


async def restore_here(vmm: Vmm, session_fd: int, resources: Sequence[Resource], seed: str) -> dict[str, Any]:
    """Run the plans of a session and try the device: what a process of the crash matrix does until it dies."""
    vmm.host.session_fd = session_fd
    async with vmm.engine() as engine:
        restoration = Restoration(engine, vmm.host, vmm.name, resources)
        await restoration.run()
        proof = vmm.proof(seed)
        iommufd = vmm.host.iommufd(SPACE)
        objects = {"ioas": iommufd.ioas_ids(range(1, 64)), "devices": iommufd.device_ids(range(1, 64))}
        node = vmm.host.pci.node(vmm.address)
        copied = checked_copy(vmm.edu(), vmm.host.memory(MEMORY), IOVA, b"after a death")
        return {"bytes": copied, "proof": proof, "holders": len(vmm.host.pci.holders(node)), **objects}
