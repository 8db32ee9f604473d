# SPDX-License-Identifier: Apache-2.0
"""Kills a workload at every change it makes to its directory, and cuts its power, and looks whether it recovers.

A workload is any class with the methods of `Workload`; `sweep()` runs it in a process of its own that has `crash_shim.c` preloaded. That
process never starts a thread: it forks a child for each crash, so that the child may start what threads it likes.

Kill: the child gets SIGKILL after the n-th change (create, write, truncate, rename, unlink, sync). What it wrote is there: only the
process died. Again: the recovery is killed too, and recovered from.
Power: the changes are recorded once. For the instant after each of them, images are built of what a disk may hold: what was synced,
plus none, all, each prefix, some random subsets of what was not, or all with the last write torn at 512-byte boundaries. Data becomes
durable by a sync of its file, names (create, rename, unlink) by a sync of their directory. Each distinct image is recovered from.
Files in `EXTERNAL` are not on the disk: they stand for the kernel and for clients, which see what they saw.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

EXTERNAL = ("world", "ack")
HERE = Path(__file__).parent
HEAD = struct.Struct("<cHqI")
TEAR_LIMIT = 16384  # writes longer than this are torn in the middle only: they fill space with zeros


class Workload(Protocol):
    """Something that must survive. Made anew in each child with the options that the test gave."""

    def run(self, directory: Path) -> None:
        """Work from an empty directory to the end, writing what was promised to `directory/ack`."""

    def recover(self, directory: Path) -> list[str]:
        """Start again on what a crash left, work to the end, and return what is wrong."""


@dataclass
class Result:
    """What a sweep did: `points` places to crash, `runs` recoveries or images, and what went wrong."""

    points: int = 0
    runs: int = 0
    adopted: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def build_shim(directory: Path) -> Path:
    """Compile the shim; raises FileNotFoundError without gcc."""
    target = directory / "crash_shim.so"
    if not target.exists():
        part = directory / f"crash_shim.{os.getpid()}.so"
        source = str(HERE / "crash_shim.c")
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", "-o", str(part), source, "-ldl", "-lpthread"], check=True
        )
        part.rename(target)
    return target


def sweep(shim: Path, directory: Path, kind: str, workload: str, **options: Any) -> Result:
    """Run one sweep (`kill`, `again`, `power`, `sync`, `space`) of `module:Class` and return its result.

    `every`, `again_every` and `subsets` set how densely it samples; `until` ends it at the first failure with this text; the rest goes to
    the workload's constructor.
    """
    request = {"kind": kind, "workload": workload, "directory": str(directory), "options": options}
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            str(HERE / "crash_harness.py"),
            json.dumps(request),
        ],
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"the sweep itself failed: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


# -- in the process with the shim


class Seen(Exception):
    """The failure that a mutant must show was shown."""


class Sweeper:
    def __init__(self, directory: Path, workload: str, options: dict[str, Any]) -> None:
        module, name = workload.split(":")
        self.every: int = options.pop("every", 1)
        self.again_every: int = options.pop("again_every", 1)
        self.subsets: int = options.pop("subsets", 3)
        self.until: str = options.pop("until", "")
        self.make = lambda: getattr(importlib.import_module(module), name)(**options)
        self.make()  # imports what children need
        self.place = directory / "place"
        self.note = directory / "note"
        self.trace = directory / "trace"
        library = ctypes.CDLL(None)
        self.arm = library.crash_arm
        self.arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long]
        self.count = library.crash_count
        self.count.restype = ctypes.c_long
        self.fail_sync, self.fail_write = library.crash_fail_sync, library.crash_fail_write
        self.pending_faults = library.crash_pending_faults
        self.result = Result()
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in a child would copy every page that it shares with this process

    def empty(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def child(
        self, what: str, at: int = 0, trace: Path | None = None, fault: tuple[str, int, int] | None = None
    ) -> int:
        """Fork and run a method of the workload; return the wait status. What it found is in `self.found`."""
        self.note.unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            status = 3
            try:
                self.arm(os.fsencode(self.place), os.fsencode(trace or ""), at)
                if fault:
                    (self.fail_sync if fault[0] == "sync" else self.fail_write)(fault[1], fault[2])
                found = getattr(self.make(), what)(self.place) or []
                changes = self.count()
                self.arm(b"/nowhere", b"", 0)
                self.note.write_text(json.dumps([changes, found, self.pending_faults()]))
                status = 0
            except BaseException:
                self.arm(b"/nowhere", b"", 0)
                found = [traceback.format_exc()[-1500:]]
                self.note.write_text(json.dumps([self.count(), found, self.pending_faults()]))
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        told = json.loads(self.note.read_text()) if self.note.exists() else (0, [], 0)
        self.changes, self.found, self.unspent = told
        return status

    def reference(self, trace: Path | None = None) -> int:
        self.empty()
        status = self.child("run", trace=trace)
        if status:
            raise SystemExit(f"the workload fails without any crash: {self.found}")
        return int(self.changes)

    def judge(self, where: str) -> None:
        self.result.runs += 1
        status = self.child("recover")
        if status or self.found:
            problem = f"{where}: {'; '.join(map(str, self.found)) or f'recovery ended with status {status}'}"
            self.result.failures.append(problem)
            if self.until and self.until in problem:
                raise Seen

    def kill(self) -> None:
        for at in range(1, self.reference() + 1, self.every):
            self.result.points += 1
            self.empty()
            self.child("run", at)
            self.judge(f"killed after change {at}")

    def again(self) -> None:
        for at in range(1, self.reference() + 1, self.every):
            self.empty()
            self.child("run", at)
            saved = self.place.with_name("saved")
            shutil.rmtree(saved, ignore_errors=True)
            shutil.copytree(self.place, saved)
            self.child("recover")
            for second in range(1 + at % self.again_every, int(self.changes) + 1, self.again_every):
                self.result.points += 1
                shutil.rmtree(self.place)
                shutil.copytree(saved, self.place)
                self.child("recover", second)
                self.judge(f"killed after change {at} and again after change {second}")

    def _faults(self, kind: str, number: int) -> None:
        nth = 1
        while True:
            self.empty()
            status = self.child("run", fault=(kind, nth, number))
            if status == 0 and self.unspent:
                return
            if os.WIFSIGNALED(status):
                raise SystemExit(f"fault {nth} ended the workload with status {status}")
            self.result.points += 1
            self.judge(f"{kind} {nth} fails with {os.strerror(number)}")
            nth += self.every

    def sync(self) -> None:
        self._faults("sync", 5)  # EIO

    def space(self) -> None:
        self._faults("write", 28)  # ENOSPC

    def power(self) -> None:
        self.reference(self.trace)
        changes = read_trace(self.trace, self.place)
        self.result.points = len(changes)
        seen: set[int] = set()
        for name, image, live in images(changes, random.Random(1), self.every, self.subsets):
            key = hash((tuple(sorted(image.items())), tuple(sorted(live.items()))))
            if key in seen:
                continue
            seen.add(key)
            self.empty()
            for file, content in {**image, **live}.items():
                (self.place / file).write_bytes(content)
            self.judge(name)


@dataclass
class Change:
    """One recorded change. `op`: c create, w write, t truncate, u unlink, m move, s sync."""

    op: str
    name: str
    offset: int
    data: bytes


def read_trace(path: Path, root: Path) -> list[Change]:
    """Read what the shim recorded."""
    raw, at, changes = path.read_bytes(), 0, []
    while at < len(raw):
        op, length, offset, size = HEAD.unpack_from(raw, at)
        at += HEAD.size
        name = raw[at : at + length].decode().removesuffix(" (deleted)")
        at += length
        data, at = raw[at : at + size], at + size
        relative = "" if Path(name) == root else Path(name).name
        changes.append(Change(op.decode(), relative, offset, data))
    return changes


class Disk:
    """Names and contents; a name points at a numbered file, as in a directory."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.files: dict[int, bytearray] = {}

    def copy(self) -> Disk:
        other = Disk()
        other.names = dict(self.names)
        other.files = {number: bytearray(content) for number, content in self.files.items()}
        return other

    def apply(self, change: Change, file: int) -> None:
        if change.op == "c":
            self.names[change.name] = file
        elif change.op == "u":
            self.names.pop(change.name, None)
        elif change.op == "m":
            if change.name in self.names:
                self.names[Path(change.data.decode()).name] = self.names.pop(change.name)
        elif change.op in "wt":
            content = self.files.setdefault(file, bytearray())
            if change.op == "t":
                del content[change.offset :]
            content.extend(bytes(max(0, change.offset - len(content))))
            content[change.offset : change.offset + len(change.data)] = change.data

    def image(self) -> dict[str, bytes]:
        return {name: bytes(self.files.get(file, b"")) for name, file in self.names.items()}


def images(
    changes: list[Change], dice: random.Random, every: int, subsets: int
) -> Iterator[tuple[str, dict[str, bytes], dict[str, bytes]]]:
    """Yield what the disk may hold after a power cut at each change, and what the world outside holds then."""
    durable, live, world = Disk(), Disk(), Disk()
    pending: list[tuple[Change, int]] = []
    for index, change in enumerate(changes, 1):
        if change.name in EXTERNAL:
            number = world.names.setdefault(change.name, len(world.names))
            world.apply(change, number)
        elif change.op == "s":
            file = live.names.get(change.name, -1)
            keep = []
            for before, number in pending:
                names = before.op in "cum"
                if names if not change.name else not names and number == file:
                    durable.apply(before, number)
                else:
                    keep.append((before, number))
            pending = keep
        else:
            if change.op == "c":
                live.apply(change, index)
            file = live.names.get(change.name, -1)
            if change.op in "um":
                live.apply(change, file)
            pending.append((change, file))
        if index % every:
            continue
        for name, subset in _subsets(pending, dice, subsets):
            disk = durable.copy()
            for before, number in subset:
                disk.apply(before, number)
            yield f"power cut after change {index}, {name}", disk.image(), world.image()


def _subsets(
    pending: list[tuple[Change, int]], dice: random.Random, count: int
) -> Iterator[tuple[str, list[tuple[Change, int]]]]:
    yield "nothing unsynced", []
    if not pending:
        return
    yield "all unsynced", pending
    for length in range(1, len(pending)):
        yield f"the first {length} unsynced", pending[:length]
    last, file = pending[-1]
    if last.op == "w":
        size = len(last.data)
        cuts = range(512, size, 512) if size <= TEAR_LIMIT else [size // 1024 * 512]
        for cut in cuts:
            torn = Change("w", last.name, last.offset, last.data[:cut])
            yield f"the last write torn at {cut}", [*pending[:-1], (torn, file)]
    for number in range(count if len(pending) > 1 else 0):
        yield f"random subset {number}", [item for item in pending if dice.random() < 0.5]


def main() -> None:
    request = json.loads(sys.argv[1])
    sweeper = Sweeper(Path(request["directory"]), request["workload"], request["options"])
    start = time.monotonic()
    with contextlib.suppress(Seen):
        getattr(sweeper, request["kind"])()
    sweeper.result.seconds = round(time.monotonic() - start, 3)
    print(json.dumps(asdict(sweeper.result)))


if __name__ == "__main__":
    main()
