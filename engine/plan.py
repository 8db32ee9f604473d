# SPDX-License-Identifier: Apache-2.0
"""Restore plans: the calls that must succeed between RETRIEVE_FD and FINISH, in order, each an effect.

A plan is data: it is recorded when its resource is preserved and executed in the new kernel, perhaps by another process, perhaps
several times over because that process died. A step is named `KIND` or `KIND#LABEL`; its kind is the kind of the effect that makes
it, its label tells two steps of one kind apart. An argument of the form `{"from": "TOKEN/STEP", "field": NAME}` stands for a field
of the result of an earlier step: ids that a kernel hands out are not known when the plan is written.

    memfd 0x10     retrieve ---> check
    iommufd 0x20   open ---> ioas_alloc ---> map_file#ram0
    vfio 0x30      open ---> bind ---> attach ---> irqs

What a step has made can be gone while its record stands (an open fd dies with its process). So a runner believes no record of this
boot without asking the step's probe again, and makes again what is no longer there. The first step that fails ends the run: a guest
must not go on with half of its devices.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import cast

import msgspec

from ..states.events import Resource
from ..states.fold import Effect
from .errors import EngineError
from .ports import Intent, Json
from .runner import Engine

PLAN = "/plan/"
"""What the key of every step's effect holds between the stream and the token."""


class PlanInvalid(EngineError):
    """A plan that cannot be executed as it is written; nothing of it was."""


class StepFailed(EngineError):
    """A step of a restore plan was refused. `errno` is symbolic, empty where the world gave none; the steps after it were not made."""

    def __init__(self, step: PlannedStep, effect: Effect) -> None:
        what = effect.message or effect.errno or "it is in doubt"
        super().__init__(
            f"step {step.id} ({step.label or step.kind}) failed: {what}",
            hint="put right what it names, then let the session be tried again: `luoctl resolve SESSION retry`",
        )
        self.step = step
        self.errno = effect.errno


class PlannedStep(msgspec.Struct, frozen=True):
    """One step in its place: of which resource, what it is called, and its arguments as the plan has them."""

    token: str
    step: str
    args: dict[str, Json]
    label: str = ""

    @property
    def kind(self) -> str:
        """The kind of its effect."""
        return self.step.partition("#")[0]

    @property
    def id(self) -> str:
        """Return `TOKEN/STEP`, as luod names open steps and as references are written."""
        return f"{self.token}/{self.step}"


Report = Callable[[PlannedStep, Effect], Awaitable[None]]


def steps_of(resources: Iterable[Resource]) -> list[PlannedStep]:
    """Return all steps of an inventory in the order in which they are made: that of the resources, then that of each plan."""
    return [PlannedStep(one.token, step.step, step.args, one.label) for one in resources for step in one.plan]


def references(value: Json) -> list[tuple[str, str]]:
    """Return what an argument takes from earlier steps, as `(TOKEN/STEP, field)`."""
    if isinstance(value, Mapping):
        inner = cast("Mapping[str, Json]", value)
        if set(inner) == {"from", "field"}:
            return [(str(inner["from"]), str(inner["field"]))]
        return [found for each in inner.values() for found in references(each)]
    if isinstance(value, list | tuple):
        items = cast("Sequence[Json]", value)
        return [found for each in items for found in references(each)]
    return []


def check(resources: Sequence[Resource], kinds: Iterable[str]) -> None:
    """See that plans can be executed with effects of these kinds. Raises `PlanInvalid` naming the step."""
    known, seen = set(kinds), set[str]()
    for step in steps_of(resources):
        if step.kind not in known:
            raise PlanInvalid(
                f"step {step.id}: nothing here can make a {step.kind!r}",
                hint="restore with the version that wrote the plan",
            )
        if step.id in seen:
            raise PlanInvalid(f"step {step.id} is planned twice", hint=f"label it: {step.kind}#LABEL")
        for source, _ in references(step.args):
            if source not in seen:
                raise PlanInvalid(
                    f"step {step.id} takes its arguments from {source}, which does not come before it",
                    hint="put the resources and their steps into the order in which they are to be restored",
                )
        seen.add(step.id)


class PlanRunner:
    """Executes the restore plans of one session, from wherever an earlier process left them.

    `report` is awaited after the outcome of each step, good or bad, also of steps that were found standing. The engine must not settle
    the steps by itself (`Engine.settle(leave=PlanRunner.owns)`): whether one can be made again depends on those before it.
    """

    def __init__(
        self, engine: Engine, stream: str, resources: Sequence[Resource], *, report: Report | None = None
    ) -> None:
        """Take the plans of a session's inventory. Raises `PlanInvalid`."""
        check(resources, engine.kinds)
        self._engine = engine
        self._stream = stream
        self._report = report
        self.steps = steps_of(resources)
        self._results: dict[str, dict[str, Json]] = {}

    @staticmethod
    def owns(key: str) -> bool:
        """Say whether the key of an effect is that of a step."""
        return PLAN in key

    def key(self, step: PlannedStep) -> str:
        """Return the key of a step's effect."""
        return f"{self._stream}{PLAN}{step.id}"

    def open_steps(self) -> list[str]:
        """Return the steps that have not stood in this run, in order."""
        return [step.id for step in self.steps if step.id not in self._results]

    async def run(self) -> dict[str, dict[str, Json]]:
        """Make every step that does not stand; return the result of each, by `TOKEN/STEP`.

        Raises `StepFailed` at the first that the world refuses, and `Unresolved` when only a person can say what became of one.
        """
        self._results.clear()
        for step in self.steps:
            args = self._resolved(step, step.args)
            intent = Intent(self._stream, self.key(step), step.kind, args)
            effect = await self._engine.ensure(intent)
            if effect.status == "done":
                self._results[step.id] = effect.result
            if self._report is not None:
                await self._report(step, effect)
            if effect.status != "done":
                raise StepFailed(step, effect)
        return dict(self._results)

    def _resolved(self, step: PlannedStep, value: Json) -> Json:
        if isinstance(value, Mapping):
            inner = cast("Mapping[str, Json]", value)
            for source, field in references(inner) if set(inner) == {"from", "field"} else ():
                result = self._results[source]
                if field not in result:
                    raise PlanInvalid(f"step {step.id}: {source} gave no {field!r}", hint=f"it gave {result}")
                return result[field]
            return {name: self._resolved(step, each) for name, each in inner.items()}
        if isinstance(value, list | tuple):
            items = cast("Sequence[Json]", value)
            return [self._resolved(step, each) for each in items]
        return value
