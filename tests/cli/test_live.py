# SPDX-License-Identifier: Apache-2.0
"""Every verb that talks to luod, against the real one."""

from __future__ import annotations

import signal
from pathlib import Path

from luoctl_process import Luoctl, ended, refused_update, whole_update
from luod_world import PATIENCE_S, Puppet, World, new_world

from luod.journal.record import Entry
from luod.journal.writer import Journal
from luod.states import events as ev


def test_a_fresh_host(world: World, luoctl: Luoctl) -> None:
    status = luoctl("status", "--json").json
    assert status["update"] is None
    assert status["kernel"]["state"] == "ok"
    assert luoctl("list", "--json").json == {"clients": []}
    assert luoctl("sessions", "--json").json == {"sessions": []}
    assert luoctl("clients", "--json").json == {"clients": []}
    assert luoctl("list").out == "No client is connected.\n"
    assert luoctl("sessions").out == "No sessions.\n"
    assert "update    none yet" in luoctl("status").out


def test_whole_update(world: World, luoctl: Luoctl) -> None:
    kexec = whole_update(world, luoctl)
    assert kexec.code == 0
    assert kexec.out == "update/1: the new kernel runs; `luoctl wait` follows the sessions\n"
    assert "update/1: the kexec begins with 2 sessions" in kexec.err
    wait = luoctl("wait", "--json")
    assert (wait.code, wait.err) == (0, "")
    assert wait.json["ok"] is True
    assert wait.json["update"]["counts"] == {"finished": 2, "lost": 0, "failed": 0, "expired": 0}
    assert luoctl("wait").out == "update/1 is done: 2 finished\n"
    assert "finished" in luoctl("session", "vm1").out
    sessions = luoctl("sessions", "--json").json["sessions"]
    assert {one["id"]: one["state"] for one in sessions} == {"vm1.1": "finished", "vm2.1": "finished"}
    assert luoctl("session", "vm2", "--json").json == {"session": sessions[1]}
    replayed = luoctl("journal", "replay", "--json").json
    assert replayed["sessions"] == sessions
    assert replayed["update"] == luoctl("status", "--json").json["update"]
    assert replayed["anomalies"] == []


def test_json_stands_before_or_behind_the_verb(world: World, luoctl: Luoctl) -> None:
    for words in (("status",), ("sessions",), ("journal", "show"), ("journal", "verify")):
        behind, before = luoctl(*words, "--json"), luoctl("--json", *words)
        assert behind.json.keys() == before.json.keys()
    assert luoctl("journal", "--json", "replay").json["head"] >= 1
    assert luoctl("--json", "session", "nobody").json["error"]["code"] == "UNKNOWN_ID"


def test_list_shows_who_is_connected(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="vm1", policy="optional")
        (one,) = luoctl("list", "--json").json["clients"]
        assert (one["id"], one["pid"], one["session"]["policy"]) == ("vm1", puppet.pid, "optional")
        (client,) = luoctl("clients", "--json").json["clients"]
        assert client["id"] == "vm1"
        for verb in ("list", "clients"):
            head, row = luoctl(verb).out.splitlines()
            assert head.startswith("client")
            assert row.startswith("vm1 ")
            assert str(puppet.pid) in row


def test_a_refused_update_is_undone_and_says_why(world: World, luoctl: Luoctl) -> None:
    kexec = refused_update(world, luoctl)
    assert kexec.code == 1
    assert kexec.out == "update/1 was aborted: vm0.1: its client refused: EBUSY a device is busy\n"
    wait = luoctl("wait", "--json")
    assert wait.code == 1
    assert wait.json["ok"] is False
    assert wait.json["update"]["state"] == "aborted"
    why = luoctl("journal", "why", "1", "--json").json
    assert [one["type"] for one in why["because"]] == [
        "update.aborted.v1", "update.abort_requested.v1", "session.nacked.v1",
    ]  # fmt: skip
    assert "its client cannot follow: EBUSY a device is busy" in luoctl("journal", "why", "vm0.1").out


def test_abort_undoes_the_update(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="vm1")
        luoctl("load", world.image, "--cmdline", "kho=on liveupdate=on")
        begun = luoctl("kexec", "--no-wait", "--json").json
        assert begun["update"]["state"] == "preparing"
        puppet.event("START_PRESERVATION")
        late = luoctl("wait", "--timeout", "0.2", "--json")
        assert late.code == 1
        assert late.json["error"]["code"] == "NOT_ENDED"
        waiting = luoctl.start("wait")
        abort = luoctl.start("abort", "--reason", "not today", "--json")
        assert puppet.event("ABORT")["reason"] == "not today"
        puppet.drop()
        puppet.call("ABORTED", id="vm1")
        done = ended(abort)
        assert (done.code, done.json) == (0, {"aborted": ["update/1"], "ok": True})
        waited = ended(waiting)
        assert (waited.code, waited.out) == (1, "update/1 was aborted: not today\n")
    again = luoctl("abort")
    assert (again.code, again.err.splitlines()[0]) == (1, "luoctl: no update is running")


def test_abort_of_one_session(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="vm1")
        answer = luoctl("abort", "vm1")
        assert (answer.code, answer.out) == (0, "vm1.1: undone\n")
    assert luoctl("session", "vm1.1", "--json").json["session"]["state"] == "aborted"


def test_abort_that_takes_longer_than_it_may(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="vm1")
        luoctl("load", world.image, "--cmdline", "kho=on liveupdate=on")
        luoctl("kexec", "--no-wait")
        puppet.event("START_PRESERVATION")
        answer = luoctl("abort", "--timeout", "0")
        assert answer.code == 1
        assert answer.err.splitlines()[-2] == "luoctl: update/1 is still being undone"
        puppet.drop()
        puppet.call("ABORTED", id="vm1")
        assert luoctl("wait").code == 1


def test_wait_goes_on_when_luod_is_restarted(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="vm1")
        luoctl("load", world.image, "--cmdline", "kho=on liveupdate=on")
        luoctl("kexec", "--no-wait")
        puppet.event("START_PRESERVATION")
        waiting = luoctl.start("wait")
        assert waiting.stderr is not None
        assert "update/1 is preparing" in waiting.stderr.readline()
        world.restart_luod()
        answer_to = luoctl.start("abort", "--reason", "after the restart")
        puppet.drop()
        puppet.reconnect()
        puppet.call("SUBSCRIBE", id="vm1")
        puppet.call("ABORTED", id="vm1")
        assert ended(answer_to).code == 0
        answer = ended(waiting)
        assert answer.code == 1
        assert "luod has gone; waiting for it to come back" in answer.err
        assert answer.out == "update/1 was aborted: after the restart\n"


def test_refusals(world: World, luoctl: Luoctl) -> None:
    for words, code, message, hint in (
        (("kexec",), 1, "no next kernel is loaded", "luoctl load IMAGE"),
        (("wait",), 1, "there was no update yet", "luoctl kexec"),
        (("session", "ghost"), 1, "there is no session 'ghost'", "luoctl sessions"),
        (("abort", "ghost"), 1, "there is no session 'ghost'", "luoctl sessions"),
        (("resolve", "vm1.1/mark", "done"), 1, "no effect 'vm1.1/mark' is in doubt", "luoctl status"),
        (("resolve", "x", "maybe"), 2, "'maybe' is not one of", "luoctl resolve --help"),
        (("load", "/none/such", "--cmdline", ""), 2, "/none/such", ""),
        (("load", world.image), 2, "one of --cmdline and --reuse-cmdline is needed", "running kernel"),
        (("load", world.config, "--cmdline", ""), 1, "could not be loaded", ""),
        (("journal", "why", "ghost"), 1, "knows no session, client or update 'ghost'", ""),
        (("journal", "timeline"), 1, "the journal holds no update yet", "journal replay"),
        (("statuz",), 2, "there is no verb 'statuz'", "status"),
        (("journal", "shows"), 2, "no such command 'shows'", "journal --help"),
        (("status", "--jsno"), 2, "no such option", "status --help"),
        ((), 2, "a verb is missing", "luoctl --help"),
    ):  # fmt: skip
        answer = luoctl(*words)
        first, *rest = answer.err.splitlines()
        assert (answer.code, answer.out) == (code, ""), (words, answer)
        assert first.startswith("luoctl: "), answer.err
        assert message in first
        if hint:
            assert rest[-1].startswith("hint: "), answer.err
            assert hint in rest[-1]
        if words:
            error = luoctl(*words, "--json").json["error"]
            assert f"luoctl: {error['message']}" == first
            assert error["code"].isupper()


def test_resolve(disk_path: Path) -> None:
    """An effect that luod cannot settle, here one of another version, waits for a person's word."""
    state = disk_path / "state"
    state.mkdir()
    intent = ev.EffectIntended("luod/polish", "polish.floor")
    with Journal.open(state / "journal.db", boot_id="an earlier one", run_id="1") as journal:
        journal.append([Entry("luod", intent)])
    with new_world(state) as world:
        luoctl = Luoctl(world.socket)
        (doubt,) = luoctl("status", "--json").json["in_doubt"]
        assert (doubt["key"], doubt["status"]) == ("luod/polish", "unknown")
        assert "luod/polish: settle it with `luoctl resolve luod/polish" in luoctl("status").out
        assert luoctl("journal", "replay", "--json").json["in_doubt"] == [doubt]
        answer = luoctl("resolve", "luod/polish", "absent")
        assert (answer.code, answer.out) == (0, "luod/polish is settled: failed\n")
        assert luoctl("status", "--json").json["in_doubt"] == []


def test_reuse_cmdline(world: World, luoctl: Luoctl) -> None:
    answer = luoctl("load", world.image, "--reuse-cmdline", "--json")
    assert answer.code == 0
    with open("/proc/cmdline") as file:
        words = [word for word in file.read().split() if not word.startswith(("BOOT_IMAGE=", "initrd="))]
    assert answer.json["image"]["cmdline"] == " ".join(words)
    plain = luoctl("load", world.image, "--cmdline", "quiet")
    assert plain.code == 0
    assert "lacks kho=on liveupdate=on" in plain.err


def test_interrupted(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="vm1")
        luoctl("load", world.image, "--cmdline", "kho=on liveupdate=on")
        kexec = luoctl.start("kexec")
        puppet.event("START_PRESERVATION")
        assert kexec.stderr is not None
        assert "asked for the update" in kexec.stderr.readline()
        kexec.send_signal(signal.SIGINT)
        assert ended(kexec).code == 130
        assert luoctl("status", "--json").json["update"]["state"] == "preparing", "the update goes on"
        abort = luoctl.start("abort")
        puppet.event("ABORT")
        puppet.drop()
        puppet.call("ABORTED", id="vm1")
        assert ended(abort).code == 0


def test_closed_pipe(world: World, luoctl: Luoctl) -> None:
    show = luoctl.start("journal", "show")
    assert show.stdout is not None
    show.stdout.close()
    assert show.wait(PATIENCE_S) == 141
    assert show.stderr is not None
    with show.stderr as stderr:
        assert stderr.read() == ""


def test_nothing_of_a_client_controls_the_terminal(world: World, luoctl: Luoctl) -> None:
    with Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="vm1")
        luoctl("load", world.image, "--cmdline", "kho=on liveupdate=on")
        kexec = luoctl.start("kexec")
        puppet.event("START_PRESERVATION")
        puppet.call("NACK", id="vm1", errno="EBUSY", message="\x1b[2Jgone\r\n\x07")
        puppet.event("ABORT")
        puppet.drop()
        puppet.call("ABORTED", id="vm1")
        said = ended(kexec)
    texts = [said.out, said.err]
    texts += [
        luoctl(*words).out
        for words in (("journal", "show"), ("journal", "why", "vm1.1"), ("status",), ("sessions",))
    ]
    for text in texts:
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\r" not in text
        assert r"\x1b[2Jgone" in text
