# SPDX-License-Identifier: Apache-2.0
"""What folding a journal costs: microseconds per event of a whole replay, beside a bare decode of the same bodies.

    python bench/replay.py [--sessions N] [--rounds N] [--json]

Method: a journal of N complete sessions (bound, created, preserved, ready, rebooting, retrieved, two steps, restored, finished, and the
effects between them) is made once. In each round three ways of going through its rows take turns in shuffled order, all in memory except
the last: `decode` is msgspec.json.decode of each body into its event struct and nothing else; `fold` is Book.apply over the rows, which is
what a starting luod and every tool do; `read + check + fold` opens the file as `luoctl journal replay` does, verifies the chain of every
row, and folds. Medians over the rounds; of one run only the ratio to `decode` can be carried to another machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from luod.engine.book import Book
from luod.journal.record import Entry, Record
from luod.journal.replay import Replay
from luod.journal.writer import Journal
from luod.states import codec
from luod.states import events as ev

PLAN = (ev.Step("retrieve"), ev.Step("verify"))


def effect(stream: str, what: str) -> list[Entry]:
    key = f"{stream}/{what}"
    args = {"name": f"luod.{stream}"}
    intended = ev.EffectIntended(key, f"session.{what}", args)
    return [Entry(stream, intended), Entry(stream, ev.EffectOutcome(key, "done"))]


def before(client: str) -> list[Entry]:
    name = f"{client}.1"
    resource = ev.Resource("0x1a", "memfd", 16 << 20, "ram0", "00" * 16, PLAN)
    return [
        Entry(name, ev.SessionBound(client, 1, ev.Owner(0, 0, 4242))),
        *effect(name, "create"),
        *effect(name, "mark"),
        Entry(name, ev.SessionCreated("update/1", f"luod.{name}")),
        *effect(name, "hand"),
        Entry(name, ev.SessionPreserved((resource,))),
        Entry(name, ev.SessionReady()),
        Entry(name, ev.SessionRebooting("update/1")),
    ]


def after(client: str) -> list[Entry]:
    name = f"{client}.1"
    return [
        *effect(name, "retrieve"),
        Entry(name, ev.SessionRetrieved()),
        *effect(name, "hand"),
        *(Entry(name, ev.SessionStep("0x1a", step.step, True)) for step in PLAN),
        Entry(name, ev.SessionRestored()),
        Entry(name, ev.SessionFinished("marker")),
        *effect(name, "release"),
    ]


def make(path: Path, sessions: int) -> list[Record]:
    clients = [f"vm{number}" for number in range(sessions)]
    for boot, story in (("boot-1", before), ("boot-2", after)):
        with Journal.open(path, boot_id=boot, run_id=boot, volatile=True) as journal:
            for client in clients:
                journal.append(story(client))
            rows = list(journal.read())
    return rows


def decode(rows: list[Record]) -> None:
    for row in rows:
        codec.decode(row.type, row.body)


def fold(rows: list[Record]) -> None:
    book = Book(rows)
    assert all(one.state == "finished" and not one.anomalies for one in book.sessions())


def read(path: Path) -> None:
    with Replay(path, deep=True) as replay:
        Book(replay)
        assert replay.report().ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="luod-bench-") as name:
        path = Path(name) / "journal.db"
        rows = make(path, options.sessions)
        ways: dict[str, Callable[[], None]] = {
            "decode": lambda: decode(rows),
            "fold": lambda: fold(rows),
            "read + check + fold": lambda: read(path),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way in random.sample(list(ways), len(ways)):
                began = time.perf_counter()
                ways[way]()
                times[way].append((time.perf_counter() - began) / len(rows) * 1e6)
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    found = {
        way: {"us_per_event": round(us, 3), "ratio": round(us / medians["decode"], 2)}
        for way, us in medians.items()
    }
    if options.json:
        print(json.dumps({"events": len(rows), "ways": found}))
        return
    print(__doc__.strip(), f"\n{len(rows)} events of {options.sessions} sessions\n", sep="\n")
    for way, row in found.items():
        print(f"  {way:22} {row['us_per_event']:8.2f} us/event   {row['ratio']:6.2f} x decode")


if __name__ == "__main__":
    main()
