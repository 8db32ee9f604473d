# SPDX-License-Identifier: Apache-2.0
"""What a durable event costs, as a ratio to the floor of the same run: pwrite + fdatasync into blocks that exist.

    python bench/journal_append.py [--directory DIR] [--rounds N] [--json]

Method: floor and candidates are warm and take turns in shuffled rounds; medians over all operations. Milliseconds of a loaded machine mean
nothing, ratios of one run do, and counts always do: syncs and writes per event are counted in a child by the recorder that the crash
tests use (needs gcc). A journal operation includes the way to the writer thread and back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from luod.journal.record import Entry
from luod.journal.ring import Ring
from luod.journal.writer import Journal
from luod.states.events import EffectIntended, EffectOutcome

CRASH = Path(__file__).resolve().parent.parent / "tests" / "crash"
EVENT = EffectIntended(
    "vm1.1/preserve/0x1a", "preserve_fd", {"token": "0x1a", "size": 1 << 30, "label": "x" * 120}
)
OUTCOME = EffectOutcome("vm1.1/preserve/0x1a", "done")


class Candidates:
    def __init__(self, directory: Path) -> None:
        self.floor_fd = os.open(directory / "floor", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(self.floor_fd, bytes(8 << 20), 0)
        os.fsync(self.floor_fd)
        self.at = 0
        options = {"boot_id": "b", "run_id": "r", "volatile": True}
        self.journal = Journal.open(directory / "warm.db", **options)
        self.growing = Journal.open(directory / "growing.db", pregrow=0, **options)
        self.ring = Ring.format(bytearray(1 << 20), self.journal.journal_id, self.journal.head())
        self.noted: list[Entry] = [Entry("vm1.1", EVENT)]

    def floor(self) -> None:
        os.pwrite(self.floor_fd, b"x" * 331, self.at % (8 << 20))
        os.fdatasync(self.floor_fd)
        self.at += 331

    def append(self) -> None:
        self.journal.append([Entry("vm1.1", EVENT)])

    def append_growing(self) -> None:
        self.growing.append([Entry("vm1.1", EVENT)])

    def step(self) -> None:
        self.journal.append([Entry("vm1.1", EVENT)])
        self.journal.append([Entry("vm1.1", OUTCOME)])

    def group(self, size: int) -> None:
        for future in [self.journal.submit([Entry(f"vm{n}.1", EVENT)]) for n in range(size)]:
            future.result()

    def care(self) -> None:
        if self.journal.checkpoint_due():
            self.journal.checkpoint()

    def close(self) -> None:
        os.close(self.floor_fd)
        self.journal.close()
        self.growing.close()


def measure(directory: Path, rounds: int) -> dict[str, dict[str, float]]:
    made = Candidates(directory)
    candidates: dict[str, tuple[Callable[[], None], int]] = {
        "floor: pwrite + fdatasync": (made.floor, 1),
        "append, log grown at start": (made.append, 1),
        "append, log left to grow": (made.append_growing, 1),
        "step: intent, then outcome": (made.step, 2),
        "8 sessions at once, per event": (lambda: made.group(8), 8),
        "64 sessions at once, per event": (lambda: made.group(64), 64),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    dice = random.Random(1)
    for number in range(rounds + 1):
        order = list(candidates)
        dice.shuffle(order)
        for name in order:
            call, _ = candidates[name]
            made.care()
            for _ in range(20):
                start = time.perf_counter()
                call()
                if number:
                    times[name].append(time.perf_counter() - start)
    noted = []
    made.journal.set_mirror(made.ring.append)
    for _ in range(500):
        start = time.perf_counter()
        made.journal.note(made.noted)
        noted.append(time.perf_counter() - start)
    made.close()
    floor = statistics.median(times["floor: pwrite + fdatasync"])
    shown = {}
    for name, (_, events) in candidates.items():
        each = statistics.median(times[name]) / (events if "per event" in name else 1)
        shown[name] = {"us": round(each * 1e6, 1), "ratio": round(each / floor, 3)}
    each = statistics.median(noted)
    shown["note: black box only, no sync"] = {"us": round(each * 1e6, 1), "ratio": round(each / floor, 4)}
    return shown


def count(directory: Path, events: int) -> dict[str, float]:
    """Count syncs and writes per event of single appends and of a group of 64, in a child that is recorded."""
    if shutil.which("gcc") is None:
        return {}
    sys.path.insert(0, str(CRASH))
    from crash_harness import build_shim, read_trace

    place = directory / "counted"
    place.mkdir()
    found: dict[str, float] = {}
    for name, calls, size in (("one", events, 1), ("64 in a call", events, 64)):
        done = {}
        for number in (0, calls):
            shutil.rmtree(place)
            place.mkdir()
            trace = directory / "trace"
            code = (
                "import ctypes, os, sys\n"
                "from luod.journal.writer import Journal\nfrom luod.journal.record import Entry\n"
                "from luod.states.events import SessionReady\n"
                "j = Journal.open(sys.argv[1] + '/j.db', boot_id='b', run_id='r', volatile=True)\n"
                "j.append([Entry('vm1.1', SessionReady())])\n"
                "ctypes.CDLL(None).crash_arm(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.c_long(0))\n"
                "for n in range(int(sys.argv[3])): j.append([Entry('vm1.1', SessionReady())] * int(sys.argv[4]))\n"
                "os._exit(0)\n"
            )
            subprocess.run(
                [sys.executable, "-c", code, str(place), str(trace), str(number), str(size)],
                env={**os.environ, "LD_PRELOAD": str(build_shim(directory))},
                check=True,
            )
            done[number] = Counter(change.op for change in read_trace(trace, place))
        for op, what in (("s", "syncs"), ("w", "writes")):
            found[f"{what} per event, {name}"] = round((done[calls][op] - done[0][op]) / (calls * size), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure; default: here")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="luod-bench-", dir=options.directory or Path.cwd()) as name:
        times = measure(Path(name), options.rounds)
        counts = count(Path(name), 40)
    pressure = Path("/proc/pressure/cpu")
    load = pressure.read_text().split()[1] if pressure.exists() else f"load {os.getloadavg()[0]}"
    if options.json:
        print(json.dumps({"times": times, "counts": counts, "pressure": load}))
        return
    print(__doc__.strip(), f"\nCPU pressure: some {load}\n", sep="\n")
    for what, row in times.items():
        print(f"  {what:34} {row['us']:10.1f} us   {row['ratio']:7.3f} x floor")
    for what, number in counts.items():
        print(f"  {what:34} {number:10.3f}")


if __name__ == "__main__":
    main()
