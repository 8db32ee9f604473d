# SPDX-License-Identifier: Apache-2.0
"""The machine comes back another way than the update had planned, or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from daemon_scene import Actor, Scene
from luod_world import CMDLINE

from luod.adapters.emulator.images import stub_image


def lost(scene: Scene, name: str) -> str:
    """A session is lost; its client is told so at once and starts cold, under the same id. Returns the reason."""
    session = scene.session(name)
    assert session["state"] == "lost"
    actor = scene.actor(name)
    answer = actor.refused("CLAIM")
    assert answer.code == "LOST"
    assert answer.hint == "start cold"
    assert actor.subscribe()["state"] == "new"
    return str(session["reason"])


# -- the kernel refuses


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM, errno.ENOMEM])
@pytest.mark.parametrize("at", ["freeze", "reboot"])
def test_f12_the_kernel_refuses_the_kexec(scene: Scene, at: str, number: int) -> None:
    vm1, vm2 = scene.join("vm1", "vm2")
    scene.control.inject(at, errno=number)
    scene.kexec()
    for actor in (vm1, vm2):
        actor.start()
    for actor in (vm1, vm2):
        actor.last_word()
    assert errno.errorcode[number] in vm1.let_go()
    vm2.let_go()
    assert errno.errorcode[number] in scene.wait("update.aborted", "update/1")["reason"]
    update = scene.update()
    assert update["refused"] == errno.errorcode[number]
    assert scene.types("vm1.1")[-4:] == ["reboot_refused", "abort_requested", "thawed", "aborted"]
    assert scene.outgoing() == set()
    assert scene.control.boot_id() == scene.world.boot_id


def test_f15_the_image_is_unloaded_after_load(scene: Scene) -> None:
    """Nothing is loaded when the kexec comes: the kernel says so and everything is rolled back."""
    (vm1,) = scene.join("vm1")
    scene.kexec()
    vm1.start()
    scene.world.kernel.unload()
    vm1.last_word()
    vm1.let_go()
    assert "the kernel refused the kexec" in scene.wait("update.aborted", "update/1")["reason"]
    with scene.admin() as admin:
        assert not admin.status()["image_loaded"]
    assert scene.refused("KEXEC").code == "NO_IMAGE"


# -- the power fails


def subscribed(_: Scene, vm1: Actor) -> None:
    pass


def preserving(scene: Scene, vm1: Actor) -> None:
    scene.kexec()
    vm1.event("START_PRESERVATION")


def ready(scene: Scene, vm1: Actor) -> None:
    (slow,) = scene.join("slow")
    scene.kexec()
    slow.start()
    vm1.start()
    vm1.say("READY")


def undoing(scene: Scene, vm1: Actor) -> None:
    preserving(scene, vm1)
    scene.abort()
    vm1.event("ABORT")


def jumping(scene: Scene, vm1: Actor) -> None:
    fault = scene.control.inject("call", op="CREATE_SESSION", session="luod.scratch")
    scene.kexec()
    vm1.start()
    vm1.say("READY")
    scene.control.wait_hit(fault)


OLD_KERNEL: dict[Callable[[Scene, Actor], None], tuple[str, str]] = {
    subscribed: ("aborted", ""),
    preserving: ("lost", "lost"),
    ready: ("lost", "lost"),
    undoing: ("lost", "lost"),
    jumping: ("lost", "lost"),
}


@pytest.mark.parametrize("phase", list(OLD_KERNEL), ids=lambda one: one.__name__)
def test_f13_f16_the_power_fails_in_the_old_kernel(
    scene: Scene, phase: Callable[[Scene, Actor], None]
) -> None:
    (vm1,) = scene.join("vm1")
    phase(scene, vm1)
    scene.power_cut()
    state, update = OLD_KERNEL[phase]
    assert scene.state("vm1") == state
    assert (scene.update()["state"] if update else "") == update
    if state == "lost":
        assert "not a live update" in lost(scene, "vm1")
    assert scene.status()["in_doubt"] == []
    assert scene.kept() == set()
    cold_start(scene)


def cold_start(scene: Scene) -> None:
    """After all that, an update is possible again."""
    actor = scene.actor("fresh")
    actor.subscribe()
    cast = {actor.name for actor in scene.bury_list()}
    assert "fresh" in cast


def claimed(scene: Scene, vm1: Actor) -> None:
    vm1.say("CLAIM")


def finished(scene: Scene, vm1: Actor) -> None:
    vm1.say("CLAIM")
    vm1.finish()


def failed(scene: Scene, vm1: Actor) -> None:
    vm1.say("CLAIM")
    vm1.say("RESTORED", token="0x1a", step="verify", ok=False, errno="EIO")


@pytest.mark.parametrize("phase", [subscribed, claimed, finished, failed], ids=lambda one: one.__name__)
def test_f13_f16_the_power_fails_in_the_new_kernel(
    scene: Scene, phase: Callable[[Scene, Actor], None]
) -> None:
    """Two sessions have come over; what was not finished in that boot is gone with it."""
    cast = scene.join("vm1", "vm2")
    scene.go(*cast)
    phase(scene, scene.actor("vm1"))
    scene.power_cut()
    assert scene.state("vm1") == "lost"
    assert scene.state("vm2") == "lost"
    assert scene.update()["state"] == "lost"
    lost(scene, "vm2")


def test_f13_the_power_fails_during_the_jump(scene: Scene) -> None:
    """luod's last words are on disk, the new kernel never ran."""
    (vm1,) = scene.join("vm1")
    fault = scene.control.inject("jump")
    scene.kexec()
    vm1.start()
    vm1.last_word()
    scene.control.wait_hit(fault)
    scene.power_cut()
    assert "not a live update" in lost(scene, "vm1")
    update = scene.update()
    assert (update["state"], update["box"]) == ("lost", "")


@pytest.mark.parametrize("stage", ["before_intent", "after_outcome"])
def test_f13_luod_is_killed_while_it_judges_the_new_boot(scene: Scene, stage: str) -> None:
    """The luod after it finds the same as it would have."""
    (vm1,) = scene.join("vm1")
    scene.go(vm1)
    world = scene.world
    assert scene.update()["state"] == "recovering"
    assert world.luod is not None
    scene.trap(f"vm1.1/retrieve:{stage}")
    actor = scene.actor("vm1")
    actor.ask("post", cmd="CLAIM", id="vm1")
    scene.sprung()
    actor.reconnect()
    actor.say("CLAIM")
    actor.restore()
    actor.finish_and_say()
    scene.wait("update.done", "update/1")


def test_f14_somebody_else_reboots_by_kexec_during_preparation(scene: Scene) -> None:
    """`kexec -e` in the middle: the sessions arrive all the same, so their clients get them; the update is lost."""
    (vm1,) = scene.join("vm1")
    (slow,) = scene.join("slow")
    scene.kexec()
    slow.event("START_PRESERVATION")
    vm1.start()
    vm1.say("PRESERVED")
    scene.control.kexec()
    scene.bury()
    scene.world.boot()
    update = scene.update()
    assert (update["state"], update["reason"]) == ("lost", "another kexec than luod's")
    assert scene.refused("KEXEC").code == "UNFINISHED"
    vm1 = scene.actor("vm1")
    vm1.say("CLAIM")
    vm1.restore()
    vm1.finish_and_say()


# -- the next kernel cannot take over


def test_f19_the_next_kernel_panics(scene: Scene) -> None:
    """Another LUO ABI: it panics and the machine boots cold. The journal tells that the kexec was tried."""
    (vm1,) = scene.join("vm1")
    image = stub_image(scene.world.dir / "other", luo="luo-v99")
    with scene.admin() as admin:
        admin.load(image, cmdline=f"{CMDLINE} panic=1")
        admin.kexec()
    vm1.start()
    vm1.last_word()
    scene.arrive()
    assert "not a live update" in lost(scene, "vm1")
    assert scene.update()["state"] == "lost"
    assert "rebooting" in scene.types("update/1")


@pytest.mark.parametrize("cmdline", ["kho=on", "liveupdate=on", ""])
def test_f20_the_next_kernel_has_no_device(scene: Scene, cmdline: str) -> None:
    """Lost, plainly; STATUS says what is missing on the command line, and nothing spins."""
    (vm1,) = scene.join("vm1")
    with scene.admin() as admin:
        admin.load(scene.world.image, cmdline=cmdline)
        admin.kexec()
    vm1.start()
    vm1.last_word()
    scene.arrive()
    assert "cannot hand anything over" in lost(scene, "vm1")
    assert scene.update()["state"] == "lost"
    status = scene.status()
    assert status["kernel"]["state"] in ("absent", "disabled")
    assert status["kernel"]["hint"]
    rows = status["journal"]["rows"]
    scene.world.restart_luod()
    assert scene.types("luod").count("started") == 3
    assert scene.status()["journal"]["rows"] == rows + 1, "a restart finds nothing more to do"


def test_f20_the_device_answers_eio_for_ever(scene: Scene) -> None:
    (vm1,) = scene.join("vm1")
    image = stub_image(scene.world.dir / "no-memfd", memfd=None)
    with scene.admin() as admin:
        admin.load(image, cmdline=CMDLINE)
        admin.kexec()
    vm1.start()
    vm1.last_word()
    scene.arrive()
    assert "could not take over" in lost(scene, "vm1")
    status = scene.status()
    assert status["kernel"]["state"] == "broken"
    assert status["kernel"]["hint"]
    scene.kexec()
    assert "EIO" in scene.wait("update.aborted", "update/2")["reason"]
