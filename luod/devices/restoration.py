# SPDX-License-Identifier: Apache-2.0
"""The new kernel: executing the restore plans of a claimed session, from wherever an earlier process left them.

    CLAIM -> session fd, inventory
    run      every step an effect in the journal of this agent, each reported to luod by RESTORED
    finish   FINISH on the session, refused here while a step is open

A device that cannot be restored fails this session and no other. Its fds, and the session fd, stay open for the operator: FINISH and
close would drop what was not retrieved.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

from ..conversation import ClientError
from ..engine.plan import PlannedStep, PlanRunner, Report
from ..engine.points import Points, nowhere
from ..engine.ports import Effect
from ..engine.runner import Engine
from ..journal.writer import Journal
from ..states.errors import LuodError
from ..states.events import Resource
from ..states.fold import Effect as EffectRecord
from ..verbs import Verbs
from .host import Host
from .steps import effects, require_spoken

WRITTEN_ELSEWHERE = (
    "its plan was written on a kernel that carries devices, and this one does not: boot one that does, or `luoctl resolve SESSION "
    'give-up`; subscribe with devices="reattach" before the next update'
)


class StepsOpen(LuodError):
    """FINISH was asked for while steps of the restore plans are open; it was not sent. `steps` names them."""

    def __init__(self, guest: str, steps: list[str]) -> None:
        super().__init__(
            f"guest {guest} has open steps: {', '.join(steps[:5])}",
            hint="run the restore plans to their end first: FINISH destroys what was not restored",
        )
        self.steps = steps


@contextlib.asynccontextmanager
async def plan_engine(
    journal: Path, host: Host, *, more: dict[str, Effect] | None = None, points: Points = nowhere
) -> AsyncGenerator[Engine]:
    """Open an agent's journal of its own steps and an engine over it. `more` are effects of the agent's own steps.

    The journal may lie on a memory-backed file system: fds do not outlive the boot either. One journal for each guest.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    boot_id = host.kernel.boot_id()
    with Journal.open(journal, boot_id=boot_id, run_id="devices", volatile=True, pregrow=0) as log:
        engine = Engine(log, {**effects(host), **(more or {})}, boot_id=boot_id, points=points)
        await engine.settle(leave=PlanRunner.owns)
        yield engine


class Restoration:
    """One session that came with the kexec. `stream` names its effects in `engine`, `resources` is the inventory that CLAIM brought."""

    def __init__(
        self,
        engine: Engine,
        host: Host,
        stream: str,
        resources: Iterable[Resource],
        *,
        report: Report | None = None,
    ) -> None:
        """Take the plans. Raises `engine.plan.PlanInvalid` for steps that nothing here can make, `NotMerged` for what no kernel knows."""
        resources = list(resources)
        require_spoken(host, resources, hint=WRITTEN_ELSEWHERE)
        self._host = host
        self._stream = stream
        self.runner = PlanRunner(engine, stream, resources, report=report)

    async def run(self) -> None:
        """Make every step that does not stand yet. Raises `engine.plan.StepFailed` and leaves everything open."""
        await self.runner.run()

    def finish(self) -> None:
        """FINISH. Raises `StepsOpen` without asking the kernel, or `KernelError`: FinishBusy may be tried again."""
        steps = self.runner.open_steps()
        if steps:
            raise StepsOpen(self._stream, steps)
        self._host.kernel.finish(self._host.session_fd)


def reporting(link: Verbs[Any], client: str) -> Report:
    """Return what tells luod of each outcome by RESTORED, over a `Client` or an `AsyncClient`, with the time since the one before.

    When luod cannot be reached the run ends there; after connecting and claiming again it goes on, and reports every step once more.
    What luod has to say against a failure is left aside: the failure itself is what the caller must hear of.
    """
    before = time.monotonic()

    async def report(step: PlannedStep, effect: EffectRecord) -> None:
        nonlocal before
        now = time.monotonic()
        took_ms, before = round((now - before) * 1000, 1), now
        ok = effect.status == "done"
        errno = None if ok else effect.errno or "EIO"
        try:
            reply = link.restored(client, step.token, step.step, ok, errno, took_ms=took_ms)
            if inspect.isawaitable(reply):
                await reply
        except ClientError:
            if ok:
                raise

    return report
