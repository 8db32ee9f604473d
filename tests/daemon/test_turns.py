# SPDX-License-Identifier: Apache-2.0
"""Who is stopped first and who comes back first; what a client says of its freeze and of its restore; what it may not say."""

from __future__ import annotations

from typing import Any

import pytest
from daemon_scene import Actor, NewScene, Scene

SAVED = {"token": "0x40", "kind": "memfd", "size": 4096, "label": "vmstate", "checksum": "sha256:00ff"}


def join(scene: Scene, **orders: int) -> list[Actor]:
    cast = [scene.actor(name) for name in orders]
    for actor, order in zip(cast, orders.values(), strict=True):
        actor.call("HELLO", version=1, features=["freeze", "inventory"])
        actor.subscribe(order=order)
    scene.kexec()
    for actor in cast:
        actor.start()
    for actor in cast:
        actor.say("PRESERVED", resources=[{"token": "0x1a", "size": 4096}])
    return cast


def ids(scene: Scene, kind: str) -> dict[str, int]:
    """Return the ids of the records of a kind, by stream."""
    with scene.admin() as admin:
        return {one["stream"]: one["id"] for one in admin.records() if one["type"].startswith(f"{kind}.v")}


def test_lower_orders_stop_first_and_come_back_last(new_scene: NewScene) -> None:
    scene = new_scene("[order]\nfreeze_at_once = 1\n")
    store, vm1, vm2 = join(scene, store=10, vm1=0, vm2=0)
    assert store.refused("READY").code == "OUT_OF_ORDER", "its turn has not come"
    vm1.event("FREEZE")
    assert vm2.refused("READY").code == "OUT_OF_ORDER", "one at a time"
    vm1.say("READY")
    vm2.event("FREEZE")
    vm2.say("READY")
    store.event("FREEZE")
    store.last_word()
    scene.arrive()
    vm1, store = scene.actor("vm1"), scene.actor("store")
    vm1.ask("post", cmd="CLAIM", id="vm1")
    store.say("CLAIM")
    assert scene.state("vm1") == "rebooting", "who is to come first is not there yet"
    store.restore()
    store.finish_and_say()
    scene.wait("session.retrieved", "vm1.1")
    assert ids(scene, "session.restored")["store.1"] < ids(scene, "session.retrieved")["vm1.1"]
    assert scene.session("store")["order"] == 10


def test_nobody_waits_for_ever_for_who_should_come_first(new_scene: NewScene) -> None:
    scene = new_scene("[order]\nwait_s = 0.2\n")
    vm1, store = join(scene, vm1=0, store=1)
    vm1.event("FREEZE")
    vm1.say("READY")
    store.event("FREEZE")
    store.last_word()
    scene.arrive()
    vm1 = scene.actor("vm1")
    assert vm1.say("CLAIM")["session"] == "vm1.1"
    vm1.restore()
    vm1.finish_and_say()
    assert scene.state("store") == "rebooting"


def test_a_place_is_free_again_when_its_client_has_restored(new_scene: NewScene) -> None:
    scene = new_scene("[order]\nrestore_at_once = 1\nwait_s = 60\n")
    cast = join(scene, vm1=0, vm2=0)
    for actor in cast:
        actor.event("FREEZE")
    cast[0].say("READY")
    cast[1].last_word()
    scene.arrive()
    vm1, vm2 = scene.actor("vm1"), scene.actor("vm2")
    vm1.say("CLAIM")
    vm2.ask("post", cmd="CLAIM", id="vm2")
    vm1.restore()
    assert scene.state("vm2") == "rebooting"
    vm1.finish_and_say()
    scene.wait("session.retrieved", "vm2.1")
    assert ids(scene, "session.finished")["vm1.1"] < ids(scene, "session.retrieved")["vm2.1"]


def test_what_is_preserved_after_the_freeze_rides_along(scene: Scene) -> None:
    (vm1,) = join(scene, vm1=0)
    vm1.event("FREEZE")
    spans = {"pause": 1.5, "save": 3.0}
    twice = vm1.refused("READY", resources=[{"token": "0x1A"}])
    assert (twice.code, "0x1a is declared twice" in str(twice)) == ("BAD_FIELD", True)
    vm1.ask("post", cmd="READY", id="vm1", resources=[SAVED], spans=spans)
    scene.arrive()
    vm1 = scene.actor("vm1")
    claimed = vm1.say("CLAIM")
    assert [one["token"] for one in claimed["resources"]] == ["0x1a", "0x40"]
    assert claimed["resources"][1]["checksum"] == "sha256:00ff"
    shown = scene.session("vm1")
    assert (shown["spans"], shown["devices"]) == (spans, "preserve")
    vm1.restore()
    vm1.finish_and_say()


def test_a_thaw_drops_what_the_freeze_had_added(scene: Scene) -> None:
    vm1, vm2 = join(scene, vm1=0, vm2=0)
    vm1.event("FREEZE")
    vm1.say("READY", resources=[SAVED], spans={"save": 1})
    assert len(scene.session("vm1")["resources"]) == 2
    vm2.event("FREEZE")
    vm2.say("NACK", errno="EIO", message="its disk is gone")
    vm1.event("RESUME")
    after = scene.session("vm1.1")
    assert ([one["token"] for one in after["resources"]], after["spans"]) == (["0x1a"], {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": 1001}, {"order": 1.5}, {"order": "first"}, {"devices": "drop"},
    ],
)  # fmt: skip
def test_a_wrong_wish_is_refused(scene: Scene, wrong: dict[str, Any]) -> None:
    vm1 = scene.actor("vm1")
    assert vm1.refused("SUBSCRIBE", **wrong).code == "BAD_FIELD"


def test_the_wishes_of_a_client_hold_for_its_next_attempt(scene: Scene) -> None:
    (vm1,) = scene.join("vm1", order=-5, devices="reattach")
    scene.kexec()
    vm1.start()
    scene.abort()
    vm1.let_go()
    scene.wait("update.aborted", "update/1")
    again = scene.session("vm1.2")
    assert (again["order"], again["devices"], again["state"]) == (-5, "reattach", "new")
