# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's own share of the blackout: from the last READY to the kexec call, for 1, 16 and 64 sessions.

    python bench/barrier.py [--directory DIR] [--rounds N] [--sessions 1,16,64] [--json]

Method: a real luod and luod-keeper on the emulated kernel; all clients are connections of this process. Everybody has preserved and is
frozen, all but one are READY. The clock (CLOCK_BOOTTIME) starts right before the last READY is sent. The kernel is told to refuse the
kexec, so that the update can be repeated: the clock stops at luod's record that the call has come back, which is placed the moment it has.
So the time holds one line on a socket, the barrier, every fsync before the call, the scratch session and the call itself, but no jump.
Transactions are counted in the journal: rows of one transaction carry one time. Each is one fsync of the log; none comes after the last
words. Medians over the rounds; milliseconds of a loaded machine say little. The counts are of distinct journal transactions, which bound
the fsyncs from above: group commit can only join them.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator
from luod.client import Client

PATIENCE_S = 60.0


def start(*argv: object) -> subprocess.Popen[bytes]:
    ready, end = os.pipe()
    words = [sys.executable, "-m", *map(str, argv), "--ready-fd", str(end)]
    process = subprocess.Popen(words, pass_fds=(end,), stderr=subprocess.DEVNULL)
    os.close(end)
    with open(ready, "rb", buffering=0) as pipe:
        if not pipe.read(1):
            raise SystemExit(f"{argv[0]} did not start")
    return process


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Bench:
    """One host with so many clients."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path, sessions: int) -> None:
        run, emu = directory / "run", directory / "emu"
        emulator = stack.enter_context(Emulator.start(emu))
        self.control = stack.enter_context(emulator.control(timeout=PATIENCE_S))
        backend = ("--kernel", "emulated", "--emulator", emu)
        for argv in (
            ("luod.adapters.keeper", "--dir", run, *backend),
            ("luod.daemon", "--state", directory / "state", "--run", run, "--volatile", *backend),
        ):
            process = start(*argv)
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGKILL)
        socket = run / "liveupdate.sock"
        self.admin = stack.enter_context(Client.connect(socket, PATIENCE_S))
        self.admin.load(stub_image(directory / "next"), cmdline="kho=on liveupdate=on")
        self.clients: dict[str, Client] = {}
        for number in range(sessions):
            client = stack.enter_context(Client.connect(socket, PATIENCE_S))
            client.hello(["freeze"])
            client.subscribe(f"vm{number}")
            self.clients[f"vm{number}"] = client

    def round(self) -> dict[str, Any]:
        """Run one update up to the refused kexec, and undo it."""
        self.control.inject("freeze", errno=errno.EBUSY)
        head = self.admin.status()["journal"]["rows"]
        update = self.admin.kexec()["update"]
        held = []
        for name, client in self.clients.items():
            with client.next_event(PATIENCE_S, names=["START_PRESERVATION"]) as event:
                held.append(event.take_fd())
            client.preserved(name)
        for client in self.clients.values():
            client.next_event(PATIENCE_S, names=["FREEZE"])
        *others, last = self.clients
        for name in others:
            self.clients[name].ready(name)
        begun = now_ns()
        self.clients[last].ready(last)
        self.clients[last].next_event(PATIENCE_S, names=["ABORT"])
        for fd in held:
            os.close(fd)
        for name, client in self.clients.items():
            if name != last:
                client.next_event(PATIENCE_S, names=["ABORT"])
            client.call("ABORTED", id=name)
        self._wait(head, f"{update}", "update.aborted.")
        rows = list(self.admin.records(after=head))
        back = next(
            row for row in rows if row["body"].get("key") == f"{update}/reboot" and "status" in row["body"]
        )
        said = next(row for row in rows if row["type"].startswith("update.rebooting."))
        times = {row["boot_ns"] for row in rows if begun <= row["boot_ns"] <= said["boot_ns"]}
        return {
            "ms": (back["boot_ns"] - begun) / 1e6,
            "transactions": len(times),
            "rows": sum(begun <= row["boot_ns"] <= said["boot_ns"] for row in rows),
        }

    def _wait(self, after: int, stream: str, kind: str) -> None:
        for row in self.admin.records(after=after):
            if row["stream"] == stream and row["type"].startswith(kind):
                return
        while True:
            event = self.watcher().next_event(PATIENCE_S, names=["PROGRESS"])
            if event["record"]["stream"] == stream and event["record"]["type"].startswith(kind):
                return

    def watcher(self) -> Client:
        """Return the admin's connection, watching."""
        if not hasattr(self, "_watching"):
            self.admin.watch(after=0)
            self._watching = True
        return self.admin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure; default: here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sessions", default="1,16,64")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for count in map(int, options.sessions.split(",")):
        with contextlib.ExitStack() as stack:
            parent = options.directory or Path.cwd()
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="luod-bench-", dir=parent))
            bench = Bench(stack, Path(place), count)
            rounds = [bench.round() for _ in range(options.rounds)]
        found[str(count)] = {
            "median_ms": round(statistics.median(one["ms"] for one in rounds), 2),
            "worst_ms": round(max(one["ms"] for one in rounds), 2),
            "transactions": sorted({one["transactions"] for one in rounds}),
            "rows": sorted({one["rows"] for one in rounds}),
        }
    if options.json:
        print(json.dumps(found))
        return
    print(__doc__.strip(), "", sep="\n")
    for number, row in found.items():
        print(
            f"  {number:>4} sessions   median {row['median_ms']:8.2f} ms   worst {row['worst_ms']:8.2f} ms   "
            f"fsyncs {row['transactions']}   rows {row['rows']}"
        )


if __name__ == "__main__":
    main()
