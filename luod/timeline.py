# SPDX-License-Identifier: Apache-2.0
"""The picture of an update: one bar a session on one time axis, and what the blackout was made of."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from .breakdown import table
from .course import BAD, PHASES, Blackout, Course, Line, Story, blackout, of_book
from .engine.book import Book, Row
from .states.table import SessionState as S
from .states.table import UpdateState as U

__all__ = [
    "BAD", "MAX_BARS", "NOTHING", "PHASES", "Blackout", "Course", "Line", "Story", "blackout", "draw", "draw_book", "draw_course",
    "of_book",
]  # fmt: skip

MAX_BARS = 16
NOTHING = "no update in this journal\n"


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
        self.width = width
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
        why = f" - {_plain(course.reason)}" if course.reason and course.state != U.DONE else ""
        first, *more = self._wrapped(
            f"{course.update}: {course.state}, {many}, {_span(course.total_ms)}{why}"
        )
        lines = [
            first.replace(course.update, self._paint(course.update, "1"), 1),
            *more,
            "",
            self._row("", self._axis(), ""),
            self._row(course.update, self._phases(), ""),
        ]
        for line in shown:
            lines.append(self._row(line.id, self._bar(line), self._beside(line)))
        if len(shown) < len(course.sessions):
            lines.append(self._row("...", f"and {len(course.sessions) - len(shown)} more in between", ""))
        lines += ["", "  ".join(f"{self._paint(one.mark * 2, one.color)} {one.name}" for one in PHASES)]
        for words in self._summary():
            lines += self._wrapped(words)
        lines += table([(line.id, line.parts) for line in shown if line.parts], self.width)
        return "\n".join(line.rstrip() for line in lines) + "\n"

    def _wrapped(self, line: str) -> list[str]:
        return textwrap.wrap(line, max(self.width, 72), subsequent_indent=" " * 10)

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
            each = f"each session {_span(times[0])} to {_span(times[-1])}, the median {_span(times[len(times) // 2])}"
            lines.append(
                f"blackout: {_span(course.blackout_ms)} in all" + (f"; {each}" if len(times) > 1 else "")
            )
        bad = [line for line in course.sessions if line.state in BAD]
        if bad:
            what = ", ".join(f"{line.id} {line.state}" for line in bad[:6]) + (" ..." if len(bad) > 6 else "")
            lines.append(f"ended otherwise: {what}")
        return lines


def _plain(text: str) -> str:
    """Return a client's words without what would steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


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


def draw_book(book: Book, *, width: int = 80, color: bool = False, update: str = "") -> str:
    """Draw one update of a book (default: the last)."""
    found = of_book(book, update)
    return draw_course(found, width=width, color=color) if found is not None else NOTHING
