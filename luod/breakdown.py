# SPDX-License-Identifier: Apache-2.0
"""What the blackout of a session was made of: the parts that its client measured, and those that only the journal knows.

    pause  save  preserve | wait | kexec | boot | claim | retrieve  start  load  resume | rest
    `---- the client's    `- for  `- to the `- to `- to  `---- the steps of its restore plan   `- what is between
          own spans          others  kernel    luod  CLAIM

`kexec` ends when the new kernel's boot clock began, `boot` when luod was there again; where the former is not known, `kexec` is both.
Steps of one kind are added up. All in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from .states.fold import Session
from .states.table import SessionState as S

Marks = list[tuple[int, str]]
SPANS = ("pause", "save", "preserve")
"""What a freeze is made of, in its order: the journal does not keep the order of a client's spans."""


class Part(msgspec.Struct, frozen=True):
    """A part of a blackout, in milliseconds."""

    name: str
    ms: float


class Return(NamedTuple):
    """When the next kernel began and when luod was there again, in nanoseconds of the course's time axis."""

    kernel: int
    luod: int


def step_name(step: str) -> str:
    """Return how a step is called in a table: `iommufd.map_file#ram0` is `map_file`."""
    return step.partition("#")[0].rpartition(".")[2]


def parts(session: Session, marks: Marks, back: Return | None) -> tuple[Part, ...]:
    """Return the parts of a session's blackout in their order; empty when its client has measured nothing."""
    steps = [(step_name(step.step), step.took_ms) for step in session.steps.values()]
    if not session.spans and not any(took for _, took in steps):
        return ()
    found = {name: session.spans[name] for name in sorted(session.spans, key=_place)}
    entered = {state: at for at, state in marks}
    ready, jump = entered.get(S.READY), entered.get(S.REBOOTING)
    claimed, running = entered.get(S.RETRIEVED), entered.get(S.RESTORED)
    if ready is not None and jump is not None:
        found["wait"] = _ms(jump - ready)
    if jump is not None and back is not None:
        # An emulated kernel shares the boot clock of its host, which began long before: then nobody knows where the kexec ended.
        found["kexec"] = _ms(min(back.kernel if back.kernel > jump else back.luod, back.luod) - jump)
        if back.kernel > jump:
            found["boot"] = _ms(max(back.luod - back.kernel, 0))
        if claimed is not None:
            found["claim"] = _ms(claimed - back.luod)
    for name, took in steps:
        found[name] = found.get(name, 0.0) + took
    if claimed is not None and running is not None:
        found["rest"] = max(0.0, _ms(running - claimed) - sum(took for _, took in steps))
    return tuple(Part(name, round(ms, 3)) for name, ms in found.items())


def _place(name: str) -> tuple[int, str]:
    """Return the place of a client's span: those of a freeze in their order, others after them by name."""
    return (SPANS.index(name) if name in SPANS else len(SPANS), name)


def table(columns: Sequence[tuple[str, Sequence[Part]]], width: int) -> list[str]:
    """Return the lines of a table with a column for each session and a row for each part, in blocks that are at most `width` wide."""
    names = list(dict.fromkeys(part.name for _, each in columns for part in each))
    if not names:
        return []
    label = max(len("blackout, ms"), *(len(name) for name in names))
    cell = max(8, *(len(name) for name, _ in columns)) + 1
    room = max((width - label) // cell, 1)
    lines: list[str] = []
    for first in range(0, len(columns), room):
        block = columns[first : first + room]
        lines += ["", f"{'blackout, ms':<{label}}" + "".join(f"{name:>{cell}}" for name, _ in block)]
        for name in names:
            row = [next((part.ms for part in each if part.name == name), None) for _, each in block]
            lines.append(f"{name:<{label}}" + "".join(f"{_number(ms):>{cell}}" for ms in row))
    return lines


def _number(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6
