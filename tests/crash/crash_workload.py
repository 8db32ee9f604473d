# SPDX-License-Identifier: Apache-2.0
"""The engine in small: intent, effect, outcome; on start, what is in doubt is asked of the world. On the product's own journal.

`world` is the kernel: effects are visible at once, survive a crash of luod, and are not idempotent. `ack` is a client: each line is an
event that was acknowledged to it. One option breaks one thing, to prove that the harness sees it.
"""

from __future__ import annotations

import os
from pathlib import Path

from luod.journal import record as record_module
from luod.journal import store as store_module
from luod.journal.record import Entry, Record
from luod.journal.replay import Replay
from luod.journal.writer import Journal
from luod.states.events import EffectIntended, EffectOutcome, SessionReady

STEPS = ("preserve/a", "freeze", "finish")
PAIR = ("pair/a", "pair/b")


class JournalWorkload:
    def __init__(self, pregrow: int = 0, mutant: str = "") -> None:
        self.pregrow = pregrow
        self.mutant = mutant
        if mutant == "normal":
            _weaken_sync()

    # -- the two sides outside

    def _effect(self, key: str) -> None:
        _add_line(self.directory / "world", key)

    def _happened(self, key: str) -> bool:
        return self.mutant != "blind" and key in _lines(self.directory / "world")

    # -- the journal side

    def _write(self, *entries: Entry) -> None:
        for record in self.journal.append(entries):
            _add_line(self.directory / "ack", _line(record))

    def _outcomes(self, keys: tuple[str, ...]) -> list[Entry]:
        return [Entry("vm1.1", EffectOutcome(key, "done")) for key in keys]

    def _step(self, *keys: str) -> None:
        intents = [Entry("vm1.1", EffectIntended(key, "test")) for key in keys]
        if self.mutant == "effect-first":
            for key in keys:
                self._effect(key)
            self._write(*intents)
        else:
            self._write(*intents)
            for key in keys:
                self._effect(key)
        self._write(*self._outcomes(keys))

    def run(self, directory: Path) -> None:
        self.directory = directory
        with Journal.open(
            directory / "journal.db", boot_id="b", run_id="r", volatile=True, pregrow=self.pregrow
        ) as self.journal:
            done, intended = set(), set()
            for record in self.journal.read():
                event = record.event()
                if isinstance(event, EffectIntended):
                    intended.add(event.key)
                elif isinstance(event, EffectOutcome):
                    done.add(event.key)
            for key in sorted(intended - done):
                if not self._happened(key):
                    self._effect(key)
                self._write(*self._outcomes((key,)))
            for key in STEPS:
                if key not in done | intended:
                    self._step(key)
            if not done & set(PAIR) and not intended & set(PAIR):
                self.journal.note([Entry("luod", SessionReady())])
                self._step(*PAIR)
                self.journal.checkpoint()
                self._write(Entry("vm2.1", SessionReady()), Entry("vm3.1", SessionReady()))

    def recover(self, directory: Path) -> list[str]:
        promised = _lines(directory / "ack")
        self.run(directory)
        problems = []
        with Replay(directory / "journal.db", deep=True) as replay:
            there = [_line(record) for record in replay]
            report = replay.report()
        if not report.ok:
            problems.append(f"verify says {report.damage}")
        effects = _lines(directory / "world")
        if sorted(effects) != sorted(STEPS + PAIR):
            problems.append(f"the effects are {effects}")
        lost = [line for line in promised if line not in there]
        if lost:
            problems.append(f"acknowledged and lost: {lost}")
        return problems


def _line(record: Record) -> str:
    return f"{record.id} {record.stream} {record.seq} {record.type} {record.body.decode()}"


def _add_line(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


def _lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _weaken_sync() -> None:
    """Have the store run with synchronous=NORMAL although it asked for FULL and was told FULL."""
    configure = store_module._configure

    def weak(connection, path):
        configure(connection, path)
        connection.execute("PRAGMA synchronous=NORMAL")

    store_module._configure = weak


def payload_of_body_only():
    """Return a `payload` that makes the chain cover the id and the body only, as a checksum of the payload would."""
    full = record_module.payload

    def narrow(id, stream, seq, type, wall_ns, boot_ns, boot_id, run_id, cause, body):
        return full(id, "", 0, "", 0, 0, "", "", None, body)

    return narrow
