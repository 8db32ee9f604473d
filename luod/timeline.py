# SPDX-License-Identifier: Apache-2.0
"""The picture of an update, from journal records alone: one bar a session, and what the blackout was made of.

Within a boot times come from the boot clock; the wall clock only says how far the boots are apart, because the boot clock begins again
with every kernel. A session is in the blackout from READY, when its workload stopped, to RESTORED (or FINISHED, or the word to go on),
when it may run again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

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
MAX_BARS = 16
NOTHING = "no update in this journal\n"
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


class Course(msgspec.Struct, frozen=True):
    """One update. `blackout_ms` runs from the first READY to the last session that ran again, `worst_ms` is the longest of one."""

    update: str
    state: str
    began_wall_ns: int
    total_ms: float
    phases: tuple[Span, ...]
    sessions: tuple[Line, ...]
    blackout_ms: float | None
    worst_ms: float | None
    reason: str = ""


Marks = list[tuple[int, str]]


class Clock:
    """One time axis over all boots, in nanoseconds, that never runs backwards from one boot to the next."""

    def __init__(self) -> None:
        self._latest = 0
        self._anchors: dict[str, int] = {}

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
        self._clock = Clock()
        for record in records:
            self.apply(record)

    def apply(self, record: Row) -> None:
        """Take one record in."""
        old = self.book.streams.get(record.stream)
        new = self.book.apply(record)
        at = self._clock.at(record.boot_id, record.wall_ns, record.boot_ns)
        if old is None or new.state != old.state:
            self.marks.setdefault(record.stream, []).append((at, str(new.state)))

    def course(self, update: str = "") -> Course | None:
        """Return the course of one update (default: the last), or None when there is none."""
        found = [one for one in self.book.updates() if update in ("", one.id)]
        if not found:
            return None
        chosen = found[-1]
        sessions = [one for one in self.book.sessions() if one.update == chosen.id]
        return _course(chosen, self.marks[chosen.id], [(one, self.marks[one.id]) for one in sessions])


def _course(update: Update, marks: Marks, sessions: Sequence[tuple[Session, Marks]]) -> Course:
    moments = [at for at, _ in marks]
    moments += [at for _, each in sessions for at, state in each if state != S.NEW]
    start, end = min(moments), max(moments)
    back = next((at for at, state in marks if state == U.RECOVERING), end)
    ordered = sorted(sessions, key=lambda pair: _natural(pair[0].id))
    lines = tuple(_line(session, each, start, end, back) for session, each in ordered)
    stops = [span for line in lines if line.blackout_ms is not None for span in _last_stop(line)]
    black = max(one.at_ms + one.ms for one in stops) - min(one.at_ms for one in stops) if stops else None
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
            spans.append(Span(name, _ms(at - start), _ms(until - at)))
    stopped = [span.ms for span in spans if span.name in STOPPED]
    never = session.state in (S.READY, S.REBOOTING, S.RETRIEVED, S.LOST, S.FAILED, S.EXPIRED)
    return Line(
        session.id,
        str(session.state),
        tuple(spans),
        round(sum(stopped), 3) if stopped and not never else None,
    )


def _last_stop(line: Line) -> list[Span]:
    """Return the spans of the last time that a session stood still."""
    out: list[Span] = []
    for span in reversed(line.spans):
        if span.name in STOPPED:
            out.insert(0, span)
        elif out:
            break
    return out


# -- drawing ------------------------------------------------------------------------------------------------------------------


def draw(
    records: Iterable[Row],
    *,
    width: int = 80,
    color: bool = False,
    update: str = "",
    everything: bool = False,
) -> str:
    """Draw one update of a journal (default: its last), see `draw_course`."""
    found = Story(records).course(update)
    return (
        draw_course(found, width=width, color=color, everything=everything) if found is not None else NOTHING
    )


def draw_course(course: Course, *, width: int = 80, color: bool = False, everything: bool = False) -> str:
    """Draw a course, at most `width` columns wide (at least 60). Returns text that ends in a newline.

    With more than `MAX_BARS` sessions only some have a bar, unless `everything`: those that ended badly, and the rest from the
    shortest blackout to the longest at even distances.
    """
    return _Picture(course, max(width, 60), color, everything).text()


class _Picture:
    def __init__(self, course: Course, width: int, color: bool, everything: bool) -> None:
        self.course = course
        self.color = color
        self.everything = everything
        names = [len(line.id) for line in course.sessions]
        self.label = min(max([*names, len(course.update)]), max(width // 4, 12))
        self.note = 10
        self.room = width - self.label - self.note - 2
        self.scale = self.room / max(course.total_ms, 0.001)

    def text(self) -> str:
        course = self.course
        shown = list(course.sessions)
        if len(shown) > MAX_BARS and not self.everything:
            shown = _chosen(shown)
        many = f"{len(course.sessions)} session{'s' if len(course.sessions) != 1 else ''}"
        lines = [
            f"{self._paint(course.update, '1')}: {course.state}, {many}, {_span(course.total_ms)}"
            + (f" - {course.reason}" if course.reason else ""),
            "",
            self._row("", self._axis(), ""),
            self._row(course.update, self._phases(), ""),
        ]
        for line in shown:
            lines.append(self._row(line.id, self._bar(line), self._beside(line)))
        if len(shown) < len(course.sessions):
            lines.append(self._row("...", f"and {len(course.sessions) - len(shown)} more in between", ""))
        lines += ["", "  ".join(f"{self._paint(one.mark * 2, one.color)} {one.name}" for one in PHASES)]
        lines += self._summary()
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def _row(self, label: str, middle: str, note: str) -> str:
        if len(label) > self.label:
            label = label[: self.label - 1] + "…"
        return f"{label:<{self.label}} {middle} {note:>{self.note - 1}}"

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and code else text

    def _cell(self, ms: float) -> int:
        return min(int(ms * self.scale), self.room - 1)

    def _axis(self) -> str:
        step = _step(self.course.total_ms / max(self.room // 12, 1))
        cells = [" "] * self.room
        at = 0.0
        while at <= self.course.total_ms:
            text, place = ("0 ms" if at == 0 else f"{at:g}"), round(at * self.scale)
            if place + len(text) > self.room:
                break
            cells[place : place + len(text)] = text
            at += step
        return "".join(cells)

    def _phases(self) -> str:
        """The phases of the update: each with its name and length where there is room."""
        cells = [" "] * self.room
        for span in self.course.phases:
            first, last = self._cell(span.at_ms), self._cell(span.at_ms + span.ms)
            cells[first] = "|"
            for text in (f"{span.name} {span.ms:.0f}", span.name, span.name[:4], ""):
                if len(text) < last - first:
                    cells[first + 1 : first + 1 + len(text)] = text
                    break
        if self.course.phases:
            cells[self._cell(self.course.phases[-1].at_ms + self.course.phases[-1].ms)] = "|"
        return self._paint("".join(cells), "1")

    def _bar(self, line: Line) -> str:
        cells: list[tuple[str, str]] = [(" ", "")] * self.room
        for span in line.spans:
            phase = next(one for one in PHASES if one.name == span.name)
            first = self._cell(span.at_ms)
            for cell in range(first, max(first + 1, self._cell(span.at_ms + span.ms))):
                cells[cell] = (phase.mark, phase.color)
        if line.state in BAD:
            last = max((self._cell(span.at_ms + span.ms) for span in line.spans), default=0)
            cells[last] = ("x", "1;31" if line.state != S.ABORTED else "1")
        elif line.state == S.FINISHED:
            last = self._cell(line.spans[-1].at_ms + line.spans[-1].ms)
            cells[last] = (PHASES[-1].mark, PHASES[-1].color)
        out, before = "", ""
        for mark, code in cells:
            if self.color and code != before:
                out += ("\x1b[0m" if before else "") + (f"\x1b[{code}m" if code else "")
                before = code
            out += mark
        return out + ("\x1b[0m" if before else "")

    def _beside(self, line: Line) -> str:
        if line.state in (S.FINISHED, S.RESTORED) and line.blackout_ms is not None:
            return _span(line.blackout_ms)
        return line.state

    def _summary(self) -> list[str]:
        course = self.course
        if course.phases:
            parts = ", ".join(f"{span.name} {_span(span.ms)}" for span in course.phases)
            lines = [f"update:   {parts}"]
        else:
            lines = []
        times = sorted(line.blackout_ms for line in course.sessions if line.blackout_ms is not None)
        if times and course.blackout_ms is not None:
            spread = f"{_span(times[0])} at best, {_span(times[len(times) // 2])} in the middle, {_span(times[-1])} at worst"
            each = f"each session {spread}" if len(times) > 1 else "one session"
            lines.append(
                f"blackout: {_span(course.blackout_ms)} from the first that stopped to the last that ran again;"
            )
            lines.append(f"          {each}")
        bad = [line for line in course.sessions if line.state in BAD]
        if bad:
            what = ", ".join(f"{line.id} {line.state}" for line in bad[:6]) + (" ..." if len(bad) > 6 else "")
            lines.append(f"ended otherwise: {what}")
        return lines


def _span(ms: float) -> str:
    if ms < 10:
        return f"{ms:.1f} ms"
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"


def _step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, ... that is not below `least`."""
    power = 1.0
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10


def _chosen(lines: Sequence[Line]) -> list[Line]:
    """Choose whose bars to draw: all that ended badly as far as there is room, and a spread of the others."""
    bad = [line for line in lines if line.state in BAD][: MAX_BARS // 2]
    rest = sorted(
        (line for line in lines if line.state not in BAD), key=lambda line: (line.blackout_ms or 0.0, line.id)
    )
    room = MAX_BARS - len(bad)
    if len(rest) <= room:
        return [*bad, *rest]
    return [*bad, *(rest[index * (len(rest) - 1) // (room - 1)] for index in range(room))]


# -- from a folded book -------------------------------------------------------------------------------------------------------


class Blackout(NamedTuple):
    """What the guests felt, in milliseconds: all of them together, and the worst single one."""

    total_ms: float
    worst_ms: float


def of_book(book: Book, update: str = "") -> Course | None:
    """Return the course of an update from a book; of a state that was entered twice only the last time is known."""
    story = Story()
    story.book = book
    clock = Clock()
    entered = [
        (at, stream, state) for stream, record in book.streams.items() for state, at in record.entered.items()
    ]
    for at, stream, state in sorted(entered, key=lambda one: one[0].id):
        story.marks.setdefault(stream, []).append((clock.at(at.boot_id, at.wall_ns, at.boot_ns), state))
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


def draw_book(book: Book, *, width: int = 80, color: bool = False, update: str = "") -> str:
    """Draw one update of a book (default: the last)."""
    found = of_book(book, update)
    return draw_course(found, width=width, color=color) if found is not None else NOTHING
