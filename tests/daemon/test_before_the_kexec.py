# SPDX-License-Identifier: Apache-2.0
"""What clients and admins can do to an update before the kexec: leave, fail, be late, change their minds."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from daemon_scene import TOKEN, Actor, NewScene, Scene

from luod.states.names import MARKER_TOKEN

OWNER, OTHER = 12345, 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="clients of other uids can only be made by root")


def undone(scene: Scene, *actors: Actor) -> None:
    """The clients of an aborted update let go; then nothing of it is left anywhere, and they are bound again."""
    for actor in actors:
        actor.let_go()
    scene.wait("update.aborted", "update/1")
    for actor in actors:
        assert scene.state(f"{actor.name}.1") == "aborted"
        assert scene.state(f"{actor.name}.2") == "new", "bound again before the update has ended"
    assert scene.outgoing() == set()
    assert scene.kept() == {"luod.internal", "luod.ring"}


# -- a client dies, refuses or is late


def test_f05_a_required_client_dies_while_preserving(scene: Scene) -> None:
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    vm1.kill()
    assert "vm1.1: its client died" in vm2.let_go()
    scene.wait("update.aborted", "update/1")
    assert scene.state("vm1") == "aborted"
    assert scene.outgoing() == set()


@pytest.mark.parametrize("policy", ["optional", "best-effort"])
def test_f05_an_update_goes_on_without_a_client_it_does_not_need(scene: Scene, policy: str) -> None:
    (vm1,) = scene.join("vm1", policy=policy)
    (vm2,) = scene.join("vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    vm1.kill()
    assert scene.wait("session.aborted", "vm1.1") == {"reason": "its client died", "still_held_by": ""}
    vm2.last_word()
    scene.bury_list()
    scene.world.next_boot(vm2)
    assert scene.update()["dropped"] == ["vm1.1"]
    (vm2,) = [scene.actor("vm2")]
    vm2.say("CLAIM")
    vm2.restore()
    vm2.finish_and_say()
    scene.wait("update.done", "update/1")


def test_f05_a_client_dies_while_its_session_is_made(scene: Scene) -> None:
    """The call goes on, its session is let go of afterwards, and luod lives."""
    vm1, vm2 = scene.join("vm1", "vm2")
    fault = scene.control.inject("call", op="CREATE_SESSION", session="luod.vm1.1")
    scene.kexec()
    scene.control.wait_hit(fault)
    vm1.kill()
    scene.wait("session.abort_requested", "vm1.1")
    scene.control.release(fault)
    vm2.kill()
    assert "vm1.1: its client left" in scene.wait("update.aborted", "update/1")["reason"]
    assert scene.state("vm1") == "aborted"
    assert scene.state("vm2.1") == "aborted"
    assert scene.outgoing() == set()
    assert scene.kept() == {"luod.internal", "luod.ring"}


def test_f06_a_client_that_hangs_is_dropped_at_its_deadline(new_scene: NewScene) -> None:
    scene = new_scene("[deadlines]\nabort_s = 0.2\n")
    (slow,) = scene.join("slow", policy="optional", deadline_s=0.3)
    (vm2,) = scene.join("vm2")
    scene.kexec()
    slow.start()
    vm2.start()
    body = scene.wait("session.aborted", "slow.1")
    assert body["reason"] == "its client was not preserved in time"
    vm2.last_word()
    scene.arrive()


def test_f06_the_update_ends_at_its_deadline(new_scene: NewScene) -> None:
    scene = new_scene("[deadlines]\nabort_s = 0.2\n")
    (vm1,) = scene.join("vm1")
    scene.kexec(deadline_s=0.4)
    vm1.start()
    assert "not preserved in time" in scene.wait("update.aborted", "update/1")["reason"]


def test_f06_a_client_that_does_not_freeze_in_time(new_scene: NewScene) -> None:
    scene = new_scene("[deadlines]\nfreeze_s = 0.3\n")
    (vm1,) = [scene.actor("vm1")]
    vm1.call("HELLO", version=1, features=["freeze"])
    vm1.subscribe()
    scene.kexec()
    vm1.start()
    vm1.say("PRESERVED")
    assert vm1.event("FREEZE")["deadline_s"] <= 0.3
    assert "not ready in time" in vm1.let_go()
    scene.wait("update.aborted", "update/1")
    assert "thawed" not in scene.types("vm1.1"), "it never stopped"


def test_f06_who_does_not_let_go_is_named(new_scene: NewScene) -> None:
    """The client's copy keeps the kernel session alive; luod says which process it is, and that is all it can do."""
    scene = new_scene("[deadlines]\nabort_s = 0.3\n")
    (vm1,) = scene.join("vm1")
    scene.kexec()
    vm1.start()
    scene.abort()
    vm1.event("ABORT")
    body = scene.wait("session.aborted", "vm1.1")
    assert body["still_held_by"] == f"pid {vm1.pid} (uid {os.getuid()})"
    scene.wait("update.aborted", "update/1")
    assert scene.outgoing() == {"luod.vm1.1"}
    assert scene.kept() == {"luod.internal", "luod.ring"}
    vm1.drop()
    vm1.say("ABORTED")
    assert scene.outgoing() == set()


@pytest.mark.parametrize("number", ["EBUSY", "EOPNOTSUPP", "ENOSPC"])
def test_f08_a_refusal_of_a_required_client_undoes_the_update(scene: Scene, number: str) -> None:
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.kexec()
    vm1.event("START_PRESERVATION")
    vm2.start()
    scene.control.inject("preserve", errno=getattr(errno, number), session="luod.vm1.1", token=TOKEN)
    with pytest.raises(AssertionError, match=number.replace("EOPNOTSUPP", "(EOPNOTSUPP|ENOTSUP|95)")):
        vm1.preserve(TOKEN, "x")
    vm1.say("NACK", errno=number, message="device in use", token="0x1a")
    assert scene.wait("session.nacked", "vm1.1") == {
        "errno": number, "message": "device in use", "token": "0x1a"
    }  # fmt: skip
    assert f"{number} device in use" in vm2.let_go()
    vm1.let_go()
    assert f"{number} device in use" in scene.wait("update.aborted", "update/1")["reason"]


@pytest.mark.parametrize("policy", ["optional", "best-effort"])
def test_f08_a_refusal_of_another_client_is_reported(scene: Scene, policy: str) -> None:
    (vm1,) = scene.join("vm1", policy=policy)
    (vm2,) = scene.join("vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    vm1.say("NACK", errno="EBUSY", message="not now")
    assert "EBUSY not now" in vm1.let_go()
    scene.wait("session.aborted", "vm1.1")
    vm2.last_word()
    scene.arrive()
    assert scene.update()["dropped"] == ["vm1.1"]
    assert scene.state("vm1.1") == "aborted"


# -- an admin changes his mind, at every point


def handed(scene: Scene, vm1: Actor, vm2: Actor) -> None:
    vm1.event("START_PRESERVATION")
    vm2.event("START_PRESERVATION")


def half_preserved(scene: Scene, vm1: Actor, vm2: Actor) -> None:
    vm1.start()
    vm1.say("PRESERVED")
    vm2.start()


def frozen(scene: Scene, vm1: Actor, vm2: Actor) -> None:
    half_preserved(scene, vm1, vm2)
    vm2.say("PRESERVED")
    vm1.event("FREEZE")
    vm2.event("FREEZE")


def half_ready(scene: Scene, vm1: Actor, vm2: Actor) -> None:
    frozen(scene, vm1, vm2)
    vm1.say("READY")


POINTS: list[Callable[[Scene, Actor, Actor], None]] = [handed, half_preserved, frozen, half_ready]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.__name__)
def test_f09_an_admin_aborts(scene: Scene, point: Callable[[Scene, Actor, Actor], None]) -> None:
    vm1, vm2 = scene.actor("vm1"), scene.actor("vm2")
    for actor in (vm1, vm2):
        actor.call("HELLO", version=1, features=["freeze"])
        actor.subscribe()
    scene.kexec()
    point(scene, vm1, vm2)
    scene.abort()
    undone(scene, vm1, vm2)
    assert scene.update()["reason"] == "asked for by uid 0"


@pytest.mark.parametrize(
    ("op", "session"),
    [
        ("CREATE_SESSION", "luod.internal"),
        ("PRESERVE_FD", "luod.internal"),
        ("CREATE_SESSION", "luod.vm1.1"),
        ("PRESERVE_FD", "luod.vm1.1"),
        ("CREATE_SESSION", "luod.scratch"),
    ],
)
@pytest.mark.parametrize("what", ["update", "session"])
def test_f09_an_abort_meets_a_call_under_way(scene: Scene, op: str, session: str, what: str) -> None:
    """The call is not cancelled: it ends, its outcome is recorded, and what it made is let go of."""
    (vm1,) = scene.join("vm1")
    fault = scene.control.inject("call", op=op, session=session)
    scene.kexec()
    if session == "luod.scratch":
        vm1.start()
        vm1.say("READY")
    scene.control.wait_hit(fault)
    scene.abort("vm1" if what == "session" else None)
    scene.control.release(fault)
    if "handed" in held_by(scene, vm1) or session == "luod.scratch":
        vm1.let_go()
    scene.wait("update.aborted" if session != "luod.internal" or what == "update" else "session.aborted",
               "update/1" if session != "luod.internal" or what == "update" else "vm1.1")  # fmt: skip
    if what == "session":
        assert scene.state("vm1.1") == "aborted"
    assert scene.outgoing() == set()
    assert scene.status()["in_doubt"] == []


def held_by(scene: Scene, actor: Actor) -> set[str]:
    hand = scene.session(f"{actor.name}.1")["effects"].get(f"{actor.name}.1/hand")
    return {"handed"} if hand and hand["status"] == "done" else set()


def test_f09_too_late_to_abort(scene: Scene) -> None:
    """Once the kexec call is made nothing is undone; what the kernel answers decides."""
    (vm1,) = scene.join("vm1")
    fault = scene.control.inject("jump")
    scene.kexec()
    vm1.start()
    vm1.last_word()
    scene.control.wait_hit(fault)
    assert scene.refused("ABORT").code == "TOO_LATE"
    assert scene.refused("ABORT", id="vm1").code == "TOO_LATE"
    scene.control.release(fault)
    scene.arrive()
    assert scene.state("vm1") == "rebooting"


def test_f09_one_session_is_aborted(scene: Scene) -> None:
    """A required one takes the update with it, another one does not."""
    (vm1,) = scene.join("vm1", policy="optional")
    (vm2,) = scene.join("vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    scene.abort("vm1")
    vm1.let_go()
    scene.wait("session.aborted", "vm1.1")
    assert scene.update()["state"] == "preparing"
    scene.abort("vm2.1")
    assert vm2.let_go() == "asked for by uid 0"
    assert scene.wait("update.aborted", "update/1") == {"reason": "vm2.1: asked for by uid 0"}


@as_root
def test_f09_an_owner_aborts_its_own_session_only(scene: Scene) -> None:
    (mine,) = scene.join("mine", uid=OWNER)
    (other,) = scene.join("other", uid=OTHER, policy="optional")
    scene.kexec()
    mine.event("START_PRESERVATION")
    other.event("START_PRESERVATION")
    assert other.call("ABORT", id="other")["aborted"] == ["other.1"]
    other.let_go()
    scene.wait("session.aborted", "other.1")
    assert mine.call("ABORT", id="mine")["aborted"] == ["mine.1"]
    mine.let_go()
    scene.wait("update.aborted", "update/1")


def test_f09_the_admin_hangs_up_in_the_middle(scene: Scene) -> None:
    """An update belongs to the host, not to the connection that asked for it."""
    (vm1,) = scene.join("vm1")
    admin = scene.world.client()
    scene.world.load(admin)
    admin.watch()
    admin.kexec()
    admin.next_event(30, names=["PROGRESS"])
    admin.close()
    vm1.start()
    assert scene.update()["state"] == "preparing"
    vm1.last_word()
    scene.arrive()
    assert scene.update()["state"] == "recovering"


# -- again and again


def test_the_same_connected_clients_take_part_in_the_next_update(scene: Scene) -> None:
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    scene.abort()
    undone(scene, vm1, vm2)
    assert scene.kexec() == "update/2"
    assert vm1.start()["session"] == "vm1.2"
    assert vm2.start()["session"] == "vm2.2"
    vm1.last_word()
    vm2.last_word()
    scene.arrive()
    for name in ("vm1", "vm2"):
        actor = scene.actor(name)
        assert actor.say("CLAIM")["session"] == f"{name}.2"
        actor.restore()
        actor.finish_and_say()
    assert scene.wait("update.done", "update/2")["finished"] == 2


def test_three_updates_in_a_row_with_the_same_ids(scene: Scene) -> None:
    cast = scene.join("vm1", "vm2")
    for number in (1, 2, 3):
        scene.go(*cast)
        cast = [scene.actor(name) for name in ("vm1", "vm2")]
        for actor in cast:
            assert actor.say("CLAIM")["session"] == f"{actor.name}.{number}"
            actor.restore()
            actor.finish_and_say()
        scene.wait("update.done", f"update/{number}")
        assert scene.incoming() == set()
        assert scene.kept() == set()
        for actor in cast:
            actor.subscribe()
    assert scene.status()["sessions"] == {"finished": 6, "new": 2}


def test_an_update_without_clients(scene: Scene) -> None:
    scene.kexec()
    scene.arrive()
    assert scene.update()["state"] == "done"
    assert scene.kept() == set()


def test_who_subscribes_between_the_barriers_is_too_late(scene: Scene) -> None:
    """A newcomer neither stops the update nor takes part in it: its memory is not the update's business yet."""
    vm1 = scene.actor("vm1")
    vm1.call("HELLO", version=1, features=["freeze"])
    vm1.subscribe()
    scene.kexec()
    vm1.start()
    vm1.say("PRESERVED")
    vm1.event("FREEZE")
    scene.join("late")
    vm1.last_word()
    scene.arrive()
    assert scene.state("late") == "aborted"
    assert scene.state("vm1") == "rebooting"


def test_unsubscribe_in_the_middle_of_an_update(scene: Scene) -> None:
    (vm1,) = scene.join("vm1", policy="optional")
    (vm2,) = scene.join("vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    vm1.say("UNSUBSCRIBE")
    vm1.let_go()
    scene.wait("session.aborted", "vm1.1")
    assert scene.session("vm1")["id"] == "vm1.1", "it is not bound again"
    vm2.last_word()
    scene.arrive()


def test_a_client_that_reconnects_leaks_nothing(scene: Scene) -> None:
    """Its session is handed over once more, on the new connection, and its old one costs luod no descriptor."""
    (vm1,) = scene.join("vm1")
    scene.kexec()
    vm1.start()
    before = scene.world.resting_fds()
    for _ in range(5):
        vm1.reconnect()
        vm1.subscribe()
        vm1.event("START_PRESERVATION")
    assert scene.world.settled_fds(before) == before
    vm1.last_word()
    scene.arrive()


def test_the_marker_is_in_every_session(scene: Scene) -> None:
    (vm1,) = scene.join("vm1")
    scene.kexec()
    vm1.event("START_PRESERVATION")
    (session,) = [one for one in scene.control.state()["outgoing"] if one["name"] == "luod.vm1.1"]
    assert [one["token"] for one in session["files"]] == [f"{MARKER_TOKEN:#x}"]
    scene.abort()
    vm1.let_go()
