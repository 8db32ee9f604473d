# SPDX-License-Identifier: Apache-2.0
"""A whole update with passthrough devices: luod, its keeper, three guests with real devices; in the new kernel a crash matrix as well.

vm1  edu           devices="reattach": carried by the fallback, after the matrix
vm2  a second edu  the same, but in the new kernel somebody else has its device at first
vm3  nvme          devices="preserve", optional: the kernel has no handler, so it says NACK and is left out
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import select
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
from guests import JOURNALS, RUN, CountedCalls, Vmm, restore_here

from luod.adapters.chardev import SystemCalls
from luod.adapters.iommufd.device import open_iommufd
from luod.adapters.keeper.client import Keeper
from luod.adapters.kernel import open_kernel
from luod.adapters.vfio.device import VfioDevice, open_device
from luod.adapters.vfio.pci import PciDevices
from luod.client import Client
from luod.devices.guest import from_fields
from luod.devices.host import Host
from luod.devices.restoration import plan_engine
from luod.engine.points import STAGES, Stage
from luod.lab import passthrough
from luod.lab.crew import PATIENCE_S, Crew
from luod.lab.report import emit
from luod.states.events import Resource

ADDRESSES = {"vm1": passthrough.EDU, "vm2": passthrough.EDU_2, "vm3": passthrough.NVME}


class DeviceCrew(Crew):
    """The crew with guests that have devices."""

    def _client(self, name: str, boot: int, hold_at: str) -> Callable[[int], int]:
        def work(pipe: int) -> int:
            more: dict[str, Any] = (
                {"devices": "preserve", "policy": "optional", "irqs": ()} if name == "vm3" else {}
            )
            vmm = Vmm(name, ADDRESSES[name], pipe, keeper=Keeper(RUN), **more)
            return vmm.first_boot() if boot == 1 else vmm.second_boot()

        return work


ROUNDS = 4
"""A process that finds a step made does not come to the points after its call: those need another beginning."""


def old_kernel(crew: DeviceCrew) -> None:
    """Have one update refused, so that the guests resume; then jump."""
    crew.start_clients(1)
    crew.refuse = True
    ended = crew.update()
    for name in ("vm1", "vm2"):
        resumed = crew.until(name, "aborted")
        emit("refused", client=name, ended=ended, **resumed)
    crew.refuse = False
    crew.start_clients(1)
    raise AssertionError(f"the update ended as {crew.update()}")


# -- the crash matrix


def matrix(pipe: int, guest: str, *, kept: bool) -> int:
    """Claim a guest's session and let processes that restore it die at every point of every step."""
    with Client.connect(RUN / "liveupdate.sock", timeout=PATIENCE_S) as link:
        link.hello(["inventory"])
        claimed = link.claim(guest)
        session_fd = claimed.take_fd()
        resources = from_fields(claimed["resources"])
        steps = [f"{one.token}/{step.step}" for one in resources for step in one.plan]
        deaths = Deaths(JOURNALS / f"deaths-of-{guest}", guest)
        for number in range(ROUNDS):
            name = f"{guest}-round-{number}"
            told = deaths.run(name, session_fd, resources, kept=kept)
            missed = sorted({f"{step}:{stage}" for step in steps for stage in STAGES} - set(deaths.killed))
            calls = Counter((JOURNALS / f"{name}.calls").read_text("ascii").split())
            line = {
                "kept": kept, "round": number, "steps": len(steps), "deaths": len(deaths.killed),
                "missed": missed, "calls": dict(calls), **told,
            }  # fmt: skip
            os.write(pipe, json.dumps(line).encode() + b"\n")
            if not missed:
                break
            PciDevices().release(ADDRESSES[guest])
        os.close(session_fd)
    return 0


def mortal(work: Callable[[], int]) -> int:
    """Run something in a forked process; return its wait status as an exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Deaths:
    """Where processes have died so far: each dies at the first point at which none has."""

    def __init__(self, place: Path, guest: str) -> None:
        self._guest = guest
        place.parent.mkdir(parents=True, exist_ok=True)
        self._place = place
        self.killed: list[str] = []

    def run(self, name: str, session_fd: int, resources: list[Resource], *, kept: bool) -> dict[str, Any]:
        """Restore again and again until a process comes through; return what that one found."""
        outcome = self._place.with_suffix(".outcome")
        while True:

            def work() -> int:
                vmm = Vmm(
                    name, ADDRESSES[self._guest], -1, keeper=Keeper(RUN) if kept else None,
                    files=CountedCalls(JOURNALS / f"{name}.calls"), points=self._point,
                )  # fmt: skip
                found = anyio.run(restore_here, vmm, session_fd, resources, f"{self._guest} before")
                outcome.write_text(json.dumps(found))
                vmm.let_go()
                return 0

            code = mortal(work)
            before = len(self.killed)
            self.killed = self._place.read_text("ascii").splitlines() if self._place.exists() else []
            if code == 0:
                told: dict[str, Any] = json.loads(outcome.read_text())
                return told
            if code != -signal.SIGKILL or len(self.killed) == before:
                raise AssertionError(f"a process ended with {code} after {self.killed[-1:]}")

    def _point(self, key: str, stage: Stage) -> None:
        point = f"{key.partition('/plan/')[2]}:{stage}"
        if point not in self.killed:
            with self._place.open("a", encoding="ascii") as file:
                file.write(point + "\n")
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()


# -- somebody else has the device


def intruder(pipe: int) -> int:
    """Bind vm2's device and keep it until told to end."""
    pci, files = PciDevices(), SystemCalls()
    pci.bind(ADDRESSES["vm2"])
    device = VfioDevice(files, open_device(files, pci.node(ADDRESSES["vm2"])), name="vm2's device")
    device.bind(open_iommufd(files))
    os.write(pipe, b"taken\n")
    select.select([], [], [])
    return 0


def new_kernel(crew: DeviceCrew) -> None:
    """Die all over the restore plans, of vm1 without a keeper and of vm2 with one; then restore both, vm2 in spite of an intruder."""
    sweeps = [
        crew.fork(f"matrix-{guest}", functools.partial(matrix, guest=guest, kept=kept))
        for guest, kept in (("vm1", False), ("vm2", True))
    ]
    for child in sweeps:
        while line := child.line(PATIENCE_S):
            emit("matrix", **json.loads(line))
        if not child.ended(PATIENCE_S) or child.code:
            raise AssertionError(f"{child.name} ended with {child.code}: {child.log.read_text()[-3000:]}")
    thief = crew.fork("intruder", intruder)
    thief.line(PATIENCE_S)
    crew.names = ["vm1", "vm2"]
    crew.start_clients(2)
    crew.until("vm2", "failed")
    emit("while-failed", states=crew.states(), fds=crew.children["client-vm2"].fds())
    finished = crew.until("vm1", "finished")
    thief.stop(signal.SIGKILL)
    with crew.link() as link:
        link.resolve("vm2.2", "retry")
    restored = crew.until("vm2", "finished")
    update = crew.until_done()
    with crew.link() as link:
        nacks = [
            record["body"]
            for record in link.records(stream="vm3.2")
            if record["type"].startswith("session.nacked.")
        ]
    emit(
        "done", update=update, sessions=crew.sessions(), bytes=[finished["bytes"], restored["bytes"]],
        proofs=[finished["proof"], restored["proof"]], nacks=nacks,
    )  # fmt: skip


def warm_up() -> None:
    """Import what is imported late: every fork would do so again, over 9p."""

    async def once() -> None:
        host = Host(SystemCalls(), open_kernel("device"), PciDevices())
        async with plan_engine(JOURNALS / "warm" / "journal.db", host) as engine:
            await engine.settle()

    anyio.run(once)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--boot", type=int, required=True)
    parser.add_argument("--kernel", type=Path)
    options = parser.parse_args()
    warm_up()
    crew = DeviceCrew(ADDRESSES, 0, image=options.kernel)
    crew.start_keeper()
    crew.start_luod()
    if options.boot == 0:
        old_kernel(crew)
    new_kernel(crew)
    crew.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
