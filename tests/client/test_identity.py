# SPDX-License-Identifier: Apache-2.0
"""An id belongs to the uid that took it: no other uid can use it, undo it, or learn of it, before and after the reboot."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from luod_world import Puppet, Wire, World

from luod.client import ClientError

OWNER, OTHER, ADMIN = 12345, 65534, 0

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="clients of other uids can only be made by root")


def refused(puppet: Puppet, cmd: str, **fields: object) -> str:
    with pytest.raises(ClientError) as caught:
        puppet.call(cmd, **fields)
    return caught.value.code


def see_nothing(other: Puppet, session: str = "vm1.1") -> None:
    assert other.call("SESSIONS")["sessions"] == []
    for name in ("vm1", session):
        assert refused(other, "SESSION", id=name) == "UNKNOWN_ID"
    assert other.call("CLIENTS")["clients"] == []
    assert other.call("JOURNAL", after=0, limit=1000)["records"] == []
    assert other.call("JOURNAL", stream=session)["records"] == []
    status = other.call("STATUS")
    assert status["sessions"] == {}
    assert status["in_doubt"] == []


def change_nothing(other: Puppet, session: str = "vm1.1") -> None:
    assert refused(other, "SUBSCRIBE", id="vm1") == "NOT_YOURS"
    assert refused(other, "CLAIM", id="vm1") == "UNKNOWN_ID"
    for name in ("vm1", session):
        assert refused(other, "ABORT", id=name) == "UNKNOWN_ID"
    for cmd in ("READY", "PRESERVED", "FINISHED", "ABORTED", "UNSUBSCRIBE"):
        assert refused(other, cmd, id="vm1") == "UNKNOWN_ID"
    assert refused(other, "NACK", id="vm1", errno="EBUSY") == "UNKNOWN_ID"
    assert refused(other, "RESTORED", id="vm1", token="0x1", step="x", ok=True) == "UNKNOWN_ID"


def steer_nothing(other: Puppet) -> None:
    assert refused(other, "LOAD", kernel="/nowhere") == "NOT_ALLOWED"
    assert refused(other, "KEXEC") == "NOT_ALLOWED"
    assert refused(other, "ABORT") == "NOT_ALLOWED"
    assert refused(other, "RESOLVE", key="vm1.1/create", decision="done") == "NOT_ALLOWED"


def rows(world: World) -> int:
    with world.client() as admin:
        return int(admin.status()["journal"]["rows"])


@pytest.fixture
def subscribed(world: World) -> Iterator[tuple[World, Puppet]]:
    with Puppet(world, OWNER) as owner:
        assert owner.call("HELLO", version=1, features=[])["role"] == "client"
        assert owner.call("SUBSCRIBE", id="vm1") == {"session": "vm1.1", "state": "new"}
        yield world, owner


def test_before_the_reboot(subscribed: tuple[World, Puppet]) -> None:
    world, owner = subscribed
    with Puppet(world, OTHER) as other:
        before = rows(world)
        see_nothing(other)
        change_nothing(other)
        steer_nothing(other)
        assert rows(world) == before
    with world.client() as admin:
        assert admin.session("vm1")["session"]["owner"]["uid"] == OWNER
    assert owner.call("SESSION", id="vm1")["session"]["state"] == "new"
    with Puppet(world, OTHER) as other:
        other.call("WATCH")
        assert owner.call("SUBSCRIBE", id="vm2")["session"] == "vm2.1"
        other.call("SUBSCRIBE", id="mine")
        # The first record that it is shown is its own, although another one was written before.
        assert other.event("PROGRESS")["record"]["stream"] == "mine.1"


def test_a_watch_from_the_start_shows_only_ones_own(subscribed: tuple[World, Puppet]) -> None:
    world, _ = subscribed
    with Puppet(world, OTHER) as other:
        other.call("SUBSCRIBE", id="mine")
        other.call("WATCH", after=0)
        assert other.event("PROGRESS")["record"]["stream"] == "mine.1"


def test_while_an_update_runs(subscribed: tuple[World, Puppet]) -> None:
    world, owner = subscribed
    with world.client() as admin, Puppet(world, OTHER) as other:
        world.kexec(admin)
        owner.event("START_PRESERVATION")
        see_nothing(other)
        change_nothing(other)
        owner.call("PRESERVED", id="vm1", resources=[{"token": "0x1"}])
        see_nothing(other)
        change_nothing(other)
        assert admin.session("vm1")["session"]["state"] == "preserved"
        assert admin.abort("vm1")["aborted"] == ["vm1.1"]
        owner.event("ABORT")
        owner.drop()
        owner.call("ABORTED", id="vm1")


def test_after_the_reboot(world: World) -> None:
    owner = Puppet(world, OWNER)
    owner.call("SUBSCRIBE", id="vm1")
    with world.client() as admin:
        world.kexec(admin)
        owner.event("START_PRESERVATION")
        owner.preserve(0x1A, "mine")
        owner.ask("post", cmd="READY", id="vm1")
    world.next_boot(owner)
    with Puppet(world, OTHER) as other, Puppet(world, OWNER) as owner:
        before = rows(world)
        see_nothing(other)
        assert refused(other, "SUBSCRIBE", id="vm1") == "NOT_YOURS"
        change_nothing(other)
        assert rows(world) == before
        owner.call("CLAIM", id="vm1")
        world.wait_record("effect.outcome", after=before, key="vm1.1/hand")
        before = rows(world)
        see_nothing(other)
        change_nothing(other)
        assert rows(world) == before
        assert owner.retrieve(0x1A) == "mine"
        owner.finish()
        assert owner.call("FINISHED", id="vm1")["state"] == "finished"
        see_nothing(other)


def test_an_admin_may(world: World) -> None:
    owner = Puppet(world, OWNER)
    owner.call("SUBSCRIBE", id="vm1")
    with world.client() as admin:
        world.kexec(admin)
        owner.event("START_PRESERVATION")
        owner.preserve(0x1A, "mine")
        owner.ask("post", cmd="READY", id="vm1")
    world.next_boot(owner)
    with Puppet(world, ADMIN) as admin_process:
        assert admin_process.call("SESSION", id="vm1")["session"]["owner"]["uid"] == OWNER
        admin_process.call("CLAIM", id="vm1")
        with Puppet(world, OWNER) as owner:  # one process has it, and it is told so
            assert refused(owner, "CLAIM", id="vm1") == "ALREADY_CLAIMED"
    with Puppet(world, OWNER) as owner:  # the admin's process has died: the owner can still have it
        owner.call("CLAIM", id="vm1")
        assert owner.retrieve(0x1A) == "mine"
        owner.finish()
        assert owner.call("FINISHED", id="vm1")["state"] == "finished"


def test_an_id_whose_session_has_ended_is_free(subscribed: tuple[World, Puppet]) -> None:
    world, owner = subscribed
    owner.reconnect()  # a client that leaves before anything is preserved gives its session up
    world.wait_record("session.aborted", "vm1.1")
    with Puppet(world, OTHER) as other:
        assert other.call("SUBSCRIBE", id="vm1")["session"] == "vm1.2"
        assert [one["id"] for one in other.call("SESSIONS")["sessions"]] == ["vm1.2"]
        assert refused(owner, "SUBSCRIBE", id="vm1") == "NOT_YOURS"


def test_limits_of_a_uid_bind_no_other(world: World) -> None:
    """Ids and connections are counted by uid, so nobody can use up those of somebody else."""
    world.kill_luod()
    world.config.write_text("[limits]\nsessions = 2\nconnections = 3\n")
    world.start_luod()
    with Puppet(world, OWNER) as owner, Puppet(world, OTHER) as other:
        owner.call("SUBSCRIBE", id="a")
        owner.call("SUBSCRIBE", id="b")
        assert refused(owner, "SUBSCRIBE", id="c") == "LIMIT"
        other.call("SUBSCRIBE", id="c")
        with Puppet(world, OWNER) as second, Puppet(world, OWNER) as third, Puppet(world, OWNER) as fourth:
            second.call("PING")
            third.call("PING")
            with pytest.raises(AssertionError, match="connections already"):
                fourth.call("PING")
        other.call("PING")


def test_the_uid_is_that_of_the_caller_and_not_of_the_message(world: World) -> None:
    with Puppet(world, OTHER) as other, Wire(world.socket) as wire:
        other.call("SUBSCRIBE", id="vm1", uid=0, owner={"uid": 0}, role="admin")
        assert wire.reply(cmd="SESSION", id="vm1")["session"]["owner"]["uid"] == OTHER
