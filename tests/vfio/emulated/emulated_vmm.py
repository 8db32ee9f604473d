# SPDX-License-Identifier: Apache-2.0
"""A VMM without vCPUs in the emulated world: memory in a memfd, one edu device, and luod's devices library; in a process of its own."""

from __future__ import annotations

import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import anyio
from forked import PATIENCE_S, Child
from luod_world import World

from luod.aclient import AsyncClient
from luod.adapters import memfd
from luod.adapters.emulator import pci_function as edu
from luod.adapters.emulator.device_files import EmulatedDeviceFiles
from luod.adapters.keeper.client import Keeper
from luod.adapters.kernel import open_kernel
from luod.adapters.vfio import abi
from luod.adapters.vfio.pci import PciDevices
from luod.devices import steps
from luod.devices.fds import HeldFds
from luod.devices.guest import Device, Guest, Irqs, Mapping, Memory, Space, as_fields, from_fields
from luod.devices.host import Host, eventfd_name
from luod.devices.preservation import NoHandler, Preservation, observe, set_up
from luod.devices.restoration import Restoration, StepsOpen, plan_engine, reporting
from luod.engine.plan import StepFailed
from luod.engine.points import Points, nowhere
from luod.journal.writer import Journal
from luod.states.errors import LuodError
from luod.states.events import Devices

MEMORY, SPACE, DEVICE = "0x10", "0x20", "0x30"
SIZE, IOVA, PROOF_AT = 64 * 1024, 0x100000, 0x8000
BLOCK = 256


def guest_with(*addresses: str, own_tables: bool = True) -> Guest:
    """A guest with one address space and these devices."""
    return Guest(
        (Memory(MEMORY, SIZE, "ram"),),
        (Space(SPACE, (Mapping(MEMORY, IOVA, SIZE),), own_tables=own_tables),),
        tuple(
            Device(f"{int(DEVICE, 16) + place:#x}", address, SPACE, (Irqs(abi.MSI),))
            for place, address in enumerate(addresses)
        ),
    )


class EmulatedVmm:
    """One guest. `report` says on a pipe where it is."""

    def __init__(
        self,
        world: World,
        name: str,
        address: str,
        pipe: int,
        *,
        devices: Devices = "preserve",
        own_tables: bool = True,
        also: tuple[str, ...] = (),
        kept: bool = False,
        points: Points = nowhere,
        journal: Path | None = None,
    ) -> None:
        self.world = world
        self.name = name
        self.devices: Devices = devices
        self.journal = journal or world.dir / f"{name}.journal" / "journal.db"
        self.guest = guest_with(address, *also, own_tables=own_tables)
        self._pipe = pipe
        self._points = points
        self.host = Host(
            EmulatedDeviceFiles(world.emulator_dir),
            open_kernel("emulated", directory=world.emulator_dir),
            PciDevices(sys=world.emulator_dir / "sys"),
            HeldFds(name, Keeper(world.run) if kept else None),
        )

    def report(self, at: str, **more: object) -> None:
        os.write(self._pipe, json.dumps({"at": at, **more}).encode() + b"\n")

    def link(self) -> Awaitable[AsyncClient]:
        return AsyncClient.connect(self.world.socket, PATIENCE_S, retry_until=time.monotonic() + PATIENCE_S)

    def engine(self) -> Any:
        return plan_engine(self.journal, self.host, points=self._points)

    def _make_memory(self) -> None:
        memfd.seal_for_preservation(self.host.fds.keep(MEMORY, memfd.create(self.name, SIZE)))

    # -- what the device does

    def copy(self, one: Device, source: int, target: int) -> None:
        """Have a device copy a block by way of its buffer, and wait for its interrupt."""
        device = self.host.device(one.token, one.address)
        eventfd = self.host.fds.own(eventfd_name(one.token, abi.MSI, 0))
        assert eventfd is not None
        for start, end, command in (
            (source, edu.BUFFER, edu.START),
            (edu.BUFFER, target, edu.START | edu.TO_MEMORY | edu.INTERRUPT),
        ):
            for register, value in ((0x80, start), (0x88, end), (0x90, BLOCK), (0x98, command)):
                device.write(abi.BAR0, register, value.to_bytes(8, "little"))
        assert select.select([eventfd], [], [], 0)[0], "the device has not interrupted"
        os.read(eventfd, 8)

    def dma(self, seed: str) -> bool:
        """Write to memory, have each device copy it, and say whether it came; the copy stays as a proof."""
        ram, pattern, good = self.host.memory(MEMORY), block(seed), True
        for one in self.guest.devices:
            os.pwrite(ram, pattern, 0)
            os.pwrite(ram, bytes(BLOCK), PROOF_AT)
            self.copy(one, IOVA, IOVA + PROOF_AT)
            good &= os.pread(ram, BLOCK, PROOF_AT) == pattern
        return good

    def proof(self, seed: str) -> bool:
        """Say whether what the device wrote last is there."""
        return os.pread(self.host.memory(MEMORY), BLOCK, PROOF_AT) == block(seed)

    # -- the old kernel

    async def old_kernel(self) -> None:
        self._make_memory()
        async with self.engine() as engine, await self.link() as link:
            await set_up(engine, self.host, self.name, self.guest)
            self.guest = observe(self.guest, self.host)
            good = self.dma(f"{self.name} before")
            preservation = Preservation(engine, self.host, self.name, self.guest, devices=self.devices)
            await link.hello(["freeze", "inventory"])
            await link.subscribe(self.name, devices=self.devices)
            self.report("subscribed", dma=good)
            await self._serve(link, preservation)

    async def _serve(self, link: AsyncClient, preservation: Preservation) -> None:
        while True:
            event = await link.next_event(PATIENCE_S)
            match event.name:
                case "START_PRESERVATION":
                    self.host.session_fd = event.fds.pop(0)
                    try:
                        resources = preservation.preserve()
                    except LuodError as error:
                        self.report(
                            "nacked", message=error.message, hint=error.hint, kind=type(error).__name__
                        )
                        await link.nack(
                            self.name, "ENOENT" if isinstance(error, NoHandler) else "EINVAL", error.message
                        )
                        continue
                    await link.preserved(self.name, as_fields(resources))
                    self.report(
                        "preserved", outcome=preservation.outcome, kinds=[one.kind for one in resources]
                    )
                case "FREEZE":
                    await preservation.quiet()
                    self.report("ready")
                    await link.ready(self.name)
                case "RESUME":
                    await preservation.resume()
                    self.report("resumed", dma=self.dma(f"{self.name} before"))
                case "ABORT":
                    os.close(self.host.session_fd)
                    await link.aborted(self.name)
                    self.host.fds.close()
                    self.report("aborted")
                    return
                case _:
                    continue

    # -- the new kernel

    async def new_kernel(self) -> None:
        async with await self.link() as link, self.engine() as engine:
            await link.hello(["freeze", "inventory"])
            claimed = await link.claim(self.name)
            self.host.session_fd = claimed.fds.pop(0)
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
            try:
                await restoration.run()
            except StepFailed as error:
                self.report(
                    "failed", step=error.step.id, errno=error.errno, message=error.message, hint=error.hint
                )
                return
            proof = self.proof(f"{self.name} before")
            good = self.dma(f"{self.name} after")
            restoration.finish()
            await link.finished(self.name)
            self.report("finished", dma=good, proof=proof)

    async def preserve_only(self, session_fd: int) -> None:
        """Set everything up, preserve it in a session that somebody else holds, be quiet, and wait for the jump."""
        self._make_memory()
        self.host.session_fd = session_fd
        async with self.engine() as engine:
            await set_up(engine, self.host, self.name, self.guest)
            preservation = Preservation(
                engine, self.host, self.name, observe(self.guest, self.host), devices=self.devices
            )
            good = self.dma(f"{self.name} before")
            resources = as_fields(preservation.preserve())
            await preservation.quiet()
        self.report("preserved", resources=resources, dma=good)
        await anyio.sleep_forever()

    async def restore_only(self, session_fd: int, fields: list[Any]) -> None:
        """Run the plans of a session that somebody else holds, and try the device: what dies and is started again."""
        self.host.session_fd = session_fd
        async with self.engine() as engine:
            restoration = Restoration(engine, self.host, self.name, from_fields(fields))
            await restoration.run()
            iommufd, among = self.host.iommufd(SPACE), steps.OBJECT_IDS
            objects = [iommufd.ioas_ids(among), iommufd.device_ids(among), iommufd.hwpt_ids(among)]
            proof = self.proof(f"{self.name} before")
            good = self.dma(f"{self.name} after")
            restoration.finish()
            self.report("restored", dma=good, proof=proof, objects=objects)


def block(seed: str) -> bytes:
    return (seed.encode() * BLOCK)[:BLOCK]


class Running:
    """A VMM in a forked process; `heard` are its reports."""

    def __init__(self, make: Callable[[int], Awaitable[None]]) -> None:
        _warm_up()
        self._pipe, end = os.pipe()
        self._buffer = b""

        def live() -> None:
            os.close(self._pipe)
            anyio.run(_awaited, make, end)

        self._child = Child(live)
        self.pid = self._child.pid
        os.close(end)

    def heard(self, at: str) -> dict[str, Any]:
        """Wait for the next report, which must be that one."""
        found = self.next_report()
        assert found is not None, f"ended with {self.end()} before it was {at}"
        assert found["at"] == at, found
        return found

    def next_report(self) -> dict[str, Any] | None:
        """Wait for the next report; None when it has ended."""
        while b"\n" not in self._buffer:
            assert select.select([self._pipe], [], [], PATIENCE_S)[0], "a VMM says nothing"
            data = os.read(self._pipe, 65536)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> int:
        """Wait for its end; the exit code, or minus the signal."""
        try:
            return self._child.wait()
        finally:
            os.close(self._pipe)

    def buried(self) -> None:
        """Wait for its death by the reboot."""
        assert self.end() == -signal.SIGKILL


@cache
def _warm_up() -> None:
    """Make once, here, what each fork would make first: the backend's imports, and what a journal computes to be read."""

    async def journal() -> None:
        with tempfile.TemporaryDirectory() as directory:
            for _ in ("made", "read"):
                path = Path(directory, "journal.db")
                Journal.open(path, boot_id="", run_id="", volatile=True, pregrow=0).close()

    anyio.run(journal)


async def _awaited(make: Callable[[int], Awaitable[None]], end: int) -> None:
    await make(end)


def in_old_kernel(world: World, name: str, address: str, **options: Any) -> Running:
    return Running(lambda pipe: EmulatedVmm(world, name, address, pipe, **options).old_kernel())


def in_new_kernel(world: World, name: str, address: str, **options: Any) -> Running:
    return Running(lambda pipe: EmulatedVmm(world, name, address, pipe, **options).new_kernel())
