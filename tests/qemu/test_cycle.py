# SPDX-License-Identifier: Apache-2.0
"""Whole cycles on a real QEMU: the guest counts on in another process, or in the same one."""

from __future__ import annotations

import pytest
from qemu_rig import Rig

pytestmark = pytest.mark.lab


def test_a_guest_goes_on_in_another_process(rig: Rig) -> None:
    rig.start()
    rig.speak(5)
    before = rig.guest.runstate()
    assert before == "running"
    paused = rig.do("pause", runstate=before)
    assert (paused["runstate"], paused["now"]) == ("running", "paused")
    saved = rig.do("save", runstate=before)
    last = rig.drain()
    assert saved["bytes"] < rig.size
    rig.guest.process.kill()
    rig.start_incoming()
    loaded = rig.do("load", **saved)
    assert loaded["runstate"] == "paused"
    assert rig.drain() == last
    assert rig.do("resume", runstate=before)["runstate"] == "running"
    rig.speak(50)
    assert rig.log.findings == []
    print(saved, loaded)
