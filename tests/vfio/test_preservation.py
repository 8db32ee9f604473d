# SPDX-License-Identifier: Apache-2.0
"""What the policy of a session makes of a kernel without handlers for devices: an emulated one that carries memory only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from luod.adapters import memfd
from luod.adapters.chardev import SystemCalls
from luod.adapters.emulator.process import Emulator
from luod.adapters.kernel import open_kernel
from luod.adapters.vfio.pci import PciDevices
from luod.devices.guest import Device, Guest, Mapping, Memory, Space, plans
from luod.devices.host import Host
from luod.devices.preservation import NoHandler, Preservation, support
from luod.devices.rules import OrderViolated
from luod.states.names import parse_token

GUEST = Guest(
    (Memory("0x10", 4096),),
    (Space("0x20", (Mapping("0x10", 0, 4096),)),),
    (Device("0x30", "0000:00:04.0", "0x20"),),
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host with a session, memory, and files of kinds that no handler takes in the places of iommufd and device."""
    with Emulator.start(tmp_path):
        made = Host(SystemCalls(), open_kernel("emulated", directory=tmp_path), PciDevices())
        made.session_fd = made.kernel.create_session("vm")
        ram = made.fds.keep("0x10", memfd.create("ram", 4096))
        memfd.seal_for_preservation(ram)
        for token in ("0x20", "0x30"):
            made.fds.keep(token, os.eventfd(0))
        yield made
        made.fds.close()
        os.close(made.session_fd)


def preservation(host: Host, devices) -> Preservation:
    unused: object = None
    return Preservation(unused, host, "vm", GUEST, devices=devices)  # type: ignore[arg-type]


def preserved(host: Host) -> list[str]:
    return [
        token
        for token in ("0x10", "0x20", "0x30")
        if host.kernel.token_preserved(host.session_fd, parse_token(token))
    ]


def test_a_session_that_must_preserve_devices_says_why_it_cannot(host: Host) -> None:
    asked = preservation(host, "preserve")
    with pytest.raises(NoHandler) as caught:
        asked.preserve()
    assert caught.value.errno == "ENOENT"
    assert caught.value.token == "0x20"
    assert os.uname().release in caught.value.message
    assert "iommufd" in caught.value.message
    assert 'devices="reattach"' in caught.value.hint
    assert preserved(host) == ["0x10"]


def test_a_session_that_may_reattach_carries_its_memory_and_says_what_became_of_the_rest(host: Host) -> None:
    asked = preservation(host, "reattach")
    for _ in range(2):
        assert asked.preserve() == plans(GUEST, "reattach")
    assert asked.outcome == "reattach"
    assert preserved(host) == ["0x10"]


def test_a_rule_is_broken_before_the_kernel_is_asked(host: Host) -> None:
    host.fds.keep("0x10", memfd.create("unsealed", 4096))
    with pytest.raises(OrderViolated, match="not sealed"):
        preservation(host, "reattach").preserve()
    assert preserved(host) == []


def test_asking_what_a_kernel_carries_leaves_nothing_behind(host: Host) -> None:
    iommufd, ram = host.fds.own("0x20"), host.fds.own("0x10")
    assert iommufd is not None
    assert ram is not None
    for _ in range(2):
        found = support(host.kernel, "iommufd", iommufd)
        assert not found.carried
        assert "no live-update handler for iommufd" in found.detail
    host.kernel.preserve_fd(host.session_fd, 0x10, ram)
    assert support(host.kernel, "iommufd", ram).detail.startswith("the handler answers:")
