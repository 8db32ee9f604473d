# SPDX-License-Identifier: Apache-2.0
"""The crash sweep on a real kernel: luod is killed at every crash point it comes to, all of them in a few boots.

    python -m luod.lab.sweep --boot NUMBER --boots HOW_MANY --clients N --size BYTES [--kernel IMAGE]

Each luod dies at the first point at which none has died yet, and is started again at once. In boot 0 the kernel refuses one update
after the other, because the image is taken away behind luod's back, until luod has been through a whole update without reaching a new
point; then it may jump. In boot 1 it dies all the way through its recovery, then through another update; the boots after it are for
what is left: a luod that dies between the call and its outcome is followed by one that finds the effect made, and never comes to the
point after the outcome.
Names of points have N in place of the numbers of attempts and updates, and say in which of the two kernels of an update they lie.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

from ..client import ClientError
from ..engine.points import Points
from .crew import STATE, Crew
from .report import emit

NUMBER = re.compile(r"^(update/|[^/]*\.)\d+/")
ROUNDS = 8


def general(point: str) -> str:
    """Return the name of a crash point with N in place of the number of its attempt or update."""
    return NUMBER.sub(r"\1N/", point)


class Sweep:
    """Where luod has been and where it has died, kept on the state disk from boot to boot."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.side = "old"
        place.mkdir(parents=True, exist_ok=True)
        self.killed = self._lines("killed")

    def _lines(self, name: str) -> list[str]:
        path = self.place / name
        return path.read_text("utf-8").splitlines() if path.exists() else []

    @property
    def reached(self) -> set[str]:
        """Every point at which any luod has been, in both kernels."""
        return set(self._lines("reached"))

    def points(self) -> Points:
        """Return the points of the next luod: at the first new one it writes that down and dies."""
        done, side, killed, reached = (
            set(self.killed),
            self.side,
            self.place / "killed",
            self.place / "reached",
        )

        def at(key: str, stage: str) -> None:
            point = f"{side}:{general(f'{key}:{stage}')}"
            _note(reached, point)
            if point not in done:
                _note(killed, point)
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()  # another thread may be the one that dies first

        return at

    def died(self) -> None:
        """Take note of where luod has just died, and tell the host."""
        self.killed = self._lines("killed")
        emit("crash", side=self.side, point=self.killed[-1])


def _note(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def old_kernel(crew: Crew, sweep: Sweep) -> None:
    """Have updates refused until luod has died everywhere; then jump."""
    crew.start_clients(1)
    held: list[dict[str, list[str]]] = []
    for number in range(ROUNDS):
        before = len(sweep.killed)
        crew.refuse = True
        ended = crew.update()
        if ended != "aborted":
            raise AssertionError(f"an update without an image ended as {ended}")
        compared = crew.wait_clients("aborted")
        held.append(crew.fds())
        emit("round", number=number, killed=len(sweep.killed) - before, bytes=compared)
        crew.start_clients(1)
        if len(sweep.killed) == before:
            break
    more = Counter(held[-1]["keeper"]) - Counter(held[0]["keeper"])
    emit("leak", keeper=dict(more))
    jump(crew)


def jump(crew: Crew) -> None:
    """Order the update that is carried out."""
    crew.refuse = False
    emit("restarts", number=crew.restarts)
    raise AssertionError(f"the update ended as {crew.update()}")


def new_kernel(crew: Crew) -> None:
    """Claim, compare and finish while luod dies all the way."""
    before = crew.fds()
    crew.start_clients(2)
    compared = crew.wait_clients("finished")
    update = crew.until_done()
    after = crew.fds()
    more = {name: dict(Counter(after[name]) - Counter(before[name])) for name in after}
    emit("recovered", update=update["id"], state=update["state"], bytes=compared, leaked=more)


def finish(crew: Crew, sweep: Sweep) -> None:
    """Leave what the host compares with the journal; one more recovery must change nothing."""
    with crew.link() as link:
        rows = link.status()["journal"]["rows"]
    crew.children["luod"].stop(signal.SIGKILL)
    crew.points = None
    crew.start_luod()
    with crew.link() as link:
        late = [record["type"] for record in link.records(rows)]
    (sweep.place / "sessions.json").write_text(json.dumps(crew.sessions()), "utf-8")
    missed = sorted(sweep.reached - set(sweep.killed))
    emit("swept", points=len(sweep.killed), missed=missed, late=late, restarts=crew.restarts)
    crew.stop()


def main(argv: list[str] | None = None) -> int:
    """Be the supervisor of one boot."""
    parser = argparse.ArgumentParser(prog="luod.lab.sweep")
    parser.add_argument("--boot", type=int, required=True)
    parser.add_argument("--boots", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--kernel", type=Path)
    options = parser.parse_args(argv)
    crew = Crew([f"vm{number}" for number in range(options.clients)], options.size, image=options.kernel)
    sweep = Sweep(STATE.parent / "sweep")
    crew.points, crew.died = sweep.points, sweep.died
    crew.start_keeper()
    if options.boot == 0:
        crew.start_luod()
        old_kernel(crew, sweep)
    sweep.side = "new"
    crew.start_luod()
    new_kernel(crew)
    if options.boot == options.boots - 1:
        finish(crew, sweep)
        return 0
    sweep.side = "old"
    crew.children["luod"].stop(signal.SIGTERM)
    crew.start_luod()
    crew.start_clients(1)
    jump(crew)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClientError as error:
        print(error, error.hint, file=sys.stderr)
        raise
