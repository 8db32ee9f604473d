# SPDX-License-Identifier: Apache-2.0
"""After the kexec: who may have a session, what becomes of one that cannot be restored, and how each comes to an end."""

from __future__ import annotations

import errno
import os
import signal

import pytest
from daemon_scene import TOKEN, Actor, NewScene, Scene
from readme_client import readme_second_boot

from luod.adapters.keeper.client import Keeper
from luod.client import ClientError

OWNER, OTHER = 12345, 65534
PLAN = [{"token": "0x1a", "kind": "memfd", "size": 4096, "plan": [{"step": "verify"}, {"step": "map"}]}]


def arrived(scene: Scene, *names: str, plan: bool = False, uid: int = 0) -> list[Actor]:
    """Carry clients over; return them in the new kernel, before they have said anything."""
    cast = scene.join(*names, uid=uid)
    scene.kexec()
    for actor in cast:
        actor.start()
    for actor in cast:
        if plan:
            actor.say("PRESERVED", resources=PLAN)
    for actor in cast:
        actor.last_word()
    scene.arrive()
    return [scene.actor(name, uid) for name in names]


def done(scene: Scene, **counts: int) -> None:
    assert scene.wait("update.done", "update/1") == {
        "finished": 0, "lost": 0, "failed": 0, "expired": 0, **counts
    }  # fmt: skip


def test_f21_somebody_else_has_retrieved_the_session(scene: Scene) -> None:
    """Retrieved once per boot: luod says so and keeps it as it is; with its last close it is gone, and then it is lost."""
    (vm1,) = arrived(scene, "vm1")
    taken = scene.world.kernel.retrieve_session("luod.vm1.1")
    try:
        with scene.world.client() as link, pytest.raises(ClientError) as caught:
            link.claim("vm1")
    finally:
        os.close(taken)
    assert caught.value.code == "KERNEL"
    assert "somebody else retrieved it" in caught.value.hint
    assert scene.state("vm1") == "rebooting"
    assert vm1.refused("CLAIM").code == "LOST"
    done(scene, lost=1)


@pytest.mark.parametrize("stage", ["after_intent", "after_call", "after_outcome"])
def test_f23_killed_around_retrieve(scene: Scene, stage: str) -> None:
    """The second holder has it before luod has, so no instant loses it."""
    (vm1,) = arrived(scene, "vm1")
    scene.trap(f"vm1.1/retrieve:{stage}")
    vm1.ask("post", cmd="CLAIM", id="vm1")
    scene.sprung()
    vm1.reconnect()
    vm1.say("CLAIM")
    vm1.restore()
    vm1.finish_and_say()
    made = [one["op"] for one in scene.control.audit() if one["session"] == "luod.vm1.1"]
    assert made.count("RETRIEVE_SESSION") == 1
    done(scene, finished=1)


@pytest.mark.parametrize("stage", ["after_call", "after_outcome"])
def test_f24_killed_after_the_session_was_sent(scene: Scene, stage: str) -> None:
    """The client has it; when it claims again it gets the same one."""
    (vm1,) = arrived(scene, "vm1")
    scene.trap(f"vm1.1/hand:{stage}")
    vm1.ask("post", cmd="CLAIM", id="vm1")
    scene.sprung()
    vm1.reconnect()
    assert vm1.say("CLAIM")["session"] == "vm1.1"
    vm1.restore()
    vm1.finish_and_say()
    done(scene, finished=1)


@pytest.mark.skipif(os.getuid() != 0, reason="clients of other uids can only be made by root")
def test_f25_the_wrong_client_claims_first(scene: Scene) -> None:
    (owner,) = arrived(scene, "vm1", uid=OWNER)
    thief = scene.actor("vm1", OTHER)
    assert thief.refused("CLAIM").code == "UNKNOWN_ID"
    assert scene.incoming() == {"luod.vm1.1"}
    assert scene.state("vm1") == "rebooting", "nothing was retrieved for it"
    owner.say("CLAIM")
    owner.restore()
    owner.finish_and_say()
    done(scene, finished=1)


def test_f26_two_processes_claim_the_same_id(scene: Scene) -> None:
    """One gets it; when that one has died, the other."""
    first, second = *arrived(scene, "vm1"), scene.actor("vm1")
    first.say("CLAIM")
    answer = second.refused("CLAIM")
    assert answer.code == "ALREADY_CLAIMED"
    assert f"pid {first.pid}" in answer.message
    first.kill()
    second.say("CLAIM")
    second.restore()
    second.finish_and_say()
    done(scene, finished=1)


def test_f27_a_client_never_comes_back(new_scene: NewScene) -> None:
    """By default its session is kept for ever, and refuses the next update; with `claim_s` it is given up."""
    scene = new_scene("[deadlines]\npoll_s = 0.05\n")
    (vm1, _) = arrived(scene, "vm1", "vm2")
    vm1.say("CLAIM")
    vm1.restore()
    vm1.finish_and_say()
    assert scene.state("vm2") == "rebooting"
    assert scene.incoming() == {"luod.vm2.1"}
    assert scene.refused("KEXEC").code == "UNFINISHED"
    scene.world.kill_luod()
    scene.world.config.write_text("[deadlines]\npoll_s = 0.05\nclaim_s = 0.1\n")
    scene.world.start_luod()
    assert "nobody claimed it within" in scene.wait("session.expired", "vm2.1")["reason"]
    done(scene, finished=1, expired=1)
    assert scene.incoming() == set()
    assert scene.actor("vm2").refused("CLAIM").code == "ENDED"


def test_f27_an_admin_gives_a_session_up(scene: Scene) -> None:
    vm1, vm2 = arrived(scene, "vm1", "vm2")
    vm2.say("CLAIM")
    with scene.admin() as admin:
        assert admin.resolve("vm1.1", "give-up").fields == {"key": "vm1.1", "status": "expired"}
        assert scene.incoming() == {"luod.vm2.1"}
        assert admin.resolve("vm2.1", "give-up").fields["status"] == "expired"
    done(scene, expired=2)
    assert scene.incoming() == {"luod.vm2.1"}, "its client has it, and may finish it"
    vm2.restore()
    vm2.finish()
    assert scene.incoming() == set()
    assert scene.refused("RESOLVE", key="vm1.1", decision="give-up").code == "OUT_OF_ORDER"
    assert scene.refused("RESOLVE", key="vm1.1", decision="retry").code == "OUT_OF_ORDER"
    assert scene.refused("RESOLVE", key="vm1.1", decision="done").code == "BAD_FIELD"
    assert vm1.refused("CLAIM").code == "ENDED"


def test_f28_one_token_cannot_be_retrieved(scene: Scene) -> None:
    """For ever, says the kernel. The session fails with its fds kept, the other one is not touched."""
    vm1, vm2 = arrived(scene, "vm1", "vm2", plan=True)
    vm1.say("CLAIM")
    scene.control.inject("retrieve", errno=errno.EIO, session="luod.vm1.1", token=TOKEN)
    for _ in range(2):
        with pytest.raises(AssertionError, match="EIO"):
            vm1.retrieve(TOKEN)
    assert vm1.say("RESTORED", token="0x1A", step="verify", ok=False, errno="EIO")["open_steps"]
    assert scene.state("vm1") == "failed"
    assert scene.session("vm1")["steps"] == {"0x1a/verify": {"ok": False, "errno": "EIO", "took_ms": 0.0}}
    assert "luod.vm1.1" in scene.kept()
    restore_by_plan(vm2)
    done(scene, finished=1, failed=1)
    assert scene.refused("KEXEC").code == "UNFINISHED"


def restore_by_plan(actor: Actor) -> None:
    actor.say("CLAIM")
    actor.restore()
    assert actor.say("RESTORED", token="0x1a", step="verify", ok=True)["open_steps"] == ["0x1a/map"]
    assert actor.refused("FINISHED").code == "OPEN_STEPS"
    assert actor.say("RESTORED", token="0x1a", step="map", ok=True)["open_steps"] == []
    actor.finish_and_say()


@pytest.mark.parametrize("how", ["claim", "resolve", "restart"])
def test_a_failed_session_is_tried_again(scene: Scene, how: str) -> None:
    """By its owner, who claims it once more, or by an admin; also by a luod that was restarted meanwhile."""
    (vm1,) = arrived(scene, "vm1", plan=True)
    vm1.say("CLAIM")
    vm1.say("RESTORED", token="0x1a", step="verify", ok=False, errno="EIO")
    done(scene, failed=1)
    assert vm1.refused("FINISHED").code == "OUT_OF_ORDER"
    if how == "resolve":
        with scene.admin() as admin:
            assert admin.resolve("vm1.1", "retry").fields["status"] == "retrieved"
    if how == "restart":
        scene.world.restart_luod()
    vm1.kill()
    vm1 = scene.actor("vm1")
    restore_by_plan(vm1)
    assert scene.types("vm1.1")[-6:] == ["failed", "retried", "step", "step", "restored", "finished"]
    assert scene.kept() == set()


def test_a_failed_session_is_given_up(scene: Scene) -> None:
    (vm1,) = arrived(scene, "vm1", plan=True)
    vm1.say("CLAIM")
    vm1.say("RESTORED", token="0x1a", step="verify", ok=False)
    vm1.kill()
    with scene.admin() as admin:
        assert admin.resolve("vm1.1", "give-up").fields["status"] == "expired"
    assert scene.incoming() == set()
    assert scene.kept() == set()


def test_finish_with_open_steps(scene: Scene) -> None:
    """FINISH cannot be taken back, so the session has failed; nothing is held of it, and giving it up ends it."""
    (vm1,) = arrived(scene, "vm1", plan=True)
    vm1.say("CLAIM")
    vm1.finish()
    vm1.kill()
    assert "ran FINISH with open steps" in scene.wait("session.failed", "vm1.1")["reason"]
    done(scene, failed=1)
    assert scene.actor("vm1").refused("CLAIM").code == "GONE"
    scene.world.restart_luod()
    assert scene.state("vm1") == "failed"
    assert scene.refused("RESOLVE", key="vm1.1", decision="retry").code == "GONE"
    with scene.admin() as admin:
        assert admin.resolve("vm1.1", "give-up").fields["status"] == "expired"


def test_f29_finish_is_busy(scene: Scene) -> None:
    """The session is kept, and the client tries again when it likes."""
    (vm1,) = arrived(scene, "vm1")
    vm1.say("CLAIM")
    vm1.restore()
    scene.control.inject("can_finish", errno=errno.EBUSY, session="luod.vm1.1")
    with pytest.raises(AssertionError, match="EBUSY"):
        vm1.finish()
    answer = vm1.refused("FINISHED")
    assert (answer.code, answer.hint) == ("NOT_FINISHED", "run the LIVEUPDATE_SESSION_FINISH ioctl first")
    assert scene.state("vm1") == "retrieved"
    vm1.finish_and_say()
    done(scene, finished=1)


@pytest.mark.parametrize("retrieved", [True, False])
def test_f30_a_client_dies_before_finish(scene: Scene, retrieved: bool) -> None:
    """Its successor is given the same session, and RETRIEVE_FD gives the same file again."""
    (vm1,) = arrived(scene, "vm1")
    vm1.say("CLAIM")
    if retrieved:
        vm1.restore()
    vm1.kill()
    vm1 = scene.actor("vm1")
    assert vm1.say("CLAIM")["session"] == "vm1.1"
    vm1.restore()
    vm1.finish_and_say()
    done(scene, finished=1)


def test_f31_a_second_update_while_sessions_wait(scene: Scene) -> None:
    """It is refused; --force gives them up, at once and for good, and the clients are told so."""
    vm1, vm2, _ = arrived(scene, "vm1", "vm2", "vm3")
    vm1.say("CLAIM")
    vm2.say("CLAIM")
    vm2.restore()
    vm2.finish_and_say()
    answer = scene.refused("KEXEC")
    assert answer.code == "UNFINISHED"
    assert "vm1.1, vm3.1" in answer.message
    assert "--force" in answer.hint
    assert scene.refused("KEXEC", force=True).code == "NO_IMAGE"
    assert scene.state("vm3") == "rebooting", "a force that cannot succeed gives nothing up"
    assert scene.kexec(force=True) == "update/2"
    for name in ("vm1.1", "vm3.1"):
        assert scene.session(name)["state"] == "expired"
        assert "forced" in scene.session(name)["reason"]
    done(scene, finished=1, expired=2)
    vm1.drop()
    scene.arrive()
    assert scene.update()["state"] == "done"
    assert scene.incoming() == set()
    assert scene.actor("vm3").refused("CLAIM").code == "ENDED"


def test_a_client_that_finishes_without_a_word(new_scene: NewScene) -> None:
    """The plain client of the README says CLAIM and nothing more; luod sees by its marker that FINISH has run."""
    scene = new_scene("[deadlines]\npoll_s = 0.05\n")
    arrived(scene, "vm1")
    kernel = scene.world.kernel

    def take(session: int) -> bytes:
        fd = kernel.retrieve_fd(session, TOKEN)
        try:
            assert scene.state("vm1") == "retrieved", "not before"
            kernel.finish(session)
            return os.pread(fd, 3, 0)
        finally:
            os.close(fd)

    assert readme_second_boot(str(scene.world.socket), "vm1", take) == b"vm1"
    assert scene.wait("session.finished", "vm1.1") == {"proof": "marker"}
    done(scene, finished=1)


def test_finished_before_finish(scene: Scene) -> None:
    (vm1,) = arrived(scene, "vm1")
    vm1.say("CLAIM")
    before = scene.types("vm1.1")
    assert vm1.refused("FINISHED").code == "NOT_FINISHED"
    assert scene.types("vm1.1") == before
    vm1.restore()
    vm1.finish_and_say()


def test_both_holders_are_killed_and_the_client_still_has_it(scene: Scene) -> None:
    """It is not lost, for the kernel holds it; the client gives it back and goes on."""
    (vm1,) = arrived(scene, "vm1")
    vm1.say("CLAIM")
    lose_both(scene)
    assert scene.state("vm1") == "retrieved"
    vm1.reconnect()
    answer = vm1.refused("CLAIM")
    assert answer.code == "GONE"
    assert "ADOPT" in answer.hint
    assert vm1.adopt("vm1")["state"] == "retrieved"
    assert scene.kept() == {"luod.vm1.1"}
    vm1.restore()
    vm1.finish_and_say()
    done(scene, finished=1)


def test_both_holders_are_killed_and_the_client_finishes(scene: Scene) -> None:
    """luod cannot see it any more; that the kernel has forgotten the session and the client's word are enough."""
    (vm1,) = arrived(scene, "vm1")
    vm1.say("CLAIM")
    lose_both(scene)
    vm1.reconnect()
    assert vm1.refused("CLAIM").code == "GONE"
    vm1.adopt("vm1")
    lose_both(scene)
    vm1.restore()
    vm1.finish()
    vm1.reconnect()
    assert vm1.refused("CLAIM").code == "LOST"


@pytest.mark.parametrize("before_restart", [True, False])
def test_both_holders_are_killed_and_the_client_too(scene: Scene, before_restart: bool) -> None:
    """The last close has finished it: lost, and said so."""
    (vm1,) = arrived(scene, "vm1")
    vm1.say("CLAIM")
    if before_restart:
        vm1.kill()
        lose_both(scene)
    else:
        lose_both(scene)
        vm1.kill()
    assert scene.actor("vm1").refused("CLAIM").code == "LOST"
    done(scene, lost=1)
    assert scene.incoming() == set()


def lose_both(scene: Scene) -> None:
    scene.world.kill_luod()
    assert scene.world.keeper is not None
    scene.world.keeper.end()
    scene.world.start_keeper()
    scene.world.start_luod()


def test_luod_is_restarted_while_sessions_are_claimed(scene: Scene) -> None:
    vm1, vm2, vm3 = arrived(scene, "vm1", "vm2", "vm3", plan=True)
    vm1.say("CLAIM")
    vm2.say("CLAIM")
    vm2.say("RESTORED", token="0x1a", step="verify", ok=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        assert scene.world.luod is not None
        scene.world.luod.end(number)
        scene.world.start_luod()
    for actor in (vm1, vm2, vm3):
        actor.reconnect()
        restore_by_plan(actor)
    done(scene, finished=3)


def test_the_new_kernel_without_a_second_holder(scene: Scene) -> None:
    """A claim is refused as long as nobody else could keep the session; then it works."""
    (vm1,) = arrived(scene, "vm1")
    assert scene.world.keeper is not None
    scene.world.keeper.end()
    answer = vm1.refused("CLAIM")
    assert answer.code == "KERNEL"
    assert "luod-keeper" in answer.message
    assert scene.incoming() == {"luod.vm1.1"}
    scene.world.start_keeper()
    assert Keeper(scene.world.run).names() == []
    vm1.say("CLAIM")
    vm1.restore()
    vm1.finish_and_say()
    done(scene, finished=1)
