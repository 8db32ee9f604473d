# SPDX-License-Identifier: Apache-2.0
"""Embed the engine: an agent that copies files across an "update", each exactly once, whatever dies in between."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import anyio

from luod.engine.ports import Absent, Done, Intent, Probe
from luod.engine.runner import Engine
from luod.journal.writer import Journal
from luod.states.events import Owner, SessionBound, SessionCreated, SessionPreserved


class CopyFile:
    """The adapter: one kind of effect, with the probe that makes a crash harmless."""

    repeatable = False  # copying twice might overwrite what somebody changed since
    carried = False  # files are not carried over a kexec by this agent

    def apply(self, intent: Intent) -> dict[str, object]:
        part = Path(intent.args["to"] + ".part")
        shutil.copyfile(intent.args["from"], part)
        part.rename(intent.args["to"])
        return {"bytes": Path(intent.args["to"]).stat().st_size}

    def probe(self, intent: Intent) -> Probe:
        done = Path(intent.args["to"])
        return Done({"bytes": done.stat().st_size}) if done.exists() else Absent()


async def agent(state: Path, source: Path, target: Path) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with Journal.open(state / "journal.db", boot_id=boot, run_id="embed", volatile=True) as journal:
        engine = Engine(journal, {"copy": CopyFile()}, boot_id=boot)
        for question in await engine.settle():  # what a dead agent left in doubt and no probe can answer
            sys.exit(f"{question.key} needs a person")
        if engine.book.session("disk.1") is None:
            await engine.record(("disk.1", SessionBound("disk", 1, Owner(0, 0, 0))))
            await engine.record(("disk.1", SessionCreated("update/1", "luod.disk.1")))
        files = sorted(path for path in source.iterdir() if path.is_file())
        copies = [
            Intent(
                "disk.1", f"disk.1/copy/{one.name}", "copy", {"from": str(one), "to": str(target / one.name)}
            )
            for one in files
        ]
        outcomes = await engine.perform(
            *copies
        )  # one fsync of intents, all copies at once, one fsync of outcomes
        if all(one.status == "done" for one in outcomes) and engine.book.streams["disk.1"].state == "created":
            await engine.record(("disk.1", SessionPreserved()))
        print(f"disk.1 is {engine.book.streams['disk.1'].state}, {len(outcomes)} files copied")


if __name__ == "__main__":
    anyio.run(agent, *map(Path, sys.argv[1:4]))
