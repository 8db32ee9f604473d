# SPDX-License-Identifier: Apache-2.0
"""The new kernel's half: claim the session, execute its restore plan, finish it.

    CLAIM -> qemu.retrieve ... -> qemu.check -> qemu.start -> qemu.load -> qemu.resume -> FINISH -> FINISHED

The guest does not run before the last step, so everything before can be done once more: by this process after luod was away, or by the
next after this one has died, with another QEMU. A QEMU that waits and was left behind by a dead process is ended first.
"""

from __future__ import annotations

import math
import time
from typing import Any

import anyio.to_thread
import msgspec

from ..aclient import AsyncClient
from ..adapters.qemu.guest import LIVE
from ..conversation import ClientError, Reply
from ..engine.plan import PlannedStep, PlanRunner, StepFailed
from ..engine.ports import Intent
from ..engine.runner import Engine
from ..states.errors import LuodError
from ..states.events import Resource
from ..states.fold import Effect
from .vm import Vm

DATA_ERROR = 65
"""Exit code of luo-qemu when a guest could not be restored (EX_DATAERR, sysexits.h): a restart would fail in the same way."""


class NotRestored(LuodError):
    """A part of the guest could not be restored. What was preserved is kept for the operator."""

    exit_code = DATA_ERROR


class Restorer:
    """Restores one guest from what its session holds."""

    def __init__(self, engine: Engine, vm: Vm) -> None:
        self.engine = engine
        self.vm = vm

    async def claim(self, link: AsyncClient) -> Reply | str:
        """Ask luod for the session of this guest; return the reply, or the code that says why there is none to restore.

        Raises `ClientError` for a refusal that means something else, and what the client raises.
        """
        try:
            # Without a deadline: luod lets the guests of a host back in their order.
            return await link.call("CLAIM", id=self.vm.name, timeout=math.inf)
        except ClientError as error:
            if error.code in ("UNKNOWN_ID", "ENDED", "LOST", "OUT_OF_ORDER"):
                return error.code
            raise

    async def restore(self, link: AsyncClient, claimed: Reply) -> None:
        """Bring the guest back. Raises `NotRestored`, and `ConnectionLost` when luod went away: claim again then."""
        vm = self.vm
        session = str(claimed["session"])
        vm.hold(session, claimed.take_fd())
        if vm.alive() and not vm.going_on() and await anyio.to_thread.run_sync(vm.guest.runstate) not in LIVE:
            vm.end_guest()
        resources = msgspec.convert(claimed["resources"], list[Resource])
        runner = PlanRunner(self.engine, session, resources, report=_Reporter(link, vm.name))
        try:
            await runner.run()
        except StepFailed as error:
            if vm.alive():
                await anyio.to_thread.run_sync(vm.end_guest)
            raise NotRestored(
                f"{vm.name} was not started: {error.message}",
                hint="what was preserved is kept: put right what it names and start luo-qemu again (with `--changed as-saved` if only its "
                f"command line has changed), or give the guest up with `luoctl resolve {session} give-up`",
            ) from error
        vm.drop_retrieved()
        finish = await self.engine.ensure(Intent(session, f"{session}/finish", "session.finish"))
        if finish.status != "done":
            raise NotRestored(
                f"{vm.name} runs, but its session cannot be finished: {finish.message}",
                hint="the guest goes on; start luo-qemu again",
            )
        await link.finished(vm.name)
        vm.hold("", -1)


class _Reporter:
    """Says RESTORED after each step, with the time it took."""

    def __init__(self, link: AsyncClient, name: str) -> None:
        self._link = link
        self._name = name
        self._begun = time.monotonic()

    async def __call__(self, step: PlannedStep, effect: Effect) -> None:
        took = (time.monotonic() - self._begun) * 1000
        ok = effect.status == "done"
        said: dict[str, Any] = {} if ok else {"errno": effect.errno or "EIO"}
        await self._link.restored(self._name, step.token, step.step, ok=ok, took_ms=round(took, 3), **said)
        self._begun = time.monotonic()
