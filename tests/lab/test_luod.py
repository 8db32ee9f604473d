# SPDX-License-Identifier: Apache-2.0
"""The same luod, clients and protocol on real kernels: a whole update between two versions, and one whose kexec never came."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from luod.lab.script import STATE, Boot, cut_power, run
from luod.lab.update import MIB, judge, keeper, luod, update_script

pytestmark = [pytest.mark.lab, pytest.mark.timeout(500)]

CLIENTS = 3
SIZE = 8 * MIB
SCRIPT, WRITTEN = "lab/script.json", "written-before-the-order"


def writes_before_the_order(boots: list[Boot]) -> list[Boot]:
    """Let a file be written, and never synced by its writer, as the last thing before the order.

    Without luod's sync it is on the disk after 30 s at the earliest (vm.dirty_expire_centisecs), and empty until then.
    """
    write = run("write", ["/bin/cp", STATE / SCRIPT, STATE / WRITTEN])
    *steps, order = boots[0].steps
    return [Boot([*steps, write, order]), *boots[1:]]


@pytest.fixture(scope="module")
def update(pair, run_lab):
    old, new = pair
    boots = writes_before_the_order(update_script(new, clients=CLIENTS, size=SIZE))
    done = run_lab(f"luod-{old.version}-{new.version}", old, boots, timeout_s=420).check()
    return done, judge(done, old, new)


def test_every_session_is_finished_and_every_byte_compared(update, pair) -> None:
    done, told = update
    assert told["kernel"] == f"{pair[0].version} -> {pair[1].version}"
    assert (told["sessions"], told["finished"], told["lost"], told["failed"]) == (CLIENTS, CLIENTS, 0, 0)
    assert told["bytes_verified"] == CLIENTS * SIZE
    assert told["blackout_ms"] > 0
    assert [event["handover"] for event in done.of("boot")] == [False, True]


def test_both_journals_and_the_timeline_are_left(update) -> None:
    done, told = update
    assert Path(told["journal"]).is_file()
    assert done.file("luod-after-boot-0/journal.db").is_file()
    assert re.search(r"vm0", (done.directory / "timeline.txt").read_text("utf-8"))


def test_a_file_that_nobody_had_synced_is_on_the_disk(update) -> None:
    done, _ = update
    assert done.file(WRITTEN).read_bytes() == done.file(SCRIPT).read_bytes()


def test_power_cut_instead_of_the_update_makes_no_one_hang(newest, run_lab) -> None:
    """The clients had subscribed, then the power went: after a cold boot luod comes up and serves, with nothing to claim."""
    first, _ = update_script(newest, clients=1, size=SIZE, jump=cut_power())
    boots = [first, Boot([first.steps[0], keeper(), luod()], cold=True)]
    done = run_lab("luod-power-cut", newest, boots, timeout_s=240).check()
    assert [event["handover"] for event in done.of("boot")] == [False, False]
    assert done.step("luod", boot=1)["ok"]
