# SPDX-License-Identifier: Apache-2.0
"""The engine: records events, makes effects, and puts right what a dead process left in doubt.

This is the only asynchronous part. Its rules, which everything else rests on:

- An event is judged, made durable, and only then believed (`record`).
- An effect is intended durably, made once, and its outcome is durable before anything is built on it (`perform`). A batch of
  independent effects costs one fsync of intents and one of outcomes, whatever its size.
- A call is never cancelled midway. Who waits may stop waiting; the call goes on and its outcome is recorded.
- On start every intent without an outcome is probed and settled by `reconcile.EFFECT_RULES` (`settle`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import Any, Protocol

import anyio
import anyio.to_thread
from msgspec.structs import replace

from ..journal.record import Entry, Record
from ..states.errors import LuodError
from ..states.events import EffectIntended, EffectOutcome, EffectVoided, Event
from ..states.fold import Effect as EffectRecord
from .book import Book
from .errors import EngineError, Refused, Unresolved
from .points import Points, nowhere
from .ports import Absent, Done, Effect, Intent, Probe, Unknown
from .reconcile import Action, Answer, effect_action


class Log(Protocol):
    """What the engine needs of a journal."""

    def submit(self, entries: Sequence[Entry]) -> Future[list[Record]]:
        """Write entries in one transaction; the future resolves once they are durable."""
        ...

    def read(self, after: int = 0) -> Iterator[Record]:
        """Return the records after a journal id."""
        ...


Listener = Callable[[Record], None]


class Engine:
    """Drives streams of one journal in one boot.

    `effects` maps each effect kind to what makes and probes it. `boot_id` is this boot's; `points` are the crash points.
    """

    def __init__(
        self,
        log: Log,
        effects: Mapping[str, Effect],
        *,
        boot_id: str,
        points: Points = nowhere,
        limit: int = 32,
    ) -> None:
        self.log = log
        self.boot_id = boot_id
        self.book = Book(log.read())
        self.listeners: list[Listener] = []
        self._effects = effects
        self._points = points
        self._locks: dict[str, anyio.Lock] = {}
        self._threads = anyio.CapacityLimiter(limit)
        self._busy: set[str] = set()
        self._idle: anyio.Event | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of effects that can be made here."""
        return frozenset(self._effects)

    # -- events

    async def record(self, *events: tuple[str, Event], cause: int | None = None) -> list[Record]:
        """Judge events, write them in one transaction, and believe them once they are durable.

        Raises `IllegalTransition` when one of them may not happen now (then none is written) and `JournalError` when the
        journal cannot be written, after which this process must end: whether the records exist is unknown.
        """
        async with AsyncExitStack() as stack:
            for stream in sorted({stream for stream, _ in events}):
                await stack.enter_async_context(self._locks.setdefault(stream, anyio.Lock()))
            self.book.admit(events, self.boot_id)
            return await self._write([Entry(stream, event, cause) for stream, event in events])

    async def _write(self, entries: Sequence[Entry]) -> list[Record]:
        records: list[Record] = []
        with anyio.CancelScope(shield=True):
            records = await asyncio.wrap_future(self.log.submit(entries))
        for record in records:
            self.book.apply(record)
        for record in records:
            for listener in self.listeners:
                listener(record)
        return records

    # -- effects

    async def perform(
        self, *intents: Intent, again: bool = False, saying: Sequence[tuple[str, Event]] = ()
    ) -> list[EffectRecord]:
        """Make effects, at the same time where there are several, and return what became of each.

        An effect that this boot has already done is not made again, unless `again`: its old outcome is returned. A refusal by the
        world is an outcome with status `failed`, not an exception. `saying` are events that become durable in the same transaction
        as the intents, before them.
        One that is under way already, for another caller, is waited for first. Raises `Refused` when one of them is in doubt.
        """
        with anyio.CancelScope(shield=True):
            while not self._busy.isdisjoint(intent.key for intent in intents):
                self._idle = self._idle or anyio.Event()
                await self._idle.wait()
            todo = [next_try for intent in intents if (next_try := self._next_try(intent, again))]
            await self._run_alone(todo, saying)
        return [self._effect(intent) for intent in intents]

    async def ensure(self, intent: Intent) -> EffectRecord:
        """See that an effect stands, whatever an earlier attempt has left: its probe decides, asked with these arguments.

        For effects that can vanish after their outcome is recorded, as an open fd does with its process. What the probe cannot tell is
        made again if it is repeatable; else a recorded outcome is believed, and a doubt raises `Unresolved`. A refusal by the world is
        an outcome with status `failed`.
        """
        with anyio.CancelScope(shield=True):
            while intent.key in self._busy:
                self._idle = self._idle or anyio.Event()
                await self._idle.wait()
            record = self.book.streams.get(intent.stream)
            old = record.effects.get(intent.key) if record else None
            if old is not None and old.boot_id != self.boot_id and old.status in ("intended", "unknown"):
                await self._settle(intent.stream, old)
                old = self._effect(intent)
            if old is not None and await self._stands(intent, old):
                return self._effect(intent)
            attempt = old.attempt + 1 if old else intent.attempt
            await self._run_alone([replace(intent, attempt=attempt)])
        return self._effect(intent)

    async def _stands(self, intent: Intent, old: EffectRecord) -> bool:
        """Say whether an effect of this boot is still in the world; one that was in doubt and is there gets its outcome."""
        if old.boot_id != self.boot_id or old.status in ("failed", "voided"):
            return False
        adapter = self._adapter(intent)
        answer = await anyio.to_thread.run_sync(self._probe, adapter, intent)
        doubtful = old.status != "done"
        if isinstance(answer, Done):
            if doubtful:
                adopted = EffectOutcome(intent.key, "done", how="adopted", result=answer.result)
                await self.record((intent.stream, adopted))
            return True
        if isinstance(answer, Absent) or adapter.repeatable:
            return False
        if doubtful:
            await self._unknown(intent, old, answer.why or "the world cannot tell")
            raise Unresolved(
                f"{intent.key} is in doubt: {answer.why}", hint=f"`luoctl resolve {intent.key} ...`"
            )
        return True

    def _adapter(self, intent: Intent) -> Effect:
        adapter = self._effects.get(intent.kind)
        if adapter is None:
            raise EngineError(f"{intent.key}: no adapter for effects of kind {intent.kind!r}")
        return adapter

    async def _run_alone(self, intents: Sequence[Intent], saying: Sequence[tuple[str, Event]] = ()) -> None:
        keys = {intent.key for intent in intents}
        self._busy |= keys
        try:
            await self._run(intents, saying)
        finally:
            self._busy -= keys
            if self._idle is not None:
                self._idle.set()
                self._idle = None

    async def _run(self, intents: Sequence[Intent], saying: Sequence[tuple[str, Event]] = ()) -> None:
        for intent in intents:
            self._points(intent.key, "before_intent")
        planned = [(i.stream, EffectIntended(i.key, i.kind, i.args, i.attempt)) for i in intents]
        if not planned and not saying:
            return
        await self.record(*saying, *planned)
        for intent in intents:
            self._points(intent.key, "after_intent")
        outcomes: dict[str, EffectOutcome] = {}

        async def call(intent: Intent) -> None:
            outcomes[intent.key] = await anyio.to_thread.run_sync(self._call, intent, limiter=self._threads)

        async with anyio.create_task_group() as group:
            for intent in intents:
                group.start_soon(call, intent)
        await self.record(*((intent.stream, outcomes[intent.key]) for intent in intents))
        for intent in intents:
            self._points(intent.key, "after_outcome")

    def _call(self, intent: Intent) -> EffectOutcome:
        try:
            result = self._effects[intent.kind].apply(intent)
        except LuodError as error:
            outcome = EffectOutcome(intent.key, "failed", errno=errno_name(error), message=str(error)[:500])
        except OSError as error:
            outcome = EffectOutcome(intent.key, "failed", errno=errno_name(error), message=str(error)[:500])
        else:
            outcome = EffectOutcome(intent.key, "done", result=result)
        self._points(intent.key, "after_call")
        return outcome

    def _next_try(self, intent: Intent, again: bool) -> Intent | None:
        """Return the intent to make, with its attempt number, or None for one that is already done."""
        record = self.book.streams.get(intent.stream)
        old = record.effects.get(intent.key) if record else None
        if old and old.status in ("intended", "unknown"):
            raise Refused(
                "IN_DOUBT",
                f"{intent.key} is in doubt",
                hint=f"settle it with `luoctl resolve {intent.key} ...`",
            )
        self._adapter(intent)
        if old is None:
            return intent
        if old.status == "done" and old.boot_id == self.boot_id and not again:
            return None
        return replace(intent, attempt=old.attempt + 1)

    def _effect(self, intent: Intent) -> EffectRecord:
        return self.book.streams[intent.stream].effects[intent.key]

    # -- reconciliation

    async def settle(self, *, leave: Callable[[str], bool] = lambda _key: False) -> list[EffectRecord]:
        """Settle every effect in doubt but those whose key `leave` claims; return those that only a person can settle.

        Running it twice writes nothing the second time.
        """
        doubts = [
            (stream, effect)
            for stream, record in self.book.streams.items()
            for effect in record.doubts()
            if stream not in self.book.unknown and not leave(effect.key)
        ]
        asked: list[EffectRecord] = []
        for stream, effect in doubts:
            if await self._settle(stream, effect) is Action.ASK:
                asked.append(self.book.streams[stream].effects[effect.key])
        return asked

    async def _settle(self, stream: str, effect: EffectRecord) -> Action:
        intent = Intent(stream, effect.key, effect.kind, effect.args, effect.attempt)
        adapter = self._effects.get(effect.kind)
        if adapter is None:
            await self._unknown(intent, effect, f"no adapter for effects of kind {effect.kind!r}")
            return Action.ASK
        boot = "same" if effect.boot_id == self.boot_id else "other"
        answer: Probe = Unknown()
        if boot == "same":
            answer = await anyio.to_thread.run_sync(self._probe, adapter, intent)
        name: Answer = (
            "done" if isinstance(answer, Done) else "absent" if isinstance(answer, Absent) else "unknown"
        )
        action = effect_action(
            "same" if boot == "same" else "other",
            name,
            repeatable=adapter.repeatable,
            carried=adapter.carried,
        )
        match action:
            case Action.ADOPT:
                how = "adopted" if boot == "same" else "observed"
                result = answer.result if isinstance(answer, Done) else {}
                await self.record((stream, EffectOutcome(effect.key, "done", how=how, result=result)))  # type: ignore[arg-type]
            case Action.DENY:
                await self.record(
                    (stream, EffectOutcome(effect.key, "failed", how="observed", message="it was not made"))
                )
            case Action.VOID:
                await self.record((stream, EffectVoided(effect.key, "the boot that held it has ended")))
            case Action.REDO:
                with anyio.CancelScope(shield=True):
                    again = Intent(stream, effect.key, effect.kind, effect.args, effect.attempt + 1)
                    await self._run([again])
            case Action.ASK:
                why = answer.why if isinstance(answer, Unknown) else ""
                await self._unknown(intent, effect, why or "the world cannot tell")
        return action

    async def _unknown(self, intent: Intent, effect: EffectRecord, why: str) -> None:
        if effect.status != "unknown":
            await self.record(
                (intent.stream, EffectOutcome(effect.key, "unknown", how="observed", message=why))
            )

    def _probe(self, adapter: Effect, intent: Intent) -> Probe:
        try:
            return adapter.probe(intent)
        except (LuodError, OSError) as error:
            return Unknown(str(error))

    async def resolve(self, key: str, decision: str) -> EffectRecord:
        """Let a person settle an effect in doubt: `done`, `absent` (it did not happen), `retry` or `give-up`.

        Raises `Refused` for a key that is not in doubt or a decision that does not exist.
        """
        for stream, record in self.book.streams.items():
            effect = record.effects.get(key)
            if effect is None or key in self._busy or effect.status not in ("intended", "unknown"):
                continue
            match decision:
                case "done":
                    await self.record((stream, EffectOutcome(key, "done", how="resolved")))
                case "absent" | "give-up":
                    await self.record(
                        (stream, EffectOutcome(key, "failed", how="resolved", message=decision))
                    )
                case "retry":
                    with anyio.CancelScope(shield=True):
                        again = Intent(stream, key, effect.kind, effect.args, effect.attempt + 1)
                        await self._run_alone([again])
                case _:
                    raise Refused(
                        "BAD_FIELD", f"{decision!r} is no decision", hint="done, absent, retry or give-up"
                    )
            return self.book.streams[stream].effects[key]
        raise Refused(
            "NOT_IN_DOUBT", f"no effect {key!r} is in doubt", hint="`luoctl status` lists those that are"
        )

    def doubts(self) -> Iterable[tuple[str, EffectRecord]]:
        """Return every effect in doubt with its stream."""
        for stream, record in self.book.streams.items():
            for effect in record.doubts():
                yield stream, effect


def errno_name(error: Any) -> str:
    """Return the symbolic errno that an error carries, or the empty text."""
    import errno as numbers

    name = getattr(error, "errno_name", None)
    if isinstance(name, str):
        return name  # of two names for a number, the one that the kernel uses
    number = getattr(error, "errno", "")
    return numbers.errorcode.get(number, str(number)) if isinstance(number, int) else str(number or "")
