# SPDX-License-Identifier: Apache-2.0
"""`luoctl demo`: a whole update on the emulated kernel, or luod killed at every point of one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from ..timeline import blackout, draw_book
from .host import Host, Outcome, Setting, discard, journal_of, workspace
from .invariants import problems
from .sweep import Verdict, all_settings, sweep

SWEEP_SESSIONS = 2
SWEEP_BYTES = 64 << 10


@click.command(name="demo")
@click.option("--sessions", type=click.IntRange(1, 512), help="client processes (default 8; with --crash 2)")
@click.option(
    "--mib", type=click.FloatRange(0.01, 4096), help="MiB of memory each (default 16; with --crash 1/16)"
)
@click.option("--crash", metavar="POINT|all|list", help="kill luod at one crash point, at all, or list them")
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="runs at a time, with --crash all",
)
@click.option(
    "--keep", type=click.Path(path_type=Path), help="directory in which everything of the run is kept"
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def demo(
    sessions: int | None, mib: float | None, crash: str | None, jobs: int, keep: Path | None, as_json: bool
) -> None:
    """Go through a whole live update on an emulated kernel: real processes, real memory, every byte compared.

    --crash kills luod by SIGKILL at a numbered point, restarts it, and shows that nothing was lost.
    """
    setting = Setting(
        sessions=sessions or (SWEEP_SESSIONS if crash else 8),
        size=int(mib * (1 << 20)) if mib else (SWEEP_BYTES if crash else 16 << 20),
    )
    base = keep if keep is not None else workspace()
    base.mkdir(parents=True, exist_ok=True)
    code = 1
    try:
        if crash in ("all", "list"):
            code = _sweep(base, setting, jobs, as_json, only_list=crash == "list")
        else:
            code = _single(base, setting, crash or "", as_json)
    finally:
        if keep is None and code == 0:
            discard(base)
    raise SystemExit(code)


def result(
    outcome: Outcome, journal: Path | None, black: float | None, points: int, recoveries: int
) -> dict[str, Any]:
    """Return the object that every demo prints, with and without a real kernel."""
    states = [one["state"] for one in outcome.sessions]
    return {
        "kernel": outcome.kernel,
        "sessions": len(states),
        "finished": states.count("finished"),
        "lost": states.count("lost"),
        "failed": states.count("failed"),
        "bytes_verified": outcome.bytes_verified,
        "crash_points": points,
        "recoveries": recoveries,
        "blackout_ms": round(black, 1) if black is not None else None,
        "journal": str(journal) if journal else None,
    }


def _single(base: Path, setting: Setting, point: str, as_json: bool) -> int:
    from msgspec.structs import replace

    from ..engine.book import Book
    from ..journal.replay import Replay

    say = (lambda _: None) if as_json else (lambda text: click.echo(f"  {text}", err=True))
    host = Host(base, replace(setting, kill_at=point), say)
    try:
        outcome = host.run()
    finally:
        host.stop()
    found = problems(outcome, setting, base)
    if point and not outcome.restarts:
        found.append(f"no point {point!r} was reached; `luoctl demo --crash list` shows them")
    with Replay(journal_of(base)) as replay:
        book = Book(replay)
    last = book.updates()[-1]
    black = blackout(one for one in book.sessions() if one.update == last.id)
    if as_json:
        points = len(set(outcome.points))
        object_ = result(
            outcome, journal_of(base), black.total_ms if black else None, points, outcome.restarts
        )
        if found:
            object_["problems"] = found
        click.echo(json.dumps(object_))
    else:
        _tell(outcome, setting, draw_book(book, width=_width(), color=sys.stdout.isatty()), found, base)
    return 1 if found else 0


def _tell(outcome: Outcome, setting: Setting, picture: str, found: list[str], base: Path) -> None:
    click.echo()
    click.echo(picture)
    if outcome.restarts:
        click.echo(
            f"luod was killed and restarted {outcome.restarts} time(s); the update is {outcome.ending}"
        )
    mib = outcome.bytes_verified / (1 << 20)
    where = "after the kexec" if outcome.ending == "done" else "after the abort, in the old kernel"
    click.echo(
        f"{mib:g} MiB in {setting.sessions} sessions compared {where}: every byte is right"
        if not found
        else ""
    )
    for one in found:
        click.echo(f"wrong: {one}", err=True)
    if found:
        click.echo(f"everything of this run is in {base}", err=True)


def _sweep(base: Path, setting: Setting, jobs: int, as_json: bool, *, only_list: bool) -> int:
    clean, settings = all_settings(base, setting)
    points = [one.kill_at + (" (kexec refused)" if one.refuse else "") for one in settings]
    if only_list:
        click.echo(
            json.dumps(points)
            if as_json
            else "\n".join(f"{n:4} {point}" for n, point in enumerate(points, 1))
        )
        return 0
    if not as_json:
        click.echo(
            f"{len(points)} crash points in an update of {setting.sessions} sessions; luod is killed at each",
            err=True,
        )
    bad: list[Verdict] = []
    recoveries = verified = 0
    endings = {"done": 0, "aborted": 0}
    for done, verdict in enumerate(sweep(base, settings, jobs), 1):
        recoveries += verdict.restarts
        verified += verdict.bytes_verified
        endings[verdict.ending] = endings.get(verdict.ending, 0) + 1
        if verdict.problems:
            bad.append(verdict)
        _progress(done, len(points), verdict, as_json)
    if as_json:
        object_ = result(clean, None, None, len(points), recoveries)
        object_["bytes_verified"] = verified
        object_["detail"] = {
            "endings": endings,
            "failures": [
                {"point": one.point, "problems": list(one.problems), "directory": one.directory}
                for one in bad
            ],
        }
        click.echo(json.dumps(object_))
    else:
        for one in bad:
            click.echo(f"FAILED at {one.point}: {'; '.join(one.problems)}", err=True)
        click.echo(
            f"{len(points)} crash points, {recoveries} recoveries: {endings['done']} updates done, "
            f"{endings['aborted']} cleanly undone, {len(bad)} failed; {verified} bytes compared"
        )
    return 1 if bad else 0


def _progress(done: int, total: int, verdict: Verdict, as_json: bool) -> None:
    state = "FAILED" if verdict.problems else verdict.ending
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        click.echo(f"\r[{bar:<30}] {done}/{total} {verdict.point[:40]:<40}", nl=done == total, err=True)
    elif verdict.problems or (not as_json and (done % 10 == 0 or done == total)):
        click.echo(f"{done}/{total} {verdict.point}: {state}", err=True)


def _width() -> int:
    try:
        return min(os.get_terminal_size().columns, 140)
    except OSError:
        return 100
