# SPDX-License-Identifier: Apache-2.0
"""What `luoctl demo --qemu` and `luoctl lab demo --qemu` have in common: how the outcome of guests is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from msgspec.structs import replace

from ..cli.printing import colored
from ..timeline import Course, draw_course
from .guest_run import GuestRun, usable
from .guests import GuestReport, GuestSetting, draw_guests
from .outcome import journal_of

GUESTS = 4
MIB = 16


def add_guests(told: dict[str, Any], reports: Sequence[GuestReport], course: Course | None) -> dict[str, Any]:
    """Return the demo's object with what each guest says and what its blackout was made of."""
    lines = {line.id: line for line in course.sessions} if course is not None else {}
    guests: list[dict[str, Any]] = []
    for one in reports:
        line = lines.get(f"{one.name}.1")
        parts = {part.name: part.ms for part in line.parts} if line is not None else {}
        guests.append({**msgspec.to_builtins(one), "blackout": parts})
    return {**told, "guests": guests}


def demo_guests(base: Path, guests: int | None, mib: float | None, *, as_json: bool, kept: bool) -> int:
    """Run the demo with real guests in a directory; return the exit code."""
    from .command import columns, course_of, result  # it imports this module when it is asked for guests

    setting = GuestSetting(mib=max(int(mib or MIB), 4))
    binary = usable()

    def say(text: str) -> None:
        if not as_json:
            click.echo(f"  {text}", err=True)

    run = GuestRun(base, guests or GUESTS, setting, say, qemus=(binary, binary))
    try:
        outcome = run.run()
    finally:
        run.stop()
    found = run.problems()
    course = course_of(base)
    if as_json:
        journal = journal_of(base) if kept or found else None
        of_update = replace(outcome, sessions=run.taking_part())
        told = result(of_update, journal, course, len(outcome.points), outcome.restarts)
        told = add_guests(told, run.reports, course)
        told["detail"] = {"ending": outcome.ending, "problems": found}
        click.echo(json.dumps(told))
    else:
        click.echo()
        if course is not None:
            click.echo(draw_course(course, width=columns(), color=colored()))
        click.echo(draw_guests(run.reports), nl=False)
        for one in found:
            click.echo(f"wrong: {one}", err=True)
        if kept or found:
            click.echo(f"everything of this run is in {base}", err=True)
    return 1 if found else 0
