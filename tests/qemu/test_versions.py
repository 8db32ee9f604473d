# SPDX-License-Identifier: Apache-2.0
"""A guest goes from one QEMU version to another and back, when its machine type is a versioned one."""

from __future__ import annotations

import pytest
from qemu_rig import Rig

from luod.adapters.qemu.errors import ConfigMismatch
from luod.lab.errors import LabUnavailable
from luod.lab.qemus import Qemu, available_qemus

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def pair() -> tuple[Qemu, Qemu]:
    """The oldest and the newest QEMU here."""
    try:
        found = available_qemus()
    except LabUnavailable as error:
        pytest.skip(str(error))
    if len(found) < 2:
        pytest.skip("needs a second QEMU version: luoctl lab fetch-qemu")
    return found[0], found[-1]


def test_there_and_back(rig: Rig, pair: tuple[Qemu, Qemu]) -> None:
    old, new = pair
    rig.start(qemu=str(old.binary))
    for version in (new, old, new):
        rig.speak(5)
        saved = rig.do("save", runstate="running")
        rig.guest.process.kill()
        rig.start_incoming(qemu=str(version.binary))
        assert rig.guest.monitor.greeting.version == version.version
        rig.do("load", **saved)
        rig.do("resume", runstate="running")
    rig.speak(20)
    assert rig.log.findings == []


def test_a_machine_type_without_a_version_is_another_in_another_qemu(
    rig: Rig, pair: tuple[Qemu, Qemu]
) -> None:
    old, new = pair
    rig.start(qemu=str(old.binary), machine="q35")
    rig.speak(2)
    saved = rig.do("save", runstate="running")
    rig.guest.process.kill()
    rig.start_incoming(qemu=str(new.binary), machine="q35")
    with pytest.raises(ConfigMismatch, match=r"machine: pc-q35-10\.0 was saved, pc-q35-\d+\.\d+ is there"):
        rig.do("load", **saved)
