# SPDX-License-Identifier: Apache-2.0
"""The course of an update, from journal records alone: what each session went through, and how long its workload stood still.

Within a boot times come from the boot clock; the wall clock only says how far the boots are apart, because the boot clock begins again
with every kernel. A session is in the blackout from when its workload stopped (READY, or as long before it as its client says) to RESTORED
(or FINISHED, or the word to go on), when it may run again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from .breakdown import Marks, Part, Return, parts
from .engine.book import Book, Row
from .states.fold import Session, Update
from .states.table import SessionState as S
from .states.table import UpdateState as U


class Phase(NamedTuple):
    """A phase of a session: the states that it spans, and how its bar looks."""

    name: str
    states: tuple[str, ...]
    mark: str
    color: str


PHASES = (
    Phase("preserving", (S.CREATED, S.PRESERVED), "░", "36"),
    Phase("frozen", (S.READY,), "▒", "33"),
    Phase("kexec", (S.REBOOTING,), "█", "31"),
    Phase("unclaimed", (), "▄", "31"),
    Phase("retrieved", (S.RETRIEVED,), "▓", "35"),
    Phase("running", (S.RESTORED, S.FINISHED), "━", "32"),
)
STOPPED = ("frozen", "kexec", "unclaimed", "retrieved")
BAD = (S.ABORTED, S.LOST, S.FAILED, S.EXPIRED)
UPDATE_WORDS = {U.REBOOTING: "kexec"}


class Span(msgspec.Struct, frozen=True):
    """A phase with its beginning, counted from the beginning of the update, and its length; both in milliseconds."""

    name: str
    at_ms: float
    ms: float


class Line(msgspec.Struct, frozen=True):
    """One session: its phases, and for how long its workload stood still (None: it does still, or never ran again)."""

    id: str
    state: str
    spans: tuple[Span, ...]
    blackout_ms: float | None
    parts: tuple[Part, ...] = ()
    """What the blackout was made of, where its client has measured it."""


class Course(msgspec.Struct, frozen=True):
    """One update. In `blackout_ms` at least one session that ran again stood still, `worst_ms` is the longest of one session."""

    update: str
    state: str
    began_wall_ns: int
    total_ms: float
    phases: tuple[Span, ...]
    sessions: tuple[Line, ...]
    blackout_ms: float | None
    worst_ms: float | None
    reason: str = ""


class Clock:
    """One time axis over all boots, in nanoseconds, that never runs backwards from one boot to the next."""

    def __init__(self) -> None:
        self._latest = 0
        self._anchors: dict[str, int] = {}

    def began(self, boot_id: str) -> int | None:
        """Return when the boot clock of a boot began, None for a boot that was not seen."""
        return self._anchors.get(boot_id)

    def at(self, boot_id: str, wall_ns: int, boot_ns: int) -> int:
        """Return the place of a moment; call it in the order of the journal."""
        if boot_id not in self._anchors:
            self._anchors[boot_id] = max(wall_ns, self._latest) - boot_ns
        now = self._anchors[boot_id] + boot_ns
        self._latest = max(self._latest, now)
        return now


class Story:
    """A book that also remembers every change of state, not only the last entry into each."""

    def __init__(self, records: Iterable[Row] = ()) -> None:
        self.book = Book()
        self.marks: dict[str, Marks] = {}
        self.clock = Clock()
        for record in records:
            self.apply(record)

    def apply(self, record: Row) -> None:
        """Take one record in."""
        old = self.book.streams.get(record.stream)
        new = self.book.apply(record)
        at = self.clock.at(record.boot_id, record.wall_ns, record.boot_ns)
        if old is None or new.state != old.state:
            self.marks.setdefault(record.stream, []).append((at, str(new.state)))

    def course(self, update: str = "") -> Course | None:
        """Return the course of one update (default: the last), or None when there is none."""
        found = [one for one in self.book.updates() if update in ("", one.id)]
        if not found:
            return None
        chosen = found[-1]
        sessions = [one for one in self.book.sessions() if one.update == chosen.id]
        marks = self.marks[chosen.id]
        luod = next((at for at, state in marks if state == U.RECOVERING), None)
        entered = chosen.entered.get(U.RECOVERING)
        kernel = self.clock.began(entered.boot_id) if entered is not None else None
        back = Return(luod if kernel is None else kernel, luod) if luod is not None else None
        return _course(chosen, marks, [(one, self.marks[one.id]) for one in sessions], back)


def _course(
    update: Update, marks: Marks, sessions: Sequence[tuple[Session, Marks]], returned: Return | None
) -> Course:
    moments = [at for at, _ in marks]
    moments += [at for _, each in sessions for at, state in each if state != S.NEW]
    start, end = min(moments), max(moments)
    back = returned.luod if returned is not None else end
    ordered = sorted(sessions, key=lambda pair: _natural(pair[0].id))
    lines = tuple(
        msgspec.structs.replace(_line(session, each, start, end, back), parts=parts(session, each, returned))
        for session, each in ordered
    )
    stops = [
        (span.at_ms, span.at_ms + span.ms)
        for line in lines
        if line.blackout_ms is not None
        for span in line.spans
        if span.name in STOPPED
    ]
    black = round(_covered(stops), 3) if stops else None
    return Course(
        update.id, str(update.state), start, _ms(end - start), _update_spans(marks, start, end), lines, black,
        max((line.blackout_ms for line in lines if line.blackout_ms), default=None),
        update.reason or update.abort_reason,
    )  # fmt: skip


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def _update_spans(marks: Marks, start: int, end: int) -> tuple[Span, ...]:
    ends = [at for at, _ in marks[1:]] + [end]
    return tuple(
        Span(UPDATE_WORDS.get(U(state), state), _ms(at - start), _ms(until - at))
        for (at, state), until in zip(marks, ends, strict=True)
        if state not in (U.DONE, U.ABORTED, U.LOST, U.IDLE)
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts vm10 behind vm9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _line(session: Session, marks: Marks, start: int, end: int, back: int) -> Line:
    """Return a session's line; `back` is when luod was there again in the new kernel, which ends what the kexec itself took."""
    spans: list[Span] = []
    ends = [at for at, _ in marks[1:]] + [end]
    for (at, state), until in zip(marks, ends, strict=True):
        name = next((phase.name for phase in PHASES if state in phase.states), "")
        if not name:
            continue
        if name == "kexec" and at < back < until:
            spans += [
                Span(name, _ms(at - start), _ms(back - at)),
                Span("unclaimed", _ms(back - start), _ms(until - back)),
            ]
            continue
        if spans and spans[-1].name == name:
            spans[-1] = Span(name, spans[-1].at_ms, round(spans[-1].ms + _ms(until - at), 3))
        else:
            began = _stopped_at(session, spans, at) if name == "frozen" else at
            spans.append(Span(name, _ms(began - start), _ms(until - began)))
    stopped = [span.ms for span in spans if span.name in STOPPED]
    never = session.state in (S.READY, S.REBOOTING, S.RETRIEVED, S.LOST, S.FAILED, S.EXPIRED)
    return Line(
        session.id,
        str(session.state),
        tuple(spans),
        round(sum(stopped), 3) if stopped and not never else None,
    )


def _stopped_at(session: Session, spans: list[Span], ready: int) -> int:
    """Return when a session's workload stopped: before READY by what its client measured since, out of the time of preserving."""
    before = spans[-1] if spans else None
    if before is None or not session.spans:
        return ready
    taken = min(sum(session.spans.values()), before.ms)
    spans[-1] = Span(before.name, before.at_ms, round(before.ms - taken, 3))
    return ready - int(taken * 1e6)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much time lies in at least one of the spans."""
    total, seen = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, seen))
        seen = max(seen, last)
    return total


class Blackout(NamedTuple):
    """What the guests felt, in milliseconds: all of them together, and the worst single one."""

    total_ms: float
    worst_ms: float


def of_book(book: Book, update: str = "") -> Course | None:
    """Return the course of an update from a book; of a state that was entered twice only the last time is known."""
    story = Story()
    story.book = book
    entered = [
        (at, stream, state) for stream, record in book.streams.items() for state, at in record.entered.items()
    ]
    for at, stream, state in sorted(entered, key=lambda one: one[0].id):
        story.marks.setdefault(stream, []).append((story.clock.at(at.boot_id, at.wall_ns, at.boot_ns), state))
    return story.course(update)


def blackout(sessions: Iterable[Session]) -> Blackout | None:
    """Return the blackout of an update's sessions, or None when none went through one."""
    book = Book()
    first = None
    for one in sessions:
        book.streams[one.id] = one
        first = first or one
    if first is None:
        return None
    moments = list(first.entered.values())
    book.streams[first.update] = Update(id=first.update, entered={U.PREPARING: moments[0]}, state=U.PREPARING)
    found = of_book(book, first.update)
    if found is None or found.blackout_ms is None or found.worst_ms is None:
        return None
    return Blackout(found.blackout_ms, found.worst_ms)
