# SPDX-License-Identifier: Apache-2.0
"""A tour through every verb of luoctl with `--json`: what docs/luoctl.md shows is compared with what it brings home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luoctl_process import Luoctl, ended, whole_update
from luod_world import Puppet, new_world

from luod.journal.record import Entry
from luod.journal.writer import Journal
from luod.states import events as ev


def tour(state: Path) -> dict[str, Any]:
    """Return what every verb prints, by the words of its call."""
    found: dict[str, Any] = {}
    state.mkdir()
    with Journal.open(state / "journal.db", boot_id="an earlier one", run_id="1") as journal:
        journal.append([Entry("luod", ev.EffectIntended("luod/polish", "polish.floor"))])
        journal.append([Entry("vm9.1", ev.SessionFinished("client"))])
    with new_world(state) as world:
        luoctl = Luoctl(world.socket)

        def note(name: str, *words: object) -> None:
            found[name] = luoctl(*words, "--json").json

        whole_update(world, luoctl)
        note("wait", "wait")
        note("status", "status")
        note("journal replay", "journal", "replay")
        note("resolve", "resolve", "luod/polish", "absent")
        note("journal show", "journal", "show", "--stream", "vm1.1", "--limit", 1)
        note("journal verify", "journal", "verify")
        note("journal export", "journal", "export", "--output", world.dir / "journal.jsonl")
        note("journal timeline", "journal", "timeline")
        note("journal why", "journal", "why", "vm1")
        note("sessions", "sessions")
        note("session", "session", "vm1")
        note("check-config", "check-config", world.config)
        note("error", "session", "ghost")
        with Puppet(world) as puppet:
            puppet.call("SUBSCRIBE", id="vm3")
            note("list", "list")
            note("clients", "clients")
            note("load", "load", world.image, "--cmdline", "kho=on liveupdate=on")
            note("kexec", "kexec", "--no-wait")
            puppet.event("START_PRESERVATION")
            abort = luoctl.start("abort", "--json")
            puppet.event("ABORT")
            puppet.drop()
            puppet.call("ABORTED", id="vm3")
            found["abort"] = ended(abort).json
    return found
