# SPDX-License-Identifier: Apache-2.0
"""The picture of an update, from its journal alone: one bar a session, and what the blackout was made of.

The time axis is the wall clock, because the boot clock begins again with every kernel. A session's blackout runs from READY, when its
workload stopped, to RESTORED (or FINISHED), when it may run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .engine.book import Book, Row
from .states.fold import Session, Update
from .states.table import SessionState as S
from .states.table import UpdateState as U

PHASES: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("preserving", (S.CREATED, S.PRESERVED), "\u2591", "36"),
    ("frozen", (S.READY,), "\u2592", "33"),
    ("kexec", (S.REBOOTING,), "\u2588", "31"),
    ("restoring", (S.RETRIEVED,), "\u2593", "35"),
    ("running", (S.RESTORED, S.FINISHED), "\u2500", "32"),
)
MAX_BARS = 16


class Blackout(NamedTuple):
    """What the guests felt, in milliseconds: all of them together, and the worst single one."""

    total_ms: float
    worst_ms: float


def _since(session: Session) -> float | None:
    at = session.entered.get(S.READY)
    return at.wall_ns / 1e6 if at else None


def _until(session: Session) -> float | None:
    at = session.entered.get(S.RESTORED) or session.entered.get(S.FINISHED)
    return at.wall_ns / 1e6 if at else None


def blackout(sessions: Iterable[Session]) -> Blackout | None:
    """Return the blackout of an update's sessions, or None when none went through one."""
    spans = [(a, b) for one in sessions if (a := _since(one)) is not None and (b := _until(one)) is not None]
    if not spans:
        return None
    return Blackout(max(b for _, b in spans) - min(a for a, _ in spans), max(b - a for a, b in spans))


def draw(records: Iterable[Row], *, width: int = 80, color: bool = False, update: str = "") -> str:
    """Draw one update of a journal (default: its last), `width` columns wide. Returns text that ends in a newline."""
    return draw_book(Book(records), width=width, color=color, update=update)


def draw_book(book: Book, *, width: int = 80, color: bool = False, update: str = "") -> str:
    """Draw one update of a book."""
    updates = [one for one in book.updates() if not update or one.id == update]
    if not updates:
        return "no update in this journal\n"
    chosen = updates[-1]
    sessions = [one for one in book.sessions() if one.update == chosen.id]
    times = [
        at.wall_ns / 1e6 for one in (chosen, *sessions) for state, at in one.entered.items() if state != S.NEW
    ]
    start, end = min(times), max(times)
    label = min(max([len(one.id) for one in sessions] + [len(chosen.id), 10]), 24)
    room = max(width - label - 13, 20)
    scale = room / max(end - start, 0.001)
    lines = [
        f"{chosen.id}: {chosen.state}, {len(sessions)} sessions, {end - start:.0f} ms",
        *_steps(chosen),
        "",
    ]
    shown = sessions if len(sessions) <= MAX_BARS else _extremes(sessions)
    for one in shown:
        bar = _bar(one, start, end, scale, room, color)
        since, until = _since(one), _until(one)
        black = f"{until - since:8.0f} ms" if since is not None and until is not None else f"{one.state:>11}"
        lines.append(f"{one.id[:label]:<{label}} {bar} {black}")
    if len(shown) < len(sessions):
        lines.append(
            f"{'':<{label}} ... {len(sessions) - len(shown)} more between the fastest and the slowest"
        )
    lines.append(f"{'':<{label}} {_axis(end - start, room)}")
    legend = "  ".join(f"{_paint(mark * 2, code, color)} {name}" for name, _, mark, code in PHASES)
    lines += ["", legend]
    found = blackout(sessions)
    if found is not None:
        lines.append(
            f"blackout: {found.total_ms:.0f} ms from the first READY to the last RESTORED; worst session {found.worst_ms:.0f} ms"
        )
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _steps(update: Update) -> list[str]:
    order = [state for state in U if state in update.entered]
    out = []
    for state, following in zip(order, [*order[1:], None], strict=True):
        if following is None:
            break
        took = (update.entered[following].wall_ns - update.entered[state].wall_ns) / 1e6
        out.append(f"{state} {took:.0f} ms")
    return ["  " + "  >  ".join(out)] if out else []


def _extremes(sessions: Sequence[Session]) -> list[Session]:
    def span(one: Session) -> float:
        since, until = _since(one), _until(one)
        return until - since if since is not None and until is not None else float("inf")

    ordered = sorted(sessions, key=span)
    half = MAX_BARS // 2
    return [*ordered[:half], *ordered[-half:]]


def _bar(session: Session, start: float, end: float, scale: float, room: int, color: bool) -> str:
    marks = sorted((at.wall_ns / 1e6, state) for state, at in session.entered.items() if state != S.NEW)
    cells = [" "] * room
    codes = [""] * room
    for index, (at, state) in enumerate(marks):
        phase = next((one for one in PHASES if state in one[1]), None)
        until = marks[index + 1][0] if index + 1 < len(marks) else end
        if phase is None:
            continue
        first = min(int((at - start) * scale), room - 1)
        last = max(first + 1, min(int((until - start) * scale), room))
        for cell in range(first, last):
            cells[cell], codes[cell] = phase[2], phase[3]
    if session.state in (S.ABORTED, S.LOST, S.FAILED, S.EXPIRED) and marks:
        cells[min(int((marks[-1][0] - start) * scale), room - 1)] = "x"
    if not color:
        return "".join(cells)
    out: list[str] = []
    last_code = ""
    for mark, code in zip(cells, codes, strict=True):
        if code != last_code:
            out.append(f"\x1b[{code}m" if code else "\x1b[0m")
            last_code = code
        out.append(mark)
    return "".join(out) + ("\x1b[0m" if last_code else "")


def _axis(total: float, room: int) -> str:
    cells = [" "] * room
    for part in range(4):
        text = f"|{total * part / 4:.0f}"
        at = room * part // 4
        cells[at : at + len(text)] = text
    return "".join(cells)[:room] + f"| {total:.0f} ms"


def _paint(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
