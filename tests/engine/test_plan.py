# SPDX-License-Identifier: Apache-2.0
"""Restore plans against a world in which what a step has made dies with the process that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from luod.engine.errors import EffectFailed, Unresolved
from luod.engine.plan import PlanInvalid, PlannedStep, PlanRunner, StepFailed, check, references
from luod.engine.points import STAGES
from luod.engine.ports import Absent, Done, Intent, Probe, Unknown
from luod.engine.runner import Engine
from luod.states.events import Resource, Step
from luod.states.fold import Effect

from .test_engine import Crash, MemoryLog, go, innermost, points_that_die_at

FROM_ALLOC = {"from": "0x20/io.alloc", "field": "id"}
RESOURCES = (
    Resource("0x10", "memfd", plan=(Step("ram.take"),)),
    Resource("0x20", "iommufd", plan=(Step("io.alloc"), Step("io.map#ram0", {"in": FROM_ALLOC, "at": 4096}))),
    Resource("0x30", "vfio", label="disk", plan=(Step("io.attach", {"to": [FROM_ALLOC]}), Step("ram.start"))),
)
STEPS = ["0x10/ram.take", "0x20/io.alloc", "0x20/io.map#ram0", "0x30/io.attach", "0x30/ram.start"]


class World:
    """What stands now: `io.*` dies with its process, `ram.*` outlives it. Ids are never given twice."""

    def __init__(self) -> None:
        self.standing: dict[str, dict[str, Any]] = {}
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.refuse = ""

    def process_dies(self) -> None:
        self.standing = {key: args for key, args in self.standing.items() if "/io." not in key}


class Kind:
    repeatable = False
    carried = False

    def __init__(self, world: World, *, knows: bool = True) -> None:
        self.world = world
        self.knows = knows

    def apply(self, intent: Intent) -> dict[str, Any]:
        if intent.key.endswith(self.world.refuse or "nothing"):
            raise EffectFailed("the device does not answer", errno="ENODEV")
        assert intent.key not in self.world.standing, "made while it stands"
        self.world.standing[intent.key] = intent.args
        self.world.made.append((intent.key, intent.args))
        return {"id": len(self.world.made)}

    def probe(self, intent: Intent) -> Probe:
        if not self.knows:
            return Unknown("it does not say")
        standing = self.world.standing.get(intent.key)
        if standing is None:
            return Absent()
        assert standing == intent.args, "asked after something else than stands"
        return Done({"id": next(n for n, (key, _) in enumerate(self.world.made, 1) if key == intent.key)})


KINDS = ("ram.take", "ram.start", "io.alloc", "io.map", "io.attach")


def engine_in(world: World, log: MemoryLog, *, points: Any = None, kind: Any = Kind) -> Engine:
    more = {} if points is None else {"points": points}
    return Engine(log, {name: kind(world) for name in KINDS}, boot_id=log.boot, **more)


def runner(engine: Engine, report: Any = None) -> PlanRunner:
    return PlanRunner(engine, "vm.1", RESOURCES, report=report)


def test_steps_are_made_in_order_with_the_results_of_earlier_ones() -> None:
    world, told = World(), []

    async def report(step: PlannedStep, effect: Effect) -> None:
        told.append((step.id, effect.status))

    plan = runner(engine_in(world, MemoryLog()), report)
    assert plan.open_steps() == STEPS
    results = go(plan.run)
    assert [key.partition("/plan/")[2] for key, _ in world.made] == STEPS
    assert world.made[2][1] == {"in": 2, "at": 4096}
    assert world.made[3][1] == {"to": [2]}
    assert told == [(step, "done") for step in STEPS]
    assert results["0x20/io.alloc"] == {"id": 2}
    assert plan.open_steps() == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("step", STEPS)
def test_a_process_that_dies_anywhere_is_followed_by_one_that_ends_the_plan(step: str, stage: str) -> None:
    world, log = World(), MemoryLog()
    dying = engine_in(world, log, points=points_that_die_at(f"vm.1/plan/{step}:{stage}"))
    with pytest.raises(BaseException) as caught:  # noqa: PT011  (a Crash, or a group around it)
        go(runner(dying).run)
    assert isinstance(innermost(caught.value), Crash)
    world.process_dies()
    engine = engine_in(world, log)
    assert go(engine.settle, leave=PlanRunner.owns) == []
    go(runner(engine).run)
    assert sorted(key.partition("/plan/")[2] for key in world.standing) == sorted(STEPS)
    newest = next(n for n, (key, _) in reversed(list(enumerate(world.made, 1))) if key.endswith("io.alloc"))
    assert world.standing["vm.1/plan/0x20/io.map#ram0"]["in"] == newest
    assert sum(key.endswith("ram.start") for key, _ in world.made) == 1, "what stands is not made again"
    assert not engine.book.streams["vm.1"].doubts()
    rows = len(log.rows)
    go(runner(engine).run)
    assert len(log.rows) == rows, "a plan that stands writes nothing"


def test_settling_a_step_by_itself_would_make_it_out_of_order() -> None:
    """The mutant: without `leave`, what the dead process had in hand is made before what it depends on."""
    world, log = World(), MemoryLog()
    dying = engine_in(world, log, points=points_that_die_at("vm.1/plan/0x20/io.map#ram0:after_call"))
    with pytest.raises(BaseException):  # noqa: B017, PT011
        go(runner(dying).run)
    world.process_dies()
    engine = engine_in(world, log)
    go(engine.settle)
    assert world.made[-1] == ("vm.1/plan/0x20/io.map#ram0", {"in": 2, "at": 4096}), "in an IOAS that is gone"


def test_a_refused_step_stops_the_plan_and_says_what_to_do() -> None:
    world, log, told = World(), MemoryLog(), []
    world.refuse = "io.attach"

    async def report(step: PlannedStep, effect: Effect) -> None:
        told.append((step.id, effect.status, effect.errno))

    engine = engine_in(world, log)
    plan = runner(engine, report)
    with pytest.raises(
        StepFailed, match=r"0x30/io.attach \(disk\) failed: the device does not answer"
    ) as caught:
        go(plan.run)
    assert caught.value.errno == "ENODEV"
    assert "luoctl resolve" in caught.value.hint
    assert told[-1] == ("0x30/io.attach", "failed", "ENODEV")
    assert plan.open_steps() == STEPS[3:]
    assert not any(key.endswith("ram.start") for key in world.standing)
    world.refuse = ""
    go(plan.run)
    assert [key for key, _ in world.made].count("vm.1/plan/0x20/io.alloc") == 1
    assert plan.open_steps() == []


def test_another_boot_makes_everything_again() -> None:
    world, log = World(), MemoryLog()
    dying = engine_in(world, log, points=points_that_die_at("vm.1/plan/0x30/io.attach:after_call"))
    with pytest.raises(BaseException):  # noqa: B017, PT011
        go(runner(dying).run)
    log.boot = "boot-2"
    fresh = World()
    engine = engine_in(fresh, log)
    go(runner(engine).run)
    assert [key.partition("/plan/")[2] for key, _ in fresh.made] == STEPS
    assert [row.type for row in log.rows].count("effect.voided.v1") == 1, (
        "what was in doubt went with its boot"
    )


class Mute(Kind):
    def __init__(self, world: World) -> None:
        super().__init__(world, knows=False)


def test_a_doubt_that_no_probe_can_answer_is_a_persons() -> None:
    world, log = World(), MemoryLog()
    dying = engine_in(world, log, points=points_that_die_at("vm.1/plan/0x10/ram.take:after_call"))
    with pytest.raises(BaseException):  # noqa: B017, PT011
        go(runner(dying).run)
    engine = engine_in(world, log, kind=Mute)
    with pytest.raises(Unresolved, match=r"ram\.take is in doubt"):
        go(runner(engine).run)
    go(engine.resolve, "vm.1/plan/0x10/ram.take", "done")
    world.refuse = "io.alloc"
    with pytest.raises(StepFailed):  # it is believed from here on; the next step asks the world
        go(runner(engine).run)
    assert [key for key, _ in world.made] == ["vm.1/plan/0x10/ram.take"]


BAD: dict[str, tuple[tuple[Resource, ...], str]] = {
    "nothing can make it": ((Resource("0x1", "x", plan=(Step("tape.rewind"),)),), "nothing here can make"),
    "twice": ((Resource("0x1", "x", plan=(Step("io.map"), Step("io.map"))),), "planned twice"),
    "from what comes later": ((*RESOURCES[2:], *RESOURCES[:2]), "does not come before it"),
    "from nowhere": (
        (Resource("0x1", "x", plan=(Step("io.map", {"in": FROM_ALLOC}),)),),
        "does not come before",
    ),
}


@pytest.mark.parametrize(("resources", "words"), BAD.values(), ids=BAD)
def test_a_plan_that_cannot_be_executed_is_refused_whole(resources: tuple[Resource, ...], words: str) -> None:
    with pytest.raises(PlanInvalid, match=words):
        check(resources, KINDS)


def test_a_field_that_a_result_does_not_have_is_named() -> None:
    wrong = Step("io.map", {"in": {"from": "0x20/io.alloc", "field": "ioas"}})
    resources = (Resource("0x20", "iommufd", plan=(Step("io.alloc"), wrong)),)
    world = World()
    plan = PlanRunner(engine_in(world, MemoryLog()), "vm.1", resources)
    with pytest.raises(PlanInvalid, match="gave no 'ioas'"):
        go(plan.run)
    assert [key for key, _ in world.made] == ["vm.1/plan/0x20/io.alloc"]


NESTED: Callable[[], object] = lambda: {"a": [FROM_ALLOC, 1], "b": {"c": FROM_ALLOC}, "d": "text", "from": 1}  # noqa: E731


def test_references_are_found_however_deep() -> None:
    assert references(NESTED()) == [("0x20/io.alloc", "id")] * 2
