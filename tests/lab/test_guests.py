# SPDX-License-Identifier: Apache-2.0
"""Real QEMU guests inside a lab machine, through a real kexec: nothing that a guest can see is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luod.lab.guests import GUEST_MIB, crossing, guest_reports, lab_guests

LAB_OUT = Path(__file__).resolve().parents[2] / "lab-out"
pytestmark = [pytest.mark.lab, pytest.mark.timeout(1300)]


def test_guests_live_through_a_real_kexec(pair) -> None:
    """From the oldest kernel and QEMU there are to the newest of both."""
    directory = Path(os.environ.get("LUOD_LAB_OUT", LAB_OUT)) / "guests"
    told, run = lab_guests(*pair, directory, guests=2)
    assert (told["finished"], told["lost"], told["failed"]) == (2, 0, 0)
    assert told["detail"]["problems"] == []
    assert told["bytes_verified"] == 2 * GUEST_MIB << 20
    assert f"{crossing()}" in told["kernel"]
    for guest in told["guests"]:
        parts = guest["blackout"]
        assert {
            "pause",
            "save",
            "preserve",
            "wait",
            "kexec",
            "boot",
            "retrieve",
            "check",
            "start",
            "load",
            "resume",
        } <= set(parts)
        assert all(ms >= 0 for ms in parts.values())
    # The mutants of the judge: the same logs do not pass for guests of another place or another memory.
    assert all(one.findings for one in guest_reports(run, 2, GUEST_MIB << 20, marks=[(10**6, 0), (10**6, 0)]))
