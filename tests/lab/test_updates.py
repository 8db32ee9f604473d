# SPDX-License-Identifier: Apache-2.0
"""Updates of real kernels and the ways they end: carried on, refused, cut off, or not carried at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from luod.lab.script import Boot, cut_power, kexec, run, start

PROGRAMS = Path(__file__).parent / "programs"
pytestmark = [pytest.mark.lab, pytest.mark.timeout(330)]


def program(name: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, PROGRAMS / name, *arguments]


def test_three_updates_in_a_row_between_two_versions(pair, run_lab) -> None:
    """Old to new, and new to new twice: what is handed on each time stays, what nobody takes is gone one update later."""
    old, new = pair
    boots = [
        Boot([start("chain", program("chain.py", str(boot)), ready=True), kexec(new)]) for boot in range(3)
    ]
    boots.append(Boot([start("chain", program("chain.py", "3"), ready=True)]))
    lab = run_lab("three-updates", old, boots, timeout_s=300).check()
    assert [event["kernel"].split("-")[0] for event in lab.of("boot")] == [old.version] + [new.version] * 3
    assert lab.of("link")[-1]["marks"][:4] == [1, 2, 3, 0]
    assert len({event["boot_id"] for event in lab.of("boot")}) == 4


def test_refused_jump_leaves_everything_as_it_was(newest, run_lab) -> None:
    boots = [
        Boot([run("make", program("refused.py", "make", newest.path), leaves=True)]),
        Boot([run("take", program("refused.py", "take"))]),
    ]
    lab = run_lab("refused", newest, boots, timeout_s=240).check()
    (told,) = lab.of("refused")
    assert (told["nobody"], told["no_image"]) == ("EPERM", "EINVAL")
    assert (told["loaded"], told["still_loaded"], told["unloaded"]) == (True, True, True)


def test_power_cut_loses_the_sessions_and_keeps_what_was_synced(newest, run_lab) -> None:
    """A cold boot where an update was meant: the sessions do not exist, and asking for them does not hang."""
    write = "echo synced > /run/state/note && sync /run/state/note && echo not > /run/state/unsynced"
    boots = [
        Boot(
            [
                start("hold", program("hold.py"), ready=True),
                run("write", ["/bin/sh", "-c", write]),
                cut_power(),
            ]
        ),
        Boot([run("look", program("look.py"))], cold=True),
    ]
    lab = run_lab("power-cut", newest, boots, timeout_s=240).check()
    (told,) = lab.of("look")
    assert (told["state"], told["error"]) == ("ok", "SessionUnknown")
    assert [event["handover"] for event in lab.of("boot")] == [False, False]
    assert lab.file("note").read_text("ascii") == "synced\n"


@pytest.mark.parametrize(("append", "state"), [("kho=on", "disabled"), ("kho=off liveupdate=on", "disabled")])
def test_next_kernel_without_live_update_says_so(append, state, newest, run_lab) -> None:
    """There is no device and no way to the sessions: a clear answer at once, and the data is lost."""
    boots = [
        Boot([start("hold", program("hold.py"), ready=True), kexec(newest, append=append)]),
        Boot([run("look", program("look.py"), timeout_s=30)]),
    ]
    lab = run_lab(f"without-{append}", newest, boots, timeout_s=240).check()
    (told,) = lab.of("look")
    assert told["state"] in (state, "absent")
    assert told["error"] in ("DeviceDisabled", "DeviceAbsent")
    assert "liveupdate=on" in told["hint"] or "kho" in told["hint"]
