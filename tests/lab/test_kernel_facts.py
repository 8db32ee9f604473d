# SPDX-License-Identifier: Apache-2.0
"""What luod relies on in the kernel, held against real kernels: every statement is a case of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from luod.lab.outcome import LabRun
from luod.lab.script import Boot, kexec, run, start

PROGRAMS = Path(__file__).parent / "programs"
pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


def program(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(PROGRAMS / name), *arguments]


def cases(heading: str) -> list[str]:
    """Read the names of the cases from the program's own list, so that a case that never reports is a failure here."""
    source = (PROGRAMS / "facts.py").read_text("utf-8")
    listed = re.search(rf"^{heading} = \[\n(.*?)^\]", source, re.MULTILINE | re.DOTALL)
    assert listed is not None
    return [line.strip(" ,") for line in listed.group(1).splitlines()]


@pytest.fixture(scope="module", params=["same", "next"])
def facts(request, pair, newest, run_lab) -> LabRun:
    """Go from the newest kernel to itself, and from the oldest to the newest."""
    first, second = (newest, newest) if request.param == "same" else pair
    if request.param == "next" and first.version == second.version:
        pytest.skip("there is only one kernel image, so no update between two versions")
    boots = [
        Boot([start("before", program("facts.py", "before"), ready=True), kexec(second)]),
        Boot([run("after", program("facts.py", "after"), go_on=True)]),
    ]
    return run_lab(f"facts-{first.version}-{second.version}", first, boots, timeout_s=120)


def outcome(facts: LabRun, name: str, boot: int) -> None:
    found = [event for event in facts.of("case") if event["name"] == name and event["boot"] == boot]
    if not found:
        facts.check()
        pytest.fail(f"the case never reported; see {facts.directory}")
    if not found[0]["ok"]:
        pytest.fail(found[0]["message"])


@pytest.mark.parametrize("name", cases("BEFORE"))
def test_before_the_update(facts, name) -> None:
    outcome(facts, name, 0)


@pytest.mark.parametrize("name", cases("AFTER"))
def test_after_the_update(facts, name) -> None:
    outcome(facts, name, 1)


def test_both_kernels_say_who_they_are(facts) -> None:
    facts.check()
    old, new = facts.of("boot")
    assert [old["handover"], new["handover"]] == [False, True]
    assert old["boot_id"] != new["boot_id"]
    assert "Retrieved live update data" in facts.kernel_log(1)
    assert f"exec from: {old['kernel']}" in facts.kernel_log(1)


class TestFiftyOneSessions:
    """CREATE_SESSION that fails with EEXIST at exactly 51 sessions makes the next kernel panic, unless luod's guard runs."""

    @staticmethod
    def boots(image, guard: str, expect: str) -> list[Boot]:
        make = start("make", program("fifty_one.py", "make", guard), ready=True)
        return [
            Boot([make, kexec(image)], expect=expect),
            Boot([run("take", program("fifty_one.py", "take"))]),
        ]

    def test_without_the_guard_the_next_kernel_panics(self, newest, run_lab) -> None:
        lab = run_lab("trap-unguarded", newest, self.boots(newest, "unguarded", "panic"), timeout_s=240)
        lab.check()
        assert "Block contains invalid entry count: 0" in lab.console
        assert lab.boots_begun == 1

    def test_with_the_guard_all_sessions_come_over(self, newest, run_lab) -> None:
        lab = run_lab("trap-guarded", newest, self.boots(newest, "guarded", "done"), timeout_s=240)
        lab.check()
        assert [event["sessions"] for event in lab.of("taken")] == [51]


@pytest.fixture(scope="module")
def charged(newest, run_lab) -> dict[str, dict[str, int]]:
    """Bytes that each cgroup was charged when the client, and when the agent, asked for 48 MiB that came over."""
    boots = [
        Boot([start("make", program("charging.py", "make"), ready=True), kexec(newest)]),
        Boot([run("take", program("charging.py", "take"), cgroup="agent")]),
    ]
    lab = run_lab("charging", newest, boots, timeout_s=240).check()
    return {event["who"]: event for event in lab.of("charged")}


class TestCharging:
    """Memory that comes over is charged to the cgroup of the process that asks for it."""

    size = 48 << 20
    slack = 6 << 20

    def test_a_client_that_retrieves_is_charged_and_the_agent_is_not(self, charged) -> None:
        assert charged["client"]["client"] > self.size - self.slack
        assert charged["client"]["agent"] < self.slack

    def test_an_agent_that_retrieves_for_a_client_pays_itself(self, charged) -> None:
        assert charged["agent"]["agent"] > self.size - self.slack
        assert charged["agent"]["client"] < self.slack
