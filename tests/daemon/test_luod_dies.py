# SPDX-License-Identifier: Apache-2.0
"""luod is killed or stopped in the old kernel, alone or with its second holder; what it left is put right truthfully."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from daemon_scene import TOKEN, Actor, NewScene, Scene

from luod.journal.record import Entry
from luod.journal.writer import Journal
from luod.states import events as ev


def rejoin(*actors: Actor) -> None:
    for actor in actors:
        actor.reconnect()
        actor.subscribe()


def home(scene: Scene, *names: str) -> None:
    """All of them claim, find their memory and finish; the update is done."""
    for name in names:
        actor = scene.actor(name)
        actor.say("CLAIM")
        actor.restore()
        actor.finish_and_say()
    assert scene.wait("update.done", "update/1") == {
        "finished": len(names), "lost": 0, "failed": 0, "expired": 0
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["after_intent", "after_call", "before_intent", "after_outcome"])
def test_f01_f02_killed_around_create(scene: Scene, stage: str) -> None:
    """The session is made once, whichever side of the call luod died on, because the second holder has it."""
    scene.trap(f"vm1.1/create:{stage}")
    (vm1,) = scene.join("vm1")
    scene.kexec()
    scene.sprung()
    rejoin(vm1)
    vm1.start()
    vm1.last_word()
    scene.arrive()
    made = [one for one in scene.control.audit() if one["op"] == "CREATE_SESSION"]
    assert [one["session"] for one in made].count("luod.vm1.1") == 1
    home(scene, "vm1")


@pytest.mark.parametrize("stage", ["after_call", "after_outcome"])
def test_f03_killed_after_the_fd_was_sent(scene: Scene, stage: str) -> None:
    """The client has the session, luod does not know that it has: it is handed over once more, the same one."""
    scene.trap(f"vm1.1/hand:{stage}")
    (vm1,) = scene.join("vm1")
    scene.kexec()
    vm1.start()
    scene.sprung()
    rejoin(vm1)
    vm1.event("START_PRESERVATION")
    with pytest.raises(AssertionError, match="EEXIST"):
        vm1.preserve(TOKEN, "again")  # so it is the very session in which the first one is
    vm1.last_word()
    scene.arrive()
    home(scene, "vm1")


def armed(scene: Scene) -> Actor:
    """Bring an update to the instant before its last words, and kill luod there."""
    scene.trap("update/1/reboot:before_intent")
    vm1 = scene.actor("vm1")
    vm1.call("HELLO", version=1, features=["freeze"])
    vm1.subscribe()
    scene.kexec()
    vm1.start()
    vm1.say("PRESERVED")
    vm1.event("FREEZE")
    vm1.last_word()
    scene.sprung()
    assert scene.update()["paused"]
    vm1.reconnect()
    vm1.call("HELLO", version=1, features=["freeze"])
    vm1.subscribe()
    vm1.event("RESUME")
    assert scene.state("vm1") == "preserved"
    return vm1


def test_f10_killed_when_everybody_is_ready(scene: Scene) -> None:
    """Nobody reboots by himself: the client runs again, and a person says when to go on."""
    vm1 = armed(scene)
    assert scene.control.boot_id() == scene.world.boot_id
    assert scene.kexec() == "update/1"
    vm1.event("FREEZE")
    vm1.last_word()
    scene.arrive()
    home(scene, "vm1")


def test_f10_a_paused_update_is_aborted(scene: Scene) -> None:
    vm1 = armed(scene)
    scene.abort()
    vm1.let_go()
    scene.wait("update.aborted", "update/1")
    assert scene.outgoing() == set()


def test_f10_a_session_of_a_paused_update_is_aborted(scene: Scene) -> None:
    """The update needs it, so it ends; nobody waits for a barrier that nobody looks at."""
    vm1 = armed(scene)
    scene.abort("vm1")
    vm1.let_go()
    assert scene.wait("update.aborted", "update/1")["reason"].startswith("vm1.1: asked for by")


def test_f10_a_paused_update_ends_at_its_deadline(new_scene: NewScene) -> None:
    scene = new_scene("[deadlines]\nupdate_s = 4\n")
    vm1 = armed(scene)
    assert vm1.let_go() == "nobody resumed it before its deadline"
    scene.wait("update.aborted", "update/1")


@pytest.mark.parametrize("stage", ["after_intent", "before_intent"])
def test_f12_killed_around_the_last_words(scene: Scene, stage: str) -> None:
    """luod's last words were written and the kexec never came: it is undone, or waits for a person."""
    scene.trap(f"update/1/reboot:{stage}")
    (vm1,) = scene.join("vm1")
    scene.kexec()
    vm1.start()
    vm1.say("READY")
    scene.sprung()
    rejoin(vm1)
    if stage == "before_intent":
        scene.abort()
    vm1.let_go()
    scene.wait("update.aborted", "update/1")
    assert [one for one in scene.control.audit() if "KEXEC" in one["op"] and "LOAD" not in one["op"]] == []


def subscribed(_: Scene, vm1: Actor) -> None:
    pass


def preserving(scene: Scene, vm1: Actor) -> None:
    scene.kexec()
    vm1.start()


def preserved(scene: Scene, vm1: Actor) -> None:
    preserving(scene, vm1)
    scene.join("slow", policy="optional")[0].event("START_PRESERVATION")
    vm1.say("PRESERVED")


def undoing(scene: Scene, vm1: Actor) -> None:
    preserving(scene, vm1)
    scene.abort()
    vm1.event("ABORT")


@pytest.mark.parametrize("phase", [subscribed, preserving, preserved, undoing], ids=lambda one: one.__name__)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_f17_luod_is_restarted(
    scene: Scene, phase: Callable[[Scene, Actor], None], number: signal.Signals
) -> None:
    """A stop that was asked for is no more and no less than a crash: the update goes on where it was."""
    (vm1,) = scene.join("vm1")
    phase(scene, vm1)
    assert scene.world.luod is not None
    assert scene.world.luod.end(number) == (0 if number == signal.SIGTERM else -number)
    scene.world.start_luod()
    rejoin(vm1)
    if phase is undoing:
        vm1.let_go()
        scene.wait("update.aborted", "update/1")
        assert scene.outgoing() == set()
        return
    if phase is subscribed:
        assert scene.session("vm1")["id"] == "vm1.1"
        scene.kexec()
    if phase in (subscribed, preserving):
        vm1.event("START_PRESERVATION")
        if phase is subscribed:
            vm1.preserve(TOKEN, vm1.name)
    if phase is preserved:
        scene.abort("slow")
    vm1.last_word()
    scene.arrive()
    home(scene, "vm1")


def test_f17_stopped_when_everybody_is_ready(scene: Scene) -> None:
    (vm1,) = scene.join("vm1")
    fault = scene.control.inject("call", op="CREATE_SESSION", session="luod.scratch")
    scene.kexec()
    vm1.start()
    vm1.say("READY")
    scene.control.wait_hit(fault)
    assert scene.world.luod is not None
    with scene.world.client() as watcher:  # connected before: a luod that ends answers nobody new
        watcher.watch()
        scene.world.luod.process.send_signal(signal.SIGTERM)
        while not watcher.next_event(names=["PROGRESS"])["record"]["type"].startswith("daemon.stopped"):
            pass
    scene.control.release(fault)
    assert scene.world.luod.wait() == 0
    scene.world.start_luod()
    assert scene.update()["paused"]
    rejoin(vm1)
    scene.kexec()
    scene.arrive()
    home(scene, "vm1")


def test_a_client_dies_while_luod_is_away(scene: Scene) -> None:
    """Only subscribed, it takes nothing with it: the next update goes without it."""
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.world.kill_luod()
    vm1.kill()
    scene.world.start_luod()
    rejoin(vm2)
    scene.kexec()
    vm2.start()
    vm2.last_word()
    scene.bury_list()
    scene.world.next_boot(vm2)
    assert scene.state("vm1") == "aborted"
    home(scene, "vm2")


def test_f05_a_client_dies_before_a_restarted_luod_has_heard_of_it(scene: Scene) -> None:
    """Its death is seen when it happens, not at the deadline."""
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.kexec()
    vm1.start()
    vm2.start()
    scene.world.restart_luod()
    rejoin(vm2)
    vm1.kill()
    assert "vm1.1: its client died" in vm2.let_go()
    scene.wait("update.aborted", "update/1")


def test_an_effect_that_only_a_person_can_settle(scene: Scene) -> None:
    """Written by a luod that knew more: it is shown as in doubt, the update is undone for it, and nothing spins."""
    (vm1,) = scene.join("vm1")
    scene.world.kill_luod()
    with Journal.open(scene.journal(), boot_id=scene.world.boot_id, run_id="newer") as journal:
        journal.append([Entry("vm1.1", ev.EffectIntended("vm1.1/attest", "session.attest"))])
    scene.world.start_luod()
    doubts = scene.status()["in_doubt"]
    assert [(one["key"], one["status"]) for one in doubts] == [("vm1.1/attest", "unknown")]
    rejoin(vm1)
    scene.kexec()
    vm1.event("ABORT")
    assert "vm1.1/attest is in doubt" in scene.wait("update.abort_requested", "update/1")["reason"]
    assert scene.refused("RESOLVE", key="vm1.1/nothing", decision="done").code == "NOT_IN_DOUBT"
    assert scene.state("vm1") == "new"
    with scene.admin() as admin:
        assert admin.resolve("vm1.1/attest", "absent").fields["status"] == "failed"
    scene.wait("update.aborted", "update/1")
    assert scene.status()["in_doubt"] == []
    assert scene.outgoing() == set()


# -- the second holder


def test_the_second_holder_is_killed_alone(new_scene: NewScene) -> None:
    """luod goes on and says so; a new one is given everything, and then luod may die again."""
    scene = new_scene("[deadlines]\npoll_s = 0.05\n")
    (vm1,) = scene.join("vm1")
    scene.kexec()
    vm1.start()
    had = scene.kept()
    assert had == {"luod.internal", "luod.ring", "luod.vm1.1"}
    assert scene.world.keeper is not None
    scene.world.keeper.end()
    until = time.monotonic() + 20
    while scene.status()["keeper"]["state"] != "gone":
        assert time.monotonic() < until
    assert scene.outgoing() == {"luod.vm1.1"}
    assert "luod alone holds 3 fds" in scene.log()
    scene.world.start_keeper()
    while scene.kept() != had:
        assert time.monotonic() < until
    scene.world.restart_luod()
    rejoin(vm1)
    vm1.event("START_PRESERVATION")
    vm1.last_word()
    scene.arrive()
    home(scene, "vm1")


def test_no_session_is_made_without_a_second_holder(scene: Scene) -> None:
    (vm1,) = scene.join("vm1")
    assert scene.world.keeper is not None
    scene.world.keeper.end()
    scene.kexec()
    assert "luod-keeper" in scene.wait("update.aborted", "update/1")["reason"]
    scene.world.start_keeper()
    scene.kexec()
    vm1.start()
    vm1.last_word()
    scene.world.next_boot(*scene.bury_list())
    vm1 = scene.actor("vm1")
    vm1.say("CLAIM")
    vm1.restore()
    vm1.finish_and_say()


def test_f18_the_second_holder_is_full(scene: Scene) -> None:
    """What it cannot hold is not handed out, so it cannot be lost."""
    assert scene.world.keeper is not None
    scene.world.keeper.end()
    scene.world.start_keeper("--max", 3)
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.kexec()
    assert "the limit is 3" in scene.wait("update.abort_requested", "update/1")["reason"]
    vm1.kill()
    vm2.kill()
    scene.wait("update.aborted", "update/1")
    assert scene.outgoing() == set()


def test_both_holders_are_killed_before_the_kexec(scene: Scene) -> None:
    """The update is undone, and the client that still holds its session is told to let go of it."""
    (vm1,) = scene.join("vm1")
    scene.kexec()
    vm1.start()
    scene.world.kill_luod()
    assert scene.world.keeper is not None
    scene.world.keeper.end()
    scene.world.start_keeper()
    scene.world.start_luod()
    assert "both lost it" in scene.wait("session.aborted", "vm1.1")["reason"]
    scene.wait("update.aborted", "update/1")
    assert scene.outgoing() == {"luod.vm1.1"}, "the client's copy"
    rejoin(vm1)
    assert vm1.event("ABORT")["session"] == "vm1.1"
    vm1.drop()
    assert scene.outgoing() == set()
    scene.kexec()
    vm1.start()
    vm1.last_word()
    scene.arrive()
    assert scene.state("vm1") == "rebooting"
