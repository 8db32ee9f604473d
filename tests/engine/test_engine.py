# SPDX-License-Identifier: Apache-2.0
"""The engine against worlds that die under it: every effect once, every intent settled, nothing believed that is not durable."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from luod.engine import runner
from luod.engine.book import Book
from luod.engine.errors import EffectFailed, Refused
from luod.engine.ports import Absent, Done, Intent, Probe, Unknown
from luod.engine.reconcile import Action
from luod.engine.runner import Engine
from luod.journal.record import Entry, Record
from luod.states import codec
from luod.states import events as ev
from luod.states.errors import IllegalTransition

BOUND = ev.SessionBound("vm", 1, ev.Owner(1, 1, 1))


class Crash(BaseException):
    """luod dies here."""


class MemoryLog:
    """A journal in a list: what is in it is durable."""

    def __init__(self, boot: str = "boot-1") -> None:
        self.rows: list[Record] = []
        self.boot = boot
        self.writes = 0

    def submit(self, entries: Sequence[Entry]) -> Future[list[Record]]:
        new = []
        for entry in entries:
            tag, body = codec.encode(entry.event)
            seq = 1 + sum(row.stream == entry.stream for row in [*self.rows, *new])
            number = len(self.rows) + len(new) + 1
            new.append(
                Record(
                    number, entry.stream, seq, tag, number, number, self.boot, "run", entry.cause, body, b""
                )
            )
        self.rows += new
        self.writes += 1
        future: Future[list[Record]] = Future()
        future.set_result(new)
        return future

    def read(self, after: int = 0) -> Iterator[Record]:
        return iter(self.rows[after:])


class Counted:
    """An effect on a set of names; making one twice in a boot is counted."""

    carried = False

    def __init__(self, repeatable: bool = False, knows: bool = True) -> None:
        self.repeatable = repeatable
        self.knows = knows
        self.made: list[str] = []
        self.fail = ""

    def apply(self, intent: Intent) -> dict[str, Any]:
        if self.fail:
            raise EffectFailed("no", errno=self.fail)
        self.made.append(intent.key)
        return {"n": len(self.made)}

    def probe(self, intent: Intent) -> Probe:
        if not self.knows:
            return Unknown("cannot tell")
        return Done({"probed": True}) if intent.key in self.made else Absent()


def go(function: Any, *args: Any, **kwargs: Any) -> Any:
    return anyio.run(functools.partial(function, *args, **kwargs), backend="asyncio")


def intent(key: str = "vm.1/create", kind: str = "make") -> Intent:
    return Intent("vm.1", key, kind)


def points_that_die_at(where: str) -> Any:
    def reached(key: str, stage: str) -> None:
        if f"{key}:{stage}" == where:
            raise Crash(where)

    return reached


def crash(engine: Engine, *intents: Intent) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011  (a Crash, or a group around it)
        go(engine.perform, *intents)
    assert isinstance(innermost(caught.value), Crash), caught.value


def innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def test_an_event_that_may_not_happen_is_not_written() -> None:
    log = MemoryLog()
    engine = Engine(log, {}, boot_id="boot-1")
    with pytest.raises(IllegalTransition, match="finished cannot happen"):
        go(engine.record, ("vm.1", BOUND), ("vm.1", ev.SessionFinished("marker")))
    assert log.rows == []
    assert engine.book.session("vm.1") is None


def test_a_batch_costs_two_writes_whatever_its_size() -> None:
    log, made = MemoryLog(), Counted()
    engine = Engine(log, {"make": made}, boot_id="boot-1")
    done = go(engine.perform, *(Intent(f"vm{n}.1", f"vm{n}.1/create", "make") for n in range(20)))
    assert log.writes == 2
    assert [effect.status for effect in done] == ["done"] * 20
    assert len(made.made) == 20


def test_a_done_effect_is_not_made_again_unless_asked() -> None:
    made = Counted()
    engine = Engine(MemoryLog(), {"make": made}, boot_id="boot-1")
    go(engine.perform, intent())
    go(engine.perform, intent())
    assert made.made == ["vm.1/create"]
    (effect,) = go(engine.perform, intent(), again=True)
    assert (effect.attempt, len(made.made)) == (2, 2)


def test_a_refusal_is_an_outcome_with_its_errno() -> None:
    made = Counted()
    made.fail = "EBUSY"
    engine = Engine(MemoryLog(), {"make": made}, boot_id="boot-1")
    (effect,) = go(engine.perform, intent())
    assert (effect.status, effect.errno) == ("failed", "EBUSY")
    made.fail = ""
    (effect,) = go(engine.perform, intent())
    assert (effect.status, effect.attempt) == ("done", 2)


STAGES = ("before_intent", "after_intent", "after_call", "after_outcome")


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_stage_the_effect_is_made_once(stage: str) -> None:
    log, made = MemoryLog(), Counted()
    crash(
        Engine(log, {"make": made}, boot_id="boot-1", points=points_that_die_at(f"vm.1/create:{stage}")),
        intent(),
    )
    engine = Engine(log, {"make": made}, boot_id="boot-1")
    assert go(engine.settle) == []
    go(engine.perform, intent())
    assert made.made == ["vm.1/create"]
    before = len(log.rows)
    again = Engine(log, {"make": made}, boot_id="boot-1")
    go(again.settle)
    assert len(log.rows) == before, "a second recovery writes nothing"


@pytest.mark.parametrize(("repeatable", "status", "made_times"), [(False, "unknown", 1), (True, "done", 2)])
def test_an_outcome_that_nobody_knows(repeatable: bool, status: str, made_times: int) -> None:
    log, made = MemoryLog(), Counted(repeatable=repeatable, knows=False)
    crash(
        Engine(log, {"make": made}, boot_id="boot-1", points=points_that_die_at("vm.1/create:after_call")),
        intent(),
    )
    engine = Engine(log, {"make": made}, boot_id="boot-1")
    asked = go(engine.settle)
    effect = engine.book.streams["vm.1"].effects["vm.1/create"]
    assert (effect.status, len(made.made)) == (status, made_times)
    assert bool(asked) == (not repeatable)
    if asked:
        with pytest.raises(Refused, match="in doubt"):
            go(engine.perform, intent())
        with pytest.raises(Refused, match="no decision"):
            go(engine.resolve, "vm.1/create", "perhaps")
        assert go(engine.resolve, "vm.1/create", "done").status == "done"
        with pytest.raises(Refused, match="no effect"):
            go(engine.resolve, "vm.1/create", "done")


def test_another_boot_voids_what_was_in_doubt() -> None:
    log, made = MemoryLog(), Counted()
    crash(
        Engine(log, {"make": made}, boot_id="boot-1", points=points_that_die_at("vm.1/create:after_intent")),
        intent(),
    )
    log.boot = "boot-2"
    engine = Engine(log, {"make": made}, boot_id="boot-2")
    go(engine.settle)
    assert engine.book.streams["vm.1"].effects["vm.1/create"].status == "voided"
    assert made.made == []


def test_a_stream_of_a_newer_version_is_shown_but_not_driven() -> None:
    log = MemoryLog()
    go(Engine(log, {}, boot_id="boot-1").record, ("vm.1", BOUND))
    log.rows.append(Record(2, "vm.1", 2, "session.teleported.v1", 2, 2, "boot-1", "run", None, b"{}", b""))
    engine = Engine(log, {}, boot_id="boot-1")
    assert engine.book.session("vm.1") is not None
    assert "session.teleported.v1" in engine.book.streams["vm.1"].anomalies[0]
    with pytest.raises(Exception, match="does not know"):
        go(engine.record, ("vm.1", ev.SessionAbortRequested("x")))


class Life(RuleBasedStateMachine):
    """Effects, kills at random points (also inside recovery), restarts and new boots."""

    KEYS = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.log = MemoryLog()
        self.boots = 1
        self.worlds: list[Counted] = [Counted()]
        self.engine: Engine | None = None
        self.fuse: int | None = None
        self.start(None)

    def reached(self, _key: str, _stage: str) -> None:
        if self.fuse is not None:
            if self.fuse == 0:
                raise Crash
            self.fuse -= 1

    def attempt(self, function: Any, *args: Any) -> None:
        try:
            go(function, *args)
        except BaseException as error:
            if not isinstance(innermost(error), Crash):
                raise
            self.engine = None

    def start(self, fuse: int | None) -> None:
        self.fuse = fuse
        self.engine = Engine(
            self.log, {"make": self.worlds[-1]}, boot_id=f"boot-{self.boots}", points=self.reached
        )
        self.attempt(self.engine.settle)

    @precondition(lambda self: self.engine is not None)
    @rule(
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True),
        fuse=st.none() | st.integers(0, 12),
    )
    def perform(self, keys: list[str], fuse: int | None) -> None:
        self.fuse = fuse
        assert self.engine is not None
        self.attempt(self.engine.perform, *(Intent(f"{key}.1", f"{key}.1/make", "make") for key in keys))

    @precondition(lambda self: self.engine is None)
    @rule(fuse=st.none() | st.integers(0, 12))
    def restart(self, fuse: int | None) -> None:
        self.start(fuse)

    @rule()
    def kill(self) -> None:
        self.engine = None

    @precondition(lambda self: self.boots < 4)
    @rule()
    def reboot(self) -> None:
        self.boots += 1
        self.log.boot = f"boot-{self.boots}"
        self.worlds.append(Counted())
        self.engine = None

    @invariant()
    def nothing_is_made_twice_in_a_boot(self) -> None:
        for world in self.worlds:
            assert len(world.made) == len(set(world.made)), world.made

    @invariant()
    def nothing_is_made_without_an_intent(self) -> None:
        for number, world in enumerate(self.worlds, 1):
            intents = {
                codec.decode(row.type, row.body).key  # type: ignore[attr-defined]
                for row in self.log.rows
                if row.type.startswith("effect.intended") and row.boot_id == f"boot-{number}"
            }
            assert set(world.made) <= intents

    @invariant()
    def a_running_engine_knows_the_world(self) -> None:
        if self.engine is None:
            return
        done = {
            effect.key
            for record in self.engine.book.streams.values()
            for effect in record.effects.values()
            if effect.status == "done" and effect.boot_id == f"boot-{self.boots}"
        }
        assert done == set(self.worlds[-1].made)

    @invariant()
    def replay_gives_the_same_state(self) -> None:
        if self.engine is not None:
            assert Book(self.log.rows).streams == self.engine.book.streams


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_blind_redo_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: whatever is in doubt is made again."""
    monkeypatch.setattr(runner, "effect_action", lambda *_, **__: Action.REDO)
    with pytest.raises(AssertionError):
        test_killed_at_every_stage_the_effect_is_made_once("after_call")


def test_effect_before_intent_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the call is made before its intent is durable."""
    honest = Engine._run

    async def hasty(self: Engine, intents: Sequence[Intent], saying: Any = ()) -> None:
        for one in intents:
            self._effects[one.kind].apply(one)
        await honest(self, intents, saying)

    monkeypatch.setattr(Engine, "_run", hasty)
    with pytest.raises(AssertionError):
        test_killed_at_every_stage_the_effect_is_made_once("before_intent")
