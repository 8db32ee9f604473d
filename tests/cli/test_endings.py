# SPDX-License-Identifier: Apache-2.0
"""How updates end, and what luoctl makes of it; who may ask for what; what an argument may be."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

import pytest
from luoctl_process import Luoctl, ended
from luod_world import Puppet, World

from luod.cli.follow import Follower, Progress
from luod.client import ConnectionLost, Unreachable


def begin(world: World, luoctl: Luoctl, puppet: Puppet, **subscription: Any) -> None:
    puppet.call("SUBSCRIBE", id="vm1", **subscription)
    assert luoctl("load", world.image, "--cmdline", "kho=on liveupdate=on").code == 0


def test_a_kernel_that_refuses_the_kexec(world: World, luoctl: Luoctl) -> None:
    world.control.inject("freeze", errno=errno.EBUSY, session="luod.vm1.1", token=1)
    with Puppet(world) as puppet:
        begin(world, luoctl, puppet)
        kexec = luoctl.start("kexec")
        puppet.event("START_PRESERVATION")
        puppet.preserve(1, "x")
        puppet.call("READY", id="vm1")
        puppet.event("ABORT")
        puppet.drop()
        puppet.call("ABORTED", id="vm1")
        answer = ended(kexec)
    assert answer.code == 1
    assert answer.out.startswith("update/1 was aborted: the kernel refused the kexec: EBUSY")
    why = luoctl("journal", "why", "update/1", "--json").json
    assert [one["type"] for one in why["because"]] == [
        "update.aborted.v1", "update.abort_requested.v1", "update.refused.v1", "effect.outcome.v1",
    ]  # fmt: skip
    assert why["because"][-1]["text"].startswith("failed EBUSY")


def test_an_update_with_a_failed_session(world: World, luoctl: Luoctl) -> None:
    step = {"step": "bind", "args": {}}
    with Puppet(world) as puppet:
        begin(world, luoctl, puppet)
        assert luoctl("kexec", "--no-wait").code == 0
        puppet.event("START_PRESERVATION")
        puppet.preserve(1, "x")
        puppet.call("PRESERVED", id="vm1", resources=[{"token": "0x1", "size": 4096, "plan": [step]}])
        puppet.ask("post", cmd="READY", id="vm1")
        world.next_boot(puppet)
    with Puppet(world) as puppet:
        waiting = luoctl.start("wait")
        assert waiting.stderr is not None
        assert "update/1 is recovering" in waiting.stderr.readline()
        puppet.call("CLAIM", id="vm1")
        assert "bind: open" in luoctl("session", "vm1").out
        puppet.call("RESTORED", id="vm1", token="0x1", step="bind", ok=False, errno="EINVAL")
        answer = ended(waiting)
        assert (answer.code, answer.out) == (1, "update/1 is done: 1 failed\n")
        assert "vm1.1: failed: step bind of 0x1 failed EINVAL" in answer.err
        assert "bind: failed EINVAL" in luoctl("session", "vm1").out
        why = luoctl("journal", "why", "1").out
        assert "vm1.1: step bind of 0x1 failed: EINVAL" in why


def test_luod_that_never_comes_back(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as puppet:
        begin(world, luoctl, puppet)
        luoctl("kexec", "--no-wait")
        puppet.event("START_PRESERVATION")
        follower = Follower(str(world.socket), Progress(quiet=True), patience_s=0.1)

        def until(_: Any) -> bool:
            world.kill_luod()
            return False

        with pytest.raises((Unreachable, ConnectionLost)) as failed:
            follower.run(until)
        assert failed.value.exit_code == 3
        assert world.keeper is not None
        puppet.drop()


def as_uid(uid: int, luoctl: Luoctl, *words: object) -> tuple[int, str, str]:
    """Run luoctl as another user."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = luoctl(*words)
            os.write(theirs, json.dumps([answer.code, answer.out, answer.err]).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    code, out, err = json.loads(text)
    return code, out, err


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_sees_and_moves_only_what_is_theirs(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as roots, Puppet(world, uid=4711) as theirs:
        roots.call("SUBSCRIBE", id="vm1")
        theirs.call("SUBSCRIBE", id="vm2")
        code, out, _ = as_uid(4711, luoctl, "list", "--json")
        assert (code, [one["id"] for one in json.loads(out)["clients"]]) == (0, ["vm2"])
        code, out, _ = as_uid(4711, luoctl, "journal", "show", "--json")
        assert {one["stream"] for one in json.loads(out)["records"]} == {"vm2.1"}
        code, out, _ = as_uid(4711, luoctl, "journal", "replay", "--json")
        assert [one["id"] for one in json.loads(out)["sessions"]] == ["vm2.1"]
        for words in (("session", "vm1"), ("abort", "vm1"), ("journal", "why", "vm1")):
            code, out, err = as_uid(4711, luoctl, *words)
            assert (code, out) == (1, "")
            assert "vm1" in err.splitlines()[0]
            assert "vm1.1" not in err
        for words in (
            ("kexec",),
            ("load", str(world.image), "--cmdline", ""),
            ("resolve", "a", "done"),
            ("abort",),
        ):
            code, _, err = as_uid(4711, luoctl, *words)
            assert code == 1
            assert "is not for uid 4711" in err
            assert "hint: an admin uid may" in err
        code, _, err = as_uid(4711, luoctl, "journal", "verify")
        assert code == 2
        assert "run this as the user of luod" in err


def test_arguments_that_are_not_text(world: World, luoctl: Luoctl) -> None:
    for words in (("session", "\udcff"), ("abort", "--reason", "\udcff"), ("journal", "why", "\udcff")):
        answer = luoctl(*words)
        assert answer.code in (1, 2)
        assert answer.out == ""
        assert len(answer.err.splitlines()) == 2


def test_arguments_that_are_too_long(world: World, luoctl: Luoctl) -> None:
    for length in (300, 70_000):
        answer = luoctl("session", "x" * length)
        assert (answer.code, answer.out) == (2, "")
        assert len(answer.err.splitlines()) == 2


def test_help_of_every_verb_fits(offline: Luoctl) -> None:
    for words in (
        (),
        ("status",),
        ("journal",),
        ("journal", "show"),
        ("kexec",),
        ("load",),
        ("demo",),
        ("lab",),
    ):
        answer = offline(*words, "--help", columns=80)
        assert answer.code == 0
        assert answer.out.startswith(f"Usage: luoctl {' '.join(words)}".rstrip())
        assert max(map(len, answer.out.splitlines())) <= 80
