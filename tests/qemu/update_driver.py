# SPDX-License-Identifier: Apache-2.0
"""Drives a guest's operations through the engine and its journal, in a process that may be made to die at any point.

    python update_driver.py JOB.json

The job names the QEMU to adopt, the memfds by inode, the journal, the operations with their arguments, and where to die. It settles
first what an earlier driver left in doubt, then performs the operations, and prints what became of each. What it cannot hold over its
death, the saved state, it takes back from QEMU.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec

from luod.adapters.qemu.guest import Guest, Timeouts
from luod.adapters.qemu.operations import operations
from luod.adapters.qemu.process import Identity, QemuProcess
from luod.engine.points import injector
from luod.engine.ports import Intent
from luod.engine.runner import Engine
from luod.journal.writer import Journal
from luod.states.events import Owner, SessionBound

STREAM = "vm1.1"


def adopted(job: dict[str, Any]) -> tuple[QemuProcess, Guest]:
    process = QemuProcess.adopt(msgspec.convert(job["qemu"], Identity), Path(job["monitor"]))
    ram: dict[str, int] = {}
    for name, (inode, device) in job["ram"].items():
        fd = process.find_descriptor(inode, device, os.O_RDWR)
        assert fd is not None, f"QEMU has no {name}"
        ram[name] = fd
    process.require_mapped(list(ram.values()))
    vmstate = os.dup(job["vmstate"]) if job.get("vmstate") is not None else None
    return process, Guest("vm1", ram, vmstate=vmstate, timeouts=Timeouts().scaled(4))


def die_after(guest: Guest, command: str) -> None:
    """End this process as soon as QEMU has taken a command, in the midst of an operation."""
    ask = guest.ask

    def dying(asked: str, *fds: Any, **arguments: Any) -> Any:
        answer = ask(asked, *fds, **arguments)
        if asked == command:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    guest.ask = dying  # type: ignore[method-assign]


async def drive(job: dict[str, Any]) -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    points = injector(job["die"], Path(job["trace"]))
    process, guest = adopted(job)
    with process, guest, Journal.open(Path(job["journal"]), boot_id=boot, run_id="drive") as journal:
        guest.attach(process)
        if job.get("die_after_command"):
            die_after(guest, job["die_after_command"])
        engine = Engine(journal, operations(guest), boot_id=boot, points=points)
        asked = await engine.settle()
        if engine.book.session(STREAM) is None:
            await engine.record((STREAM, SessionBound("vm1", 1, Owner(0, 0, 0))))
        settled = {
            effect.key: (effect.status, effect.how, effect.result)
            for effect in engine.book.streams[STREAM].effects.values()
        }
        results: dict[str, Any] = {}
        for kind, args in job["do"]:
            (effect,) = await engine.perform(Intent(STREAM, f"{STREAM}/{kind}", f"qemu.{kind}", args))
            results[kind] = [effect.status, effect.attempt, effect.message, effect.result]
        return {
            "asked": [effect.key for effect in asked],
            "settled": settled,
            "results": results,
            "runstate": guest.runstate(),
            "vmstate": guest.vmstate is not None,
        }


if __name__ == "__main__":
    print(json.dumps(anyio.run(drive, json.loads(Path(sys.argv[1]).read_text()))))
