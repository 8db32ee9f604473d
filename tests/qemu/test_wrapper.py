# SPDX-License-Identifier: Apache-2.0
"""luo-qemu on real QEMU and the emulated kernel: a whole update, and everything that goes as it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from wrapper_rig import Host

pytestmark = pytest.mark.lab


@pytest.fixture
def host(disk_path: Path) -> Iterator[Host]:
    with Host(disk_path / "state") as host:
        yield host


def test_a_guest_lives_through_an_update(host: Host) -> None:
    guest = host.tenant()
    guest.start()
    guest.speak(5)
    host.kexec()
    host.reboot()
    guest.start()
    guest.whole()
    assert host.session("vm1.1")["state"] == "finished"
