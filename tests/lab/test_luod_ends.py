# SPDX-License-Identifier: Apache-2.0
"""How updates of luod end on real kernels when they are refused, cut off, repeated, or meet a trap of the kernel."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from luod.lab.script import Boot, cut_power, run, start
from luod.lab.update import MIB

PROGRAMS = Path(__file__).parent / "programs"
pytestmark = [pytest.mark.lab, pytest.mark.timeout(500)]


def program(name: str, *arguments: object) -> list[str | Path]:
    return [sys.executable, PROGRAMS / name, *map(str, arguments)]


def jump(name: str, *arguments: object):
    return run(Path(name).stem, program(name, *arguments), leaves=True, timeout_s=200)


def stay(name: str, *arguments: object):
    return run(Path(name).stem, program(name, *arguments), timeout_s=200)


@pytest.fixture(scope="module")
def row(pair, run_lab):
    old, new = pair
    boots = [
        Boot([jump("in_a_row.py", number, TestThreeInARow.clients, TestThreeInARow.size, new.path)])
        for number in range(3)
    ]
    boots.append(Boot([stay("in_a_row.py", 3, TestThreeInARow.clients, TestThreeInARow.size)]))
    return run_lab("luod-in-a-row", old, boots, timeout_s=450).check()


class TestThreeInARow:
    """Old to new, then new to new twice, in one run, with the same client ids and one journal."""

    clients = 3
    size = 8 * MIB

    def test_each_attempt_of_each_client_is_finished_with_all_bytes(self, row, pair) -> None:
        kernels = [event["kernel"].split("-")[0] for event in row.of("boot")]
        assert kernels == [pair[0].version] + [pair[1].version] * 3
        assert [(event["update"], event["state"], event["bytes"]) for event in row.of("done")] == [
            (f"update/{number}", "done", self.clients * self.size) for number in (1, 2, 3)
        ]
        want = {
            f"vm{client}.{attempt}": "finished" for client in range(self.clients) for attempt in (1, 2, 3)
        }
        states = row.of("done")[-1]["states"]
        assert {name: states.get(name) for name in want} == want

    def test_another_update_is_refused_while_sessions_wait_for_their_clients(self, row) -> None:
        refusals = row.of("unfinished")
        assert [(event["boot"], event["code"]) for event in refusals] == [
            (1, "UNFINISHED"),
            (2, "UNFINISHED"),
        ]
        assert all("--force" in event["hint"] for event in refusals)
        assert all("rebooting" in event["states"].values() for event in refusals)

    def test_the_clients_are_charged_for_what_they_take_back_and_luod_is_not(self, row) -> None:
        verified = [event for event in row.of("client") if event["at"] == "verified"]
        assert len(verified) == 3 * self.clients
        assert min(event["charged"] for event in verified) > self.size
        assert max(grown for event in row.of("done") for grown in event["grown"].values()) < self.size / 2


@pytest.fixture(scope="module")
def denied(newest, run_lab):
    boots = [
        Boot([jump("denied.py", "make", newest.path, TestRefusedByTheKernel.size)]),
        Boot([stay("denied.py", "take", TestRefusedByTheKernel.size)]),
    ]
    return run_lab("luod-denied", newest, boots, timeout_s=300).check()


class TestRefusedByTheKernel:
    """luod has stopped the writers and calls reboot(KEXEC), and the kernel says no."""

    size = 4 * MIB

    @pytest.mark.parametrize(
        ("what", "errno", "loaded"), [("no permission", "EPERM", True), ("no image", "EINVAL", False)]
    )
    def test_errno_comes_back_and_everything_is_rolled_back(self, denied, what, errno, loaded) -> None:
        (told,) = [event for event in denied.of("denied") if event["what"] == what]
        assert told["ended"] == "aborted"
        assert told["refused"][-1][0] == errno
        assert errno in told["reason"]
        assert told["states"] == ["aborted", "aborted"]
        assert told["bytes"] == 2 * self.size
        assert (told["loaded"], told["in_doubt"]) == (loaded, [])

    def test_the_same_clients_go_through_the_next_update(self, denied) -> None:
        (told,) = denied.of("taken")
        assert (told["bytes"], told["state"]) == (2 * self.size, "done")


@pytest.fixture(scope="module")
def cut(newest, run_lab):
    def until(when: str):
        argv = program("cut_off.py", when, TestPowerCuts.size, newest.path)
        return [start(when, argv, ready=True, timeout_s=150), cut_power()]

    boots = [
        Boot(until("preserved")),
        Boot(until("armed"), cold=True),
        Boot([jump("cut_off.py", "jump", TestPowerCuts.size, newest.path)], cold=True),
        Boot(until("restoring")),
        Boot([jump("cut_off.py", "disabled", TestPowerCuts.size, newest.path)], cold=True),
        Boot([stay("cut_off.py", "cold", TestPowerCuts.size)]),
    ]
    return run_lab("luod-cut-off", newest, boots, timeout_s=480).check()


class TestPowerCuts:
    """A cold boot at three bad moments, and a jump into a kernel without live update: everybody hears it at once."""

    size = MIB

    def told(self, cut, boot: int):
        (told,) = [event for event in cut.of("lost") if event["boot"] == boot]
        return told

    @pytest.mark.parametrize(("boot", "attempt"), [(1, 1), (2, 2)])
    def test_sessions_are_lost_and_clients_start_cold(self, cut, boot, attempt) -> None:
        told = self.told(cut, boot)
        assert [told["states"][f"{client}.{attempt}"] for client in ("vm0", "vm1")] == ["lost", "lost"]
        assert told["update"] == "lost"
        assert set(told["answers"].values()) == {"LOST: start cold"}
        assert told["seconds"] < 10

    def test_the_moments_were_what_they_were_to_be(self, cut) -> None:
        about = {event["when"]: event for event in cut.of("about")}
        assert set(about["preserved"]["states"].values()) == {"preserved", "ready"}
        assert "armed" in about
        assert {about["restoring"]["states"][f"{one}.3"] for one in ("vm0", "vm1")} == {
            "finished",
            "restored",
        }

    def test_while_restoring_what_was_finished_stays_finished(self, cut) -> None:
        told = self.told(cut, 4)
        assert (told["states"]["vm0.3"], told["states"]["vm1.3"]) == ("finished", "lost")
        assert told["update"] == "lost"
        assert told["answers"]["vm1"] == "LOST: start cold"

    def test_a_next_kernel_without_live_update_is_a_clear_end(self, cut) -> None:
        told = self.told(cut, 5)
        assert (told["kernel"], told["update"]) == ("disabled", "lost")
        assert [told["states"][f"{client}.4"] for client in ("vm0", "vm1")] == ["lost", "lost"]
        assert set(told["answers"].values()) == {"LOST: start cold"}
        assert all(event["seconds"] < 60 for event in cut.of("started"))
        assert told["seconds"] < 10


class TestFiftyOneSessions:
    """50 clients and the black box fill a block of the kernel's records, and then a CREATE_SESSION is refused: EEXIST."""

    @staticmethod
    def boots(image, guard: str, expect: str) -> list[Boot]:
        return [
            Boot([jump("crowd.py", "make", image.path, guard)], expect=expect),
            Boot([stay("crowd.py", "take")]),
        ]

    def test_scratch_session_of_luod_saves_the_next_kernel(self, newest, run_lab) -> None:
        done = run_lab(
            "luod-crowd-guarded", newest, self.boots(newest, "guarded", "done"), timeout_s=300
        ).check()
        assert [event["sessions"] for event in done.of("exists")] == [51]
        assert [(event["state"], event["finished"]) for event in done.of("taken")] == [("done", 50)]

    def test_luod_without_it_panics_the_next_kernel(self, newest, run_lab) -> None:
        boots = self.boots(newest, "unguarded", "panic")
        done = run_lab("luod-crowd-unguarded", newest, boots, timeout_s=300).check()
        assert [event["sessions"] for event in done.of("exists")] == [51]
        assert re.search("invalid entry count: 0", done.console)
        assert done.boots_begun == 1
