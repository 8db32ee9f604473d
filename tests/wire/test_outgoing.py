# SPDX-License-Identifier: Apache-2.0
"""What a living luod says is what the published schema says, to the last field, through a whole update and one that is undone."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from luod_world import CMDLINE, Wire, World, new_world

from luod import protocol, replies
from luod.adapters import memfd

TOKEN = "0x1a"
PLAN = {
    "token": TOKEN,
    "kind": "memfd",
    "size": 4096,
    "label": "ram",
    "plan": [{"step": "verify", "args": {"n": [1]}}],
}


def check_said(message: dict[str, Any], verb: str = "") -> None:
    """Compare a message with its struct: nothing may be missing, of another type, or unknown."""
    answer = replies.REPLIES[verb] if message.get("ok") else replies.Refusal
    cls: Any = replies.EVENTS[message["event"]] if "event" in message else answer
    assert json.loads(msgspec.json.encode(msgspec.convert(message, cls))) == message


class Ear(Wire):
    """A connection that checks all that it hears."""

    def __init__(self, world: World, heard: set[str]) -> None:
        super().__init__(world.socket)
        self.heard = heard
        self.waiting: list[dict[str, Any]] = []
        self.asked: dict[int, str] = {}

    def line(self) -> dict[str, Any]:
        message = super().line()
        verb = self.asked.get(message.get("reply", 0), "")
        check_said(message, verb)
        self.heard.add(message.get("event") or (verb if message["ok"] else message["error"]["code"]))
        return message

    def ask(self, verb: str, fds: list[int] | None = None, **fields: Any) -> dict[str, Any]:
        seq = len(self.asked) + 1
        self.asked[seq] = verb
        more: dict[str, Any] = {"fds": len(fds)} if fds else {}
        self.send(msgspec.json.encode({"cmd": verb, "seq": seq, **fields, **more}) + b"\n", fds)
        while (message := self.line()).get("reply") != seq:
            self.waiting.append(message)
        return message

    def event(self, name: str) -> dict[str, Any]:
        for message in self.waiting:
            if message["event"] == name:
                self.waiting.remove(message)
                return message
        while (message := self.line()).get("event") != name:
            self.waiting.append(message)
        return message

    def take_fd(self) -> int:
        return self._fds.pop(0)

    def end(self) -> None:
        """Hear the rest, until luod is gone."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                self.line()


@pytest.fixture
def world(disk_path: Path) -> Iterator[World]:
    with new_world(disk_path / "state", "volatile = true") as made:
        yield made


def preserve(world: World, session: int, token: str) -> None:
    fd = memfd.create("ram", 4096)
    try:
        world.kernel.preserve_fd(session, int(token, 16), fd)
    finally:
        os.close(fd)


def undone_update(world: World, heard: set[str]) -> None:
    with Ear(world, heard) as ear:
        ear.ask("HELLO", version=1, features=["freeze", "inventory", "progress", "from a newer client"])
        ear.ask("PING")
        ear.ask("SUBSCRIBE", id="vm0")
        ear.ask("WATCH", after=0)
        ear.ask("ABORT", id="vm-none")
        ear.ask("RESOLVE", key="vm0.1/none", decision="done")
        ear.ask("LOAD", kernel=str(world.image), cmdline=CMDLINE)
        assert ear.ask("KEXEC", deadline_s=60)["update"] == "update/1"
        ear.event("START_PRESERVATION")
        session = ear.take_fd()
        ear.ask("ADOPT", [session], id="vm0")
        ear.ask("ABORT", reason="for the test")
        ear.event("ABORT")
        ear.ask("NACK", id="vm0", errno="EBUSY", message="not now", token=TOKEN)
        os.close(session)
        ear.ask("ABORTED", id="vm0")
        ear.send(b'{"cmd":"READY"}\n')  # without seq: refused by an event
        ear.event("ERROR")
        world.wait_record("update.aborted", "update/1")
        world.wait_record("session.bound", "vm0.2")  # who stays connected takes part in the next update
    world.wait_record("session.aborted", "vm0.2")
    with Ear(world, heard) as leaver:
        leaver.ask("SUBSCRIBE", id="vm9", policy="best-effort")
        leaver.ask("UNSUBSCRIBE", id="vm9")


def whole_update(world: World, heard: set[str]) -> None:
    with Ear(world, heard) as ear, Ear(world, heard) as plain:
        ear.ask("HELLO", features=["freeze", "inventory"])
        ear.ask("SUBSCRIBE", id="vm1")
        plain.say(cmd="SUBSCRIBE", id="vm2")
        world.wait_record("session.bound", "vm2.1")
        for verb in ("STATUS", "CLIENTS", "SESSIONS", "JOURNAL"):
            ear.ask(verb)
        assert ear.ask("KEXEC")["ok"]
        ear.event("START_PRESERVATION")
        session = ear.take_fd()
        preserve(world, session, TOKEN)
        ear.ask("PRESERVED", id="vm1", resources=[PLAN])
        plain.event("START_PRESERVATION")
        theirs = plain.take_fd()
        plain.say(cmd="READY")
        ear.event("FREEZE")
        for verb, fields in (("STATUS", {}), ("CLIENTS", {}), ("SESSIONS", {}), ("SESSION", {"id": "vm1"})):
            ear.ask(verb, **fields)
        ear.say(cmd="READY", id="vm1")
        ear.end()
        plain.end()
        os.close(session)
        os.close(theirs)


def next_kernel(world: World, heard: set[str]) -> None:
    with Ear(world, heard) as ear, Ear(world, heard) as plain:
        claimed = ear.ask("CLAIM", id="vm1")
        assert claimed["resources"] == [{**PLAN, "checksum": ""}]
        session = ear.take_fd()
        os.close(world.kernel.retrieve_fd(session, int(TOKEN, 16)))
        ear.ask("FINISHED", id="vm1")  # too early
        ear.ask("RESTORED", id="vm1", token="0X1A", step="verify", ok=True)
        ear.ask("STATUS")
        world.kernel.finish(session)
        assert ear.ask("FINISHED", id="vm1")["state"] == "finished"
        os.close(session)
        plain.say(cmd="CLAIM", id="vm2")
        plain.event("SESSION")
        theirs = plain.take_fd()
        world.kernel.finish(theirs)
        os.close(theirs)
        plain.close()
        world.wait_record("update.done")
        for verb, fields in (
            ("SESSIONS", {}),
            ("SESSION", {"id": "vm2"}),
            ("JOURNAL", {"stream": "vm1.1"}),
            ("STATUS", {}),
        ):
            ear.ask(verb, **fields)


def test_all_that_luod_says_is_in_the_schema(world: World) -> None:
    heard: set[str] = set()
    undone_update(world, heard)
    with Ear(world, heard) as ear:
        ear.ask("LOAD", kernel=str(world.image), cmdline=CMDLINE)
    whole_update(world, heard)
    world.next_boot()
    next_kernel(world, heard)
    # READY ends in the kexec and RESOLVE needs an effect in doubt: their replies are not heard here.
    assert set(replies.REPLIES) - heard == {"READY", "RESOLVE"}
    assert set(replies.EVENTS) - heard == set()
    assert {"UNKNOWN_ID", "NOT_IN_DOUBT", "OPEN_STEPS"} <= heard


@pytest.mark.parametrize(
    "message",
    [
        {"event": "FREEZE", "id": "vm1"},
        {"event": "FREEZE", "id": "vm1", "deadline_s": "soon"},
        {"event": "FREEZE", "id": "vm1", "deadline_s": 1.0, "undocumented": 1},
        {"reply": 1, "ok": True, "undocumented": 1},
        {"reply": 1, "ok": False, "error": {"code": "X", "message": "y"}},
    ],
)
def test_the_check_bites(message: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, msgspec.ValidationError)):
        check_said(message, "PING")


def test_every_message_is_in_the_schema() -> None:
    schema = protocol.schema()
    assert set(schema["replies"]) == set(protocol.COMMANDS)
    documented = {
        cls.__name__
        for cls in (*protocol.COMMANDS.values(), *replies.EVENTS.values(), *replies.REPLIES.values())
    }
    assert documented <= set(schema["$defs"])
    assert all(schema["$defs"][name].get("description") for name in documented)
