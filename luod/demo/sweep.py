# SPDX-License-Identifier: Apache-2.0
"""The crash sweep: luod is killed at every point of an update, one run a point, and each run must end well."""

from __future__ import annotations

import os
import select
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from ..states.errors import LuodError
from .invariants import problems
from .outcome import Outcome, Setting, discard
from .process import Child, undisturbed
from .run import Run


class Verdict(msgspec.Struct, frozen=True):
    """How the run of one crash point ended."""

    point: str
    ending: str
    restarts: int
    bytes_verified: int
    problems: tuple[str, ...]
    directory: str = ""
    recovery_points: tuple[str, ...] = ()
    lost: int = 0
    failed: int = 0


def one_run(directory: Path, setting: Setting) -> tuple[Outcome | None, list[str]]:
    """Make one run; return what it showed and what is wrong with it."""
    host = Run(directory, setting)
    try:
        outcome = host.run()
    except (LuodError, OSError, KeyError, AssertionError) as error:
        return None, [str(error) if isinstance(error, LuodError) else traceback.format_exc()]
    finally:
        host.stop()
    found = problems(outcome, setting, directory)
    # Of effects that are made at the same time another may be first this time, and then a second point is not reached.
    if outcome.restarts not in ((1, 2) if setting.then_at else (bool(setting.kill_at),)):
        found.append(f"luod was to die at {setting.point or 'no point'} and died {outcome.restarts} times")
    if setting.kill_at and setting.operator == "abort" and outcome.ending != "aborted":
        found.append(f"the operator aborted an update that is {outcome.ending}")
    return outcome, found


def clean_points(directory: Path, setting: Setting) -> tuple[Outcome, list[str]]:
    """Run once with nobody killed; return the outcome and its crash points in order. Raises LuodError if that fails."""
    outcome, found = one_run(directory, setting)
    if outcome is None or found:
        raise LuodError(
            f"a run without any crash failed: {'; '.join(found)}", hint=f"it is kept in {directory}"
        )
    return outcome, outcome.points


def all_settings(base: Path, setting: Setting) -> tuple[Outcome, list[Setting]]:
    """Return a clean run's outcome, and one setting for every run of the sweep.

    The points are those of an update that goes through, in both boots, and those of one that the kernel refuses, which is rolled back.
    Where luod's death leaves an update to a person, that person goes on in one run and changes his mind in another.
    """
    clean, points = clean_points(base / "clean", setting)
    _, refused = clean_points(base / "refused", msgspec.structs.replace(setting, refuse=True))
    settings: list[Setting] = []
    for point in points:
        boot, _, name = point.partition(":")
        one = msgspec.structs.replace(setting, kill_at=name, boot=int(boot))
        settings.append(one)
        if name.startswith("update/") and name.partition(":")[0].endswith("/scratch"):
            settings.append(msgspec.structs.replace(one, operator="abort"))
    settings += [
        msgspec.structs.replace(setting, kill_at=point.partition(":")[2], boot=1, refuse=True)
        for point in refused
        if point not in points or "/reboot:" in point
    ]
    return clean, settings


def twice(settings: Sequence[Setting], verdicts: Iterable[Verdict]) -> list[Setting]:
    """Return a setting for every way to kill luod once more while it recovers, from what a sweep of `settings` has shown."""
    found = {verdict.point: verdict.recovery_points for verdict in verdicts}
    return [
        msgspec.structs.replace(setting, then_at=point)
        for setting in settings
        for point in found.get(title(setting), ())
    ]


def title(setting: Setting) -> str:
    """Return what a run is called."""
    ways = [
        *(["kexec refused"] if setting.refuse else []),
        *(["operator aborts"] if setting.operator == "abort" else []),
    ]
    return setting.point + (f" ({', '.join(ways)})" if ways else "")


def sweep(
    base: Path,
    settings: Sequence[Setting],
    jobs: int,
    *,
    run: Callable[[Path, Setting], Verdict] | None = None,
) -> Iterator[Verdict]:
    """Make every run, `jobs` at a time, each in a process of its own; yield the verdicts as they come."""
    waiting = list(enumerate(settings))
    running: dict[int, tuple[Child, str]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, setting = waiting.pop(0)
                with undisturbed():
                    child = _launch(base / f"point-{number:03}", setting, run)
                    running[child.pipe] = (child, title(setting))
            poll = select.poll()
            for pipe in running:
                poll.register(pipe, select.POLLIN)
            for pipe, _ in poll.poll():
                child, point = running.pop(pipe)
                line = child.line()
                child.ended(None)
                log = child.log
                child.stop()
                if line:
                    yield msgspec.json.decode(line, type=Verdict)
                else:
                    yield Verdict(
                        point, "crashed", 0, 0, (f"the run itself ended; see {log}",), str(log.parent)
                    )
    finally:
        for child, _ in running.values():
            child.stop()


def _launch(directory: Path, setting: Setting, run: Callable[[Path, Setting], Verdict] | None) -> Child:
    directory.mkdir(parents=True)

    def work(pipe: int) -> int:
        verdict = (run or verdict_of)(directory, setting)
        os.write(pipe, msgspec.json.encode(verdict) + b"\n")
        return 0

    return Child(f"run {title(setting)}", work, directory / "harness.log")


def verdict_of(directory: Path, setting: Setting) -> Verdict:
    """Make one run and judge it; what went well is not kept."""
    outcome, found = one_run(directory, setting)
    name = title(setting)
    if outcome is None:
        return Verdict(name, "failed", 0, 0, tuple(found), str(directory))
    if not found:
        discard(directory)
    states = [one["state"] for one in outcome.sessions]
    return Verdict(
        name, outcome.ending, outcome.restarts, outcome.bytes_verified, tuple(found), str(directory) if found else "",
        tuple(outcome.recovery_points), states.count("lost"), states.count("failed"),
    )  # fmt: skip
