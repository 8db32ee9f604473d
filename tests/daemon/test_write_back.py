# SPDX-License-Identifier: Apache-2.0
"""File systems are written back before the first FREEZE, once for each update, and whatever becomes of it the update goes on."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from daemon_scene import Actor, NewScene, Scene

from luod.cli import sentences
from luod.cli.look import course

HELLO = {"version": 1, "features": ["freeze", "inventory"]}
LATE = "sync(2) did not end within 0.05 s"


def join(scene: Scene, *names: str, **more: object) -> list[Actor]:
    """Let clients subscribe that preserve while their guest runs."""
    cast = [scene.actor(name) for name in names]
    for actor in cast:
        actor.call("HELLO", **HELLO)
        actor.subscribe(**more)
    return cast


def preserve(*cast: Actor) -> None:
    for actor in cast:
        actor.start()
    for actor in cast:
        actor.say("PRESERVED")


def one_goes(scene: Scene, **order: object) -> None:
    """Take one client through an update."""
    (vm1,) = join(scene, "vm1")
    scene.kexec(**order)
    preserve(vm1)
    assert vm1.event("FREEZE")["deadline_s"] > 0
    vm1.last_word()
    scene.arrive()


def held_sync(scene: Scene) -> int:
    """Let every sync hang until it is released."""
    return scene.control.inject("call", op="SYNC", times=-1)


def hits(scene: Scene, fault: int) -> int:
    return int({one["fault"]: one["hits"] for one in scene.control.state()["faults"]}[fault])


def made(scene: Scene) -> list[str]:
    """Return the calls into the kernel that tell the order of an update."""
    told = ("PRESERVE_FD", "SYNC", "REBOOT_KEXEC")
    return [one["op"] for one in scene.control.audit() if one["op"] in told]


def armed(scene: Scene) -> dict[str, Any]:
    return scene.wait("update.armed", "update/1")


# -- the order


def test_after_everybody_has_preserved_and_before_anybody_freezes(scene: Scene) -> None:
    fault = held_sync(scene)
    vm1, vm2 = join(scene, "vm1", "vm2")
    scene.kexec()
    vm1.start()
    vm1.say("PRESERVED")
    vm2.start()
    assert hits(scene, fault) == 0, "vm2 has not said that it has preserved"
    vm2.say("PRESERVED")
    scene.control.wait_hit(fault)
    for actor in (vm1, vm2):
        assert actor.refused("READY").code == "OUT_OF_ORDER", "it was told to freeze during the sync"
    scene.control.release(fault)
    vm1.event("FREEZE")
    vm1.say("READY")
    vm2.event("FREEZE")
    vm2.last_word()
    scene.arrive()
    calls = made(scene)
    assert calls.count("SYNC") == 1
    assert calls.index("SYNC") > max(at for at, op in enumerate(calls) if op == "PRESERVE_FD")
    assert "unwritten" not in armed(scene), "only what failed is told"
    assert scene.update()["unwritten"] == ""


def test_once_for_all_turns(new_scene: NewScene) -> None:
    scene = new_scene("[order]\nfreeze_at_once = 1\n")
    cast = join(scene, "vm1", "vm2", "vm3")
    scene.kexec()
    preserve(*cast)
    for actor in cast[:-1]:
        actor.event("FREEZE")
        actor.say("READY")
    cast[-1].event("FREEZE")
    cast[-1].last_word()
    scene.arrive()
    assert made(scene).count("SYNC") == 1


def test_an_update_without_sessions_writes_back_before_the_kexec(scene: Scene) -> None:
    fault = held_sync(scene)
    scene.kexec()
    scene.control.wait_hit(fault)
    assert scene.update()["state"] == "preparing"
    scene.control.release(fault)
    scene.arrive()
    assert made(scene)[-2:] == ["SYNC", "REBOOT_KEXEC"]


def test_who_subscribes_meanwhile_goes_along(scene: Scene) -> None:
    fault = held_sync(scene)
    (vm1,) = join(scene, "vm1")
    scene.kexec()
    preserve(vm1)
    scene.control.wait_hit(fault)
    (vm2,) = join(scene, "vm2")
    scene.control.release(fault)
    preserve(vm2)
    for actor in (vm1, vm2):
        actor.event("FREEZE")
    vm1.say("READY")
    vm2.last_word()
    scene.arrive()
    assert scene.update()["sessions"] == ["vm1.1", "vm2.1"]
    assert made(scene).count("SYNC") == 1


# -- a sync that does not end


def test_an_update_does_not_wait_for_ever(new_scene: NewScene) -> None:
    scene = new_scene("[update]\nsync_s = 0.05\n")
    held_sync(scene)
    one_goes(scene)
    record = scene.world.wait_record("update.armed", "update/1")
    assert record["body"]["unwritten"] == LATE
    assert sentences.of(record).endswith(f"; the file systems were not written back: {LATE}")
    assert scene.update()["unwritten"] == LATE
    assert f"file systems not written back: {LATE}" in course(scene.update())
    assert f"update/1: {LATE}; the update goes on" in scene.log()
    assert "SYNC" not in made(scene)


def test_what_hangs_leaves_nothing_behind(new_scene: NewScene) -> None:
    """A sync that hangs on after its update costs one fd, until it comes to its end."""
    scene = new_scene("[update]\nsync_s = 0.05\n")
    (vm1,) = join(scene, "vm1")
    before = turn(scene, vm1)
    fault = held_sync(scene)
    assert turn(scene, vm1) == sorted([*before, "socket"])
    assert turn(scene, vm1) == sorted([*before, "socket", "socket"])
    scene.control.release(fault)
    assert scene.world.settled_fds(before) == before
    assert scene.log().count("(the update did not wait for it)") == 2


def turn(scene: Scene, vm1: Actor) -> list[str]:
    """Go as far as the freeze and back; return what luod has open then."""
    scene.kexec()
    preserve(vm1)
    vm1.event("FREEZE")
    scene.abort()
    vm1.let_go()
    scene.wait("update.aborted", scene.update()["id"])
    return scene.world.resting_fds()


def test_half_of_the_time_is_left_for_the_freeze(new_scene: NewScene) -> None:
    """A deadline that is shorter than the limit is not used up by the sync: the update would end for that."""
    scene = new_scene("[update]\nsync_s = 86400\n")
    held_sync(scene)
    one_goes(scene, deadline_s=2)
    assert "did not end within" in armed(scene)["unwritten"]


def test_an_abort_does_not_wait_for_it(new_scene: NewScene) -> None:
    scene = new_scene("[update]\nsync_s = 86400\n[deadlines]\nupdate_s = 0\n")
    fault = held_sync(scene)
    (vm1,) = join(scene, "vm1")
    scene.kexec()
    preserve(vm1)
    scene.control.wait_hit(fault)
    scene.abort()
    vm1.let_go()
    scene.wait("update.aborted", "update/1")
    assert hits(scene, fault) == 1, "it hangs still"
    assert scene.kexec() == "update/2", "and stops nobody from trying again"


@pytest.mark.parametrize("policy", ["required", "optional"])
def test_a_client_that_dies_meanwhile_is_seen_at_once(new_scene: NewScene, policy: str) -> None:
    scene = new_scene("[update]\nsync_s = 86400\n[deadlines]\nupdate_s = 0\n")
    fault = held_sync(scene)
    (vm1,) = join(scene, "vm1", policy=policy)
    (vm2,) = join(scene, "vm2")
    scene.kexec()
    preserve(vm1, vm2)
    scene.control.wait_hit(fault)
    vm1.kill()
    if policy == "required":
        assert "vm1.1: its client died" in vm2.let_go()
        scene.wait("update.aborted", "update/1")
        return
    assert scene.wait("session.aborted", "vm1.1")["reason"] == "its client died"
    assert vm2.refused("READY").code == "OUT_OF_ORDER"
    scene.control.release(fault)
    vm2.event("FREEZE")
    vm2.last_word()
    scene.bury_list()
    scene.world.next_boot(vm2)
    assert scene.update()["dropped"] == ["vm1.1"]


def test_luod_is_stopped_meanwhile(new_scene: NewScene) -> None:
    """It ends at once; its successor goes on with the update and writes back anew."""
    scene = new_scene("[update]\nsync_s = 86400\n[deadlines]\nupdate_s = 0\n")
    fault = scene.control.inject("call", op="SYNC")
    (vm1,) = join(scene, "vm1")
    scene.kexec()
    preserve(vm1)
    scene.control.wait_hit(fault)
    scene.stop_luod()
    scene.world.start_luod()
    vm1.reconnect()
    vm1.call("HELLO", **HELLO)
    vm1.subscribe()
    vm1.event("FREEZE")
    vm1.last_word()
    scene.arrive()
    assert made(scene).count("SYNC") == 1, "the one of the luod that was stopped never came to its end"


# -- other ends


def test_a_sync_that_fails_is_told(scene: Scene) -> None:
    scene.control.inject("sync", errno=errno.EIO)
    one_goes(scene)
    assert "EIO" in armed(scene)["unwritten"]
    assert "the file systems could not be written back" in scene.log()


def test_switched_off(new_scene: NewScene) -> None:
    scene = new_scene("[update]\nsync_s = 0\n")
    one_goes(scene)
    assert "SYNC" not in made(scene)
    assert "unwritten" not in armed(scene)
