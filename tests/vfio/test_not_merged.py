# SPDX-License-Identifier: Apache-2.0
"""Calls that are only proposed are made where the kernel is known to speak them, and never on a real one: their numbers may mean anything.

The seam here is that of a real kernel, with what is asked of it written down instead of done.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from luod.adapters import memfd, proposed
from luod.adapters.chardev import SystemCalls
from luod.adapters.emulator.device_files import EmulatedDeviceFiles
from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator
from luod.adapters.iommufd import liveupdate
from luod.adapters.kernel import open_kernel
from luod.adapters.passthrough_errors import NotMerged
from luod.adapters.vfio.pci import PciDevices
from luod.devices.guest import Device, Guest, Mapping, Memory, Space, plans
from luod.devices.host import Host
from luod.devices.preservation import Preservation, set_up
from luod.devices.restoration import Restoration, plan_engine
from luod.engine.plan import StepFailed
from luod.states.errors import LuodError

PLUGIN = "luod.adapters.emulator.passthrough:add"


class Recorded(SystemCalls):
    """A real kernel's files, of which nothing is opened and nothing is asked."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def open(self, path: str) -> int:
        self.calls.append(path)
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def ioctl(self, fd: int, request: int, argument: Any = 0, **more: Any) -> int:
        self.calls.append(request)
        return 0


def guest(*, own_tables: bool) -> Guest:
    return Guest(
        (Memory("0x10", 4096),),
        (Space("0x20", (Mapping("0x10", 0, 4096),), own_tables=own_tables),),
        (Device("0x30", "0000:00:04.0", "0x20"),),
    )


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Sealed memory, a session, and nothing open of the devices."""
    with Emulator.start(tmp_path / "emu"):
        made = Host(Recorded(), open_kernel("emulated", directory=tmp_path / "emu"), PciDevices(sys=tmp_path))
        made.session_fd = made.kernel.create_session("vm")
        memfd.seal_for_preservation(made.fds.keep("0x10", memfd.create("ram", 4096)))
        yield made
        made.fds.close()
        os.close(made.session_fd)


@contextmanager
def nothing_touched(host: Host, call: str) -> Iterator[None]:
    """What is inside must be refused for that call, with no file opened, no ioctl made and nothing preserved."""
    with pytest.raises(NotMerged) as caught:
        yield
    error = caught.value
    assert isinstance(error, LuodError)
    assert (error.operation, error.errno_name) == (call, "EOPNOTSUPP")
    assert "0x30/iommufd." in error.message
    assert "0000:00:04.0" in error.message
    assert "only proposed" in error.message
    assert os.uname().release in error.message
    assert 'devices="reattach"' in error.hint
    assert isinstance(host.files, Recorded)
    assert host.files.calls == []
    assert host.fds.names() == ["0x10"]
    assert not host.kernel.token_preserved(host.session_fd, 0x10)


MARK, RESTORE = "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE", "IOMMU_HWPT_LU_RESTORE"


async def test_nothing_is_set_up_that_would_have_to_be_marked(tmp_path: Path, host: Host) -> None:
    async with plan_engine(tmp_path / "journal" / "journal.db", host) as engine:
        with nothing_touched(host, MARK):
            await set_up(engine, host, "vm", guest(own_tables=True))
        # The same guest without it comes as far as its first open.
        with pytest.raises(StepFailed, match=r"iommufd\.open"):
            await set_up(engine, host, "vm", guest(own_tables=False))
        assert host.files.calls == ["/dev/iommu"]  # type: ignore[attr-defined]


async def test_nothing_is_preserved_with_a_plan_that_cannot_be_made_here(tmp_path: Path, host: Host) -> None:
    async with plan_engine(tmp_path / "journal" / "journal.db", host) as engine:
        for devices in ("preserve", "reattach"):
            asked = Preservation(engine, host, "vm", guest(own_tables=True), devices=devices)  # type: ignore[arg-type]
            with nothing_touched(host, MARK):
                asked.preserve()
            with nothing_touched(host, MARK):
                await asked.resume()


async def test_nothing_is_restored_of_a_plan_from_another_kernel(tmp_path: Path, host: Host) -> None:
    async with plan_engine(tmp_path / "journal" / "journal.db", host) as engine:
        with nothing_touched(host, RESTORE):
            Restoration(engine, host, "vm", plans(guest(own_tables=True), "preserve"))
        Restoration(engine, host, "vm", plans(guest(own_tables=False), "reattach"))


def test_below_the_plans_too_no_such_number_reaches_a_real_kernel() -> None:
    seam = Recorded()
    for call in (
        lambda: liveupdate.mark_preserve(seam, 3, 1, 1),
        lambda: liveupdate.restore_hwpt(seam, 3, 1),
    ):
        with pytest.raises(NotMerged, match="EOPNOTSUPP"):
            call()
    assert seam.calls == []


class Speaking(Recorded):
    """What a kernel would be that has them: that the calls are missing above is the doing of the guard."""

    def speaks_proposed(self) -> bool:
        return True


def test_where_they_are_spoken_they_are_made() -> None:
    seam = Speaking()
    liveupdate.mark_preserve(seam, 3, 1, 1)
    liveupdate.restore_hwpt(seam, 3, 1)
    assert seam.calls == [proposed.REQUESTS[MARK], proposed.REQUESTS[RESTORE]]


def test_an_emulated_kernel_speaks_them_with_its_plug_ins_only(tmp_path: Path) -> None:
    for handlers, speaks in (((PLUGIN,), True), ((), False)):
        directory = tmp_path / str(speaks)
        with Emulator.start(directory, handlers=handlers) as emulator, emulator.control() as control:
            files = EmulatedDeviceFiles(directory)
            assert files.speaks_proposed() is speaks
            # It is the running kernel that is asked, not the machine.
            without = stub_image(tmp_path / "image", handlers={"iommufd": None, "vfio": None})
            control.cold_reboot(image=without)
            assert files.speaks_proposed() is False


def test_a_machine_that_is_off_is_not_taken_for_one_that_does_not_speak_them(tmp_path: Path) -> None:
    with Emulator.start(tmp_path):
        pass
    with pytest.raises(LuodError) as caught:
        liveupdate.require(EmulatedDeviceFiles(tmp_path), MARK, "of step 0x30/iommufd.mark_preserve")
    assert not isinstance(caught.value, NotMerged)
