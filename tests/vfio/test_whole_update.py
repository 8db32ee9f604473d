# SPDX-License-Identifier: Apache-2.0
"""Guests with devices through a whole update on real kernels, and processes killed at every point of their restore plans."""

from __future__ import annotations

from typing import Any

import pytest

from luod.adapters.iommufd import abi as iommufd
from luod.adapters.vfio import abi as vfio
from luod.lab.outcome import LabRun
from luod.lab.passthrough import ARGUMENTS
from luod.lab.script import Boot, run

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
PAGE = 4096


@pytest.fixture(scope="module")
def update(pair, run_devices, program) -> LabRun:
    """Go from the oldest kernel to the newest, one update refused first."""
    old, new = pair
    boots = [
        Boot(
            [
                run(
                    "old",
                    program("update.py", "--boot", "0", "--kernel", str(new.path)),
                    timeout_s=300,
                    leaves=True,
                )
            ],
            arguments=ARGUMENTS,
        ),
        Boot([run("new", program("update.py", "--boot", "1"), timeout_s=500)]),
    ]
    return run_devices("devices-update", old, boots, 840).check()


def one(events: list[dict[str, Any]]) -> dict[str, Any]:
    assert len(events) == 1, events
    return events[0]


def said(update: LabRun, client: str, at: str, boot: int) -> list[dict[str, Any]]:
    return [
        event
        for event in update.of("client")
        if (event["client"], event["at"], event["boot"]) == (client, at, boot)
    ]


@pytest.mark.parametrize("client", ["vm1", "vm2"])
def test_an_update_that_is_refused_gives_the_devices_back(update, client) -> None:
    preserved = said(update, client, "preserved", 0)
    assert preserved
    assert all(event["outcome"] == "reattach" for event in preserved)
    assert preserved[0]["kinds"] == ["memfd", "iommufd-reopened", "vfio-reattached"]
    assert "irqs_on=()" in said(update, client, "ready", 0)[0]["standing"][0]
    assert said(update, client, "resumed", 0)[0]["bytes"] == PAGE


@pytest.mark.parametrize("client", ["vm1", "vm2"])
def test_a_device_writes_into_the_memory_before_and_after(update, client) -> None:
    assert said(update, client, "subscribed", 0)[0]["bytes"] == PAGE
    finished = one(said(update, client, "finished", 1))
    assert finished["proof"], "what the device wrote in the old kernel is not there"
    assert finished["bytes"] == PAGE


def test_finish_is_refused_while_steps_are_open(update) -> None:
    opened = one(said(update, "vm1", "open", 1))
    assert opened["steps"][0] == "0x10/memfd.retrieve"
    assert len(opened["steps"]) == 14


def test_a_policy_of_preserving_is_refused_by_name_and_left_out(update) -> None:
    done = one(update.of("done"))
    nack = one(done["nacks"])
    assert (nack["errno"], nack["token"]) == ("ENOENT", "0x20")
    assert "no live-update handler for iommufd files" in nack["message"]
    assert done["update"]["dropped"] == ["vm3.2"]
    assert {session["id"]: session["devices"] for session in done["sessions"]}["vm1.2"] == "reattach"


def test_a_device_that_somebody_has_fails_its_session_only_and_keeps_its_fds(update) -> None:
    failed = one(said(update, "vm2", "failed", 1))
    assert (failed["step"], failed["errno"]) == ("0x30/vfio.bind", "EINVAL")
    assert "is held by" in failed["message"]
    assert "resolve" in failed["message"]
    meanwhile = one(update.of("while-failed"))
    assert meanwhile["states"]["vm2.2"] == "failed"
    assert meanwhile["states"]["vm1.2"] != "failed"
    assert {"/dev/iommu", "/ (deleted)", "anon_inode"} <= set(meanwhile["fds"])


def test_every_session_ends_finished(update) -> None:
    done = one(update.of("done"))
    ends = {session["id"]: session["state"] for session in done["sessions"]}
    assert (ends["vm1.2"], ends["vm2.2"]) == ("finished", "finished")
    assert done["update"]["state"] == "done"


@pytest.mark.parametrize("kept", [False, True], ids=["without-keeper", "with-keeper"])
def test_a_process_may_die_at_every_point_of_every_step(update, kept) -> None:
    rounds = [event for event in update.of("matrix") if event["kept"] is kept]
    last = rounds[-1]
    assert last["missed"] == []
    assert last["deaths"] == 4 * last["steps"] == 56
    for event in rounds:
        assert event["proof"]
        assert event["bytes"] == PAGE
        assert len(event["ioas"]) == 1
        assert len(event["devices"]) == 1
        assert event["holders"] == 1 + kept


def test_with_a_keeper_nothing_is_made_twice(update) -> None:
    once = {
        "open:iommu", f"{iommufd.IOAS_ALLOC:#x}", f"{iommufd.IOAS_MAP_FILE:#x}", f"{vfio.DEVICE_BIND_IOMMUFD:#x}",
    }  # fmt: skip
    for event in update.of("matrix"):
        if event["kept"]:
            opened = sum(count for call, count in event["calls"].items() if call.startswith("open:vfio"))
            assert opened == 1
            assert {call: event["calls"][call] for call in once} == dict.fromkeys(once, 1)
