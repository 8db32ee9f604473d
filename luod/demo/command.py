# SPDX-License-Identifier: Apache-2.0
"""`luoctl demo`: a whole update on the emulated kernel, or luod killed at every point of one."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace

from ..cli.printing import WIDE, colored, width
from ..engine.points import STAGES
from ..journal.replay import Replay
from ..timeline import Course, Story, draw_course
from .guest_command import demo_guests
from .invariants import problems
from .outcome import Outcome, Setting, discard, journal_of, workspace
from .run import Run
from .sweep import Verdict, all_settings, sweep, title, twice

SWEEPS = ("all", "twice", "list")
SWEEP_SESSIONS = 2
SWEEP_BYTES = 64 << 10


@click.command(name="demo")
@click.option(
    "--sessions",
    type=click.IntRange(1, 512),
    help="client processes (default 8; with --crash 2; with --qemu 4)",
)
@click.option(
    "--mib", type=click.FloatRange(0.01, 4096), help="MiB of memory each (default 16; with --crash 1/16)"
)
@click.option("--qemu", is_flag=True, help="real QEMU guests that count and check their memory, as clients")
@click.option(
    "--crash",
    metavar="POINT|all|twice|list",
    help="kill luod at one crash point, at all, at all and again in the recovery, or list them",
)
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
    sessions: int | None,
    mib: float | None,
    qemu: bool,
    crash: str | None,
    jobs: int,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Go through a whole live update on an emulated kernel: real processes, real memory, every byte compared.

    --crash kills luod by SIGKILL at a numbered point, restarts it, and shows that nothing was lost.
    """
    if qemu and crash:
        raise click.UsageError("--crash kills luod in an update of the demo's own clients: leave out --qemu")
    setting = Setting(
        sessions=sessions or (SWEEP_SESSIONS if crash else 8),
        size=int(mib * (1 << 20)) if mib else (SWEEP_BYTES if crash else 16 << 20),
    )
    point = at_point(setting, crash or "")
    base = kept_in(keep) if keep is not None else workspace()
    code = 1
    try:
        kept = keep is not None
        if qemu:
            code = demo_guests(base, sessions, mib, as_json=as_json, kept=kept)
        elif crash in SWEEPS:
            code = _sweep(base, setting, jobs, as_json, crash)
        else:
            code = _single(base, point, as_json, kept=kept)
    except (KeyboardInterrupt, click.Abort):
        code = 0  # nothing went wrong that would be worth keeping
        raise
    finally:
        if keep is None and code == 0:
            discard(base)
    raise SystemExit(code)


def at_point(setting: Setting, point: str) -> Setting:
    """Return the setting in which luod dies at a point, written `key:stage` or, for one of the two boots, `boot:key:stage`.

    Raises `click.UsageError` for what cannot be a point.
    """
    if point in ("", *SWEEPS):
        return setting
    boot, _, name = point.partition(":")
    if boot not in ("1", "2"):
        boot, name = "0", point
    if name.rpartition(":")[2] not in STAGES:
        raise click.UsageError(
            f"{point!r} is no crash point: they end in {', '.join(f':{stage}' for stage in STAGES)}; `--crash list` shows them"
        )
    return replace(setting, kill_at=name, boot=int(boot))


def kept_in(directory: Path) -> Path:
    """Make the directory that is to be kept. Raises `click.UsageError` when it cannot be made or holds something already."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        empty = not any(directory.iterdir())
    except OSError as error:
        raise click.UsageError(f"{directory} cannot be used: {error.strerror}") from None
    if not empty:
        raise click.UsageError(f"{directory} is not empty; --keep needs a new directory")
    return directory


def course_of(base: Path) -> Course | None:
    """Return the course of a run's update, from its journal."""
    with Replay(journal_of(base)) as replay:
        return Story(replay).course()


def result(
    outcome: Outcome, journal: Path | None, course: Course | None, points: int, recoveries: int
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
        "blackout_ms": round(course.blackout_ms, 1) if course and course.blackout_ms is not None else None,
        "journal": str(journal) if journal else None,
    }


def _single(base: Path, setting: Setting, as_json: bool, *, kept: bool) -> int:
    def say(text: str) -> None:
        if not as_json:
            click.echo(f"  {text}", err=True)

    host = Run(base, setting, say)
    try:
        outcome = host.run()
    finally:
        host.stop()
    found = problems(outcome, setting, base)
    if setting.kill_at and not outcome.restarts:
        found.append(f"no point {setting.point!r} was reached; `luoctl demo --crash list` shows them")
    course = course_of(base)
    if as_json:
        journal = journal_of(base) if kept or found else None
        object_ = result(outcome, journal, course, len(outcome.points), outcome.restarts)
        object_["detail"] = {"ending": outcome.ending, "problems": found}
        click.echo(json.dumps(object_))
    else:
        picture = draw_course(course, width=columns(), color=colored()) if course is not None else ""
        _tell(outcome, setting, picture, found, base, kept=kept)
    return 1 if found else 0


def columns() -> int:
    """Return how wide the picture may be: as the terminal, within reason."""
    return 100 if width() == WIDE else min(width(), 140)


def _tell(
    outcome: Outcome, setting: Setting, picture: str, found: list[str], base: Path, *, kept: bool
) -> None:
    click.echo()
    click.echo(picture)
    if outcome.restarts:
        times = "once" if outcome.restarts == 1 else f"{outcome.restarts} times"
        click.echo(
            f"luod was killed at {setting.point} and restarted {times}; the update is {outcome.ending}"
        )
    if not found:
        mib = outcome.bytes_verified / (1 << 20)
        where = "after the kexec" if outcome.ending == "done" else "after the abort, in the old kernel"
        click.echo(f"{mib:g} MiB in {setting.sessions} sessions compared {where}: every byte is right")
    for one in found:
        click.echo(f"wrong: {one}", err=True)
    if kept or found:
        click.echo(
            f"everything of this run is in {base}; `luoctl journal show --journal {journal_of(base)}`",
            err=True,
        )


class Tally:
    """What the runs of a sweep come to."""

    def __init__(self, *, quiet: bool) -> None:
        self.verdicts: list[Verdict] = []
        self._quiet = quiet

    def take(self, verdicts: Iterable[Verdict], total: int) -> None:
        """Take verdicts in as they come, and show how far it is."""
        for done, verdict in enumerate(verdicts, 1):
            self.verdicts.append(verdict)
            state = "FAILED" if verdict.problems else verdict.ending
            if sys.stderr.isatty():
                bar = "#" * (30 * done // total)
                click.echo(
                    f"\r[{bar:<30}] {done}/{total} {verdict.point[:44]:<44}", nl=done == total, err=True
                )
            elif verdict.problems or (not self._quiet and (done % 10 == 0 or done == total)):
                click.echo(f"{done}/{total} {verdict.point}: {state}", err=True)

    @property
    def bad(self) -> list[Verdict]:
        """The runs that failed."""
        return [one for one in self.verdicts if one.problems]

    def endings(self) -> dict[str, int]:
        """Return how the updates ended."""
        return {"done": 0, "aborted": 0, **Counter(one.ending for one in self.verdicts)}

    def total(self, what: str) -> int:
        """Return a number of the verdicts, summed up."""
        return sum(int(getattr(one, what)) for one in self.verdicts)


def _sweep(base: Path, setting: Setting, jobs: int, as_json: bool, crash: str) -> int:
    clean, settings = all_settings(base, setting)
    points = list(dict.fromkeys((one.point, one.refuse) for one in settings))
    names = [title(one) for one in settings]
    if crash == "list":
        lines = "\n".join(f"{number:4} {name}" for number, name in enumerate(names, 1))
        click.echo(json.dumps({"points": names}) if as_json else lines)
        return 0
    if not as_json:
        what = f"{len(points)} crash points in an update of {setting.sessions} sessions"
        click.echo(f"{what}; luod is killed at each, in {len(settings)} runs", err=True)
    tally = Tally(quiet=as_json)
    tally.take(sweep(base / "once", settings, jobs), len(settings))
    if crash == "twice":
        more = twice(settings, tally.verdicts)
        if not as_json:
            click.echo(f"and once more while it recovers: {len(more)} runs", err=True)
        tally.take(sweep(base / "twice", more, jobs), len(more))
    if as_json:
        object_ = result(clean, None, course_of(base / "clean"), len(points), tally.total("restarts"))
        object_.update({name: tally.total(name) for name in ("lost", "failed", "bytes_verified")})
        object_["detail"] = {
            "runs": len(tally.verdicts),
            "endings": tally.endings(),
            "failures": [
                {"point": one.point, "problems": list(one.problems), "directory": one.directory}
                for one in tally.bad
            ],
        }
        click.echo(json.dumps(object_))
    else:
        for one in tally.bad:
            click.echo(f"FAILED at {one.point}: {'; '.join(one.problems)}", err=True)
        endings = tally.endings()
        click.echo(
            f"{len(points)} crash points, {tally.total('restarts')} recoveries: {endings['done']} updates done, "
            f"{endings['aborted']} cleanly undone, {len(tally.bad)} failed; {tally.total('bytes_verified')} bytes compared"
        )
    return 1 if tally.bad else 0
