# SPDX-License-Identifier: Apache-2.0
"""The lab machine itself: what it reports when a script goes wrong, and that it always comes to an end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from luod.lab.errors import LabRunFailed
from luod.lab.script import Boot, run, send, start, wait

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]


def shell(name: str, text: str, **options):
    return run(name, ["/bin/sh", "-c", text], **options)


@pytest.fixture(scope="module")
def mishaps(newest, run_lab):
    boots = [
        Boot(
            [
                shell("exit-3", "echo what it said; exit 3", go_on=True),
                shell("hangs", "exec sleep 1000", timeout_s=0.5, go_on=True),
                run("no-such-program", ["/no/such/program"], go_on=True),
                start("dies", ["/bin/false"], ready=True, go_on=True),
                start("mute", ["/bin/sleep", "1000"], ready=True, timeout_s=0.3, go_on=True),
                start("by-fd", ["/bin/sh", "-c", "echo >&7; exec sleep 1000"], ready_fd=7),
                start("stays", ["/bin/sleep", "1000"]),
                send("stays", signal.SIGTERM),
                wait("stays", codes=(-15,)),
                shell("as-user", "id -u; id -g; cat /proc/self/cgroup", uid=1234, cgroup="users"),
                shell("comes-back", "true", leaves=True, go_on=True),
                shell("last", "echo reached > /run/state/last"),
            ]
        )
    ]
    return run_lab("mishaps", newest, boots, timeout_s=150)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("hangs", "still running after 0.5 s, killed"),
        ("dies", "ended before it was ready"),
        ("mute", "not ready after 0.3 s"),
        ("comes-back", "came back instead of leaving this boot"),
    ],
)
def test_step_that_goes_wrong_says_how(mishaps, step, message) -> None:
    assert not mishaps.step(step)["ok"]
    assert mishaps.step(step)["message"] == message


def test_exit_codes_and_signals_are_told(mishaps) -> None:
    assert (mishaps.step("exit-3")["code"], mishaps.step("exit-3")["output"]) == (3, "what it said\n")
    assert mishaps.step("no-such-program")["code"] == 127
    assert mishaps.step("wait-stays")["ok"]
    assert mishaps.step("wait-stays")["code"] == -15


def test_readiness_is_heard_on_a_descriptor(mishaps) -> None:
    assert mishaps.step("by-fd")["ok"]


def test_steps_run_as_other_users_in_their_cgroup(mishaps) -> None:
    assert mishaps.step("as-user")["output"] == "1234\n1234\n0::/users\n"


def test_run_goes_on_where_it_may_and_still_is_a_failure(mishaps) -> None:
    assert mishaps.file("last").read_text("ascii") == "reached\n"
    with pytest.raises(LabRunFailed) as caught:
        mishaps.check()
    told = str(caught.value)
    assert "boot 0, step 'exit-3' failed" in told
    assert "what it said" in told
    assert "last lines of the console" in told
    assert str(mishaps.directory) in told


def test_first_failure_ends_the_run(newest, run_lab) -> None:
    lab = run_lab("stops", newest, [Boot([shell("bad", "exit 1"), shell("never", "true")])], timeout_s=150)
    with pytest.raises(LabRunFailed, match="never"):
        lab.step("never")
    assert lab.ended == "off"


def test_machine_that_takes_too_long_is_stopped_and_the_place_named(newest, run_lab) -> None:
    lab = run_lab(
        "too-long", newest, [Boot([shell("sleeps", "exec sleep 1000", timeout_s=1000)])], timeout_s=40
    )
    assert lab.ended == "timeout"
    assert lab.problem() == "the time ran out in boot 0, step 'sleeps'"
    assert not any(str(lab.directory) in text for text in command_lines()), "QEMU is still running"


def command_lines() -> list[str]:
    found: list[str] = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found.append(Path(f"/proc/{entry}/cmdline").read_bytes().decode("utf-8", "replace"))
            except OSError:
                continue
    return [line for line in found if line.startswith(("qemu", "/usr/bin/qemu"))]
