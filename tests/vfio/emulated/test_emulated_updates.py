# SPDX-License-Identifier: Apache-2.0
"""Whole updates of guests with passthrough devices: luod, a keeper, VMMs, and an emulated kernel with and without the proposed handlers."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated_vmm import DEVICE, SPACE, Running, in_new_kernel, in_old_kernel
from luod_world import World, new_world
from passthrough_host import PHASE_ONE, PLUGIN

FIRST, SECOND = "0000:00:04.0", "0000:00:05.0"
DEVICES = (f"vfio0,bdf={FIRST}", f"vfio1,bdf={SECOND}")
KINDS = {
    "preserve": ["memfd", "iommufd", "vfio"],
    "reattach": ["memfd", "iommufd-reopened", "vfio-reattached"],
}


@pytest.fixture
def world(disk_path: Path) -> Iterator[World]:
    with new_world(disk_path / "state", handlers=(PLUGIN,), devices=DEVICES) as made:
        yield made


def session(world: World, name: str) -> dict[str, Any]:
    with world.client() as link:
        found: dict[str, Any] = link.session(name)["session"]
        return found


def kexec(world: World) -> None:
    with world.client() as admin:
        world.kexec(admin)


def go_over(world: World, vmm: Running, outcome: str = "preserve") -> None:
    """Update, with a VMM that takes part, until it is buried in the new kernel."""
    assert vmm.heard("subscribed")["dma"]
    kexec(world)
    assert vmm.heard("preserved") == {"at": "preserved", "outcome": outcome, "kinds": KINDS[outcome]}
    vmm.heard("ready")
    world.next_boot()
    vmm.buried()


def comes_back(world: World, vmm: Running) -> None:
    """See a VMM restore all of its guest, to its end."""
    assert vmm.heard("open")["steps"][0] == "0x10/memfd.retrieve"
    assert vmm.heard("finished") == {"at": "finished", "dma": True, "proof": True}
    assert vmm.end() == 0
    assert session(world, "vm")["state"] == "finished"


def test_a_device_goes_through_two_updates(world: World) -> None:
    """Restored by its plan, it is what the next update carries: the second one is asked for in the new kernel by a new VMM."""
    for _ in range(2):
        go_over(world, in_old_kernel(world, "vm", FIRST))
        assert world.control.state()["devices"]["vfio0"]["arrived"]
        comes_back(world, in_new_kernel(world, "vm", FIRST))
    state = world.control.state()["devices"]["vfio0"]
    assert (state["arrived"], state["bound"], state["faults"]) == (False, None, [])


def test_a_device_that_fails_fails_its_session_only(world: World) -> None:
    world.control.bind("vfio0", "", at_boot=True)
    bad, good = in_old_kernel(world, "bad", FIRST), in_old_kernel(world, "good", SECOND)
    for vmm in (bad, good):
        vmm.heard("subscribed")
    kexec(world)
    world.next_boot()
    for vmm in (bad, good):
        vmm.buried()
    bad, good = in_new_kernel(world, "bad", FIRST), in_new_kernel(world, "good", SECOND)
    bad.heard("open"), good.heard("open")
    failed = bad.heard("failed")
    assert (failed["step"], failed["errno"]) == (f"{DEVICE}/vfio.retrieve", "ENODEV")
    assert "vfio-pci" in failed["message"] + failed["hint"]
    assert good.heard("finished")["dma"]
    assert bad.end() == 0
    assert good.end() == 0
    seen = session(world, "bad")
    assert seen["state"] == "failed"
    text = str(seen)
    assert "vfio.retrieve" in text
    assert "ENODEV" in text
    # Its session is still there, in luod's hands and the keeper's, with everything that could be retrieved.
    assert [one["name"] for one in world.control.state()["incoming"] if one["state"] == "retrieved"] == [
        "luod.bad.1"
    ]
    assert session(world, "good")["state"] == "finished"


@pytest.mark.parametrize(
    ("op", "step", "errno_name"),
    [
        ("VFIO_DEVICE_BIND_IOMMUFD", f"{DEVICE}/vfio.bind", "EPERM"),
        ("IOMMU_IOAS_MAP_FILE", f"{SPACE}/iommufd.map_file#0x100000", "ENOMEM"),
        ("IOMMU_HWPT_LU_RESTORE", f"{DEVICE}/iommufd.hwpt_restore", "ENOMEM"),
    ],
)
def test_a_step_that_failed_can_be_made_again(world: World, op: str, step: str, errno_name: str) -> None:
    """What the kernel refuses once and not for ever: a VMM that is started again goes on where the other one stopped."""
    go_over(world, in_old_kernel(world, "vm", FIRST))
    world.control.inject("device", op=op, errno=getattr(errno, errno_name))
    vmm = in_new_kernel(world, "vm", FIRST)
    vmm.heard("open")
    failed = vmm.heard("failed")
    assert (failed["step"], failed["errno"]) == (step, errno_name)
    vmm.end()
    assert session(world, "vm")["state"] == "failed"
    with world.client() as admin:
        admin.resolve("vm.1", "retry")
    comes_back(world, in_new_kernel(world, "vm", FIRST))


def test_an_update_that_is_undone_leaves_a_working_device(world: World) -> None:
    vmm = in_old_kernel(world, "vm", FIRST)
    vmm.heard("subscribed")
    world.control.inject("reboot", errno=errno.EBUSY)
    kexec(world)
    vmm.heard("preserved")
    vmm.heard("ready")
    assert vmm.heard("resumed")["dma"]
    vmm.heard("aborted")
    assert vmm.end() == 0
    world.wait_record("update.aborted")
    go_over(world, in_old_kernel(world, "vm", FIRST))
    comes_back(world, in_new_kernel(world, "vm", FIRST))


# -- kernels that do not carry devices -----------------------------------------------------------------------------------------


def test_devices_are_reattached_where_no_handler_is(disk_path: Path) -> None:
    with new_world(disk_path / "state", devices=DEVICES) as world:
        go_over(world, in_old_kernel(world, "vm", FIRST, devices="reattach", own_tables=False), "reattach")
        comes_back(world, in_new_kernel(world, "vm", FIRST, devices="reattach"))


def test_without_that_policy_it_is_refused_with_what_to_do(disk_path: Path) -> None:
    with new_world(disk_path / "state", devices=DEVICES) as world:
        vmm = in_old_kernel(world, "vm", FIRST, own_tables=False)
        vmm.heard("subscribed")
        kexec(world)
        nacked = vmm.heard("nacked")
        assert nacked["kind"] == "NoHandler"
        assert "no live-update handler for iommufd" in nacked["message"]
        assert "reattach" in nacked["hint"]
        assert vmm.heard("resumed")["dma"]
        vmm.heard("aborted")
        assert vmm.end() == 0
        assert world.control.state()["boot"] == 1


def test_a_shared_page_table_is_named_before_the_device_is_asked_for(world: World) -> None:
    vmm = in_old_kernel(world, "vm", FIRST, own_tables=False)
    vmm.heard("subscribed")
    kexec(world)
    nacked = vmm.heard("nacked")
    assert nacked["kind"] == "OrderViolated"
    assert "own_tables" in nacked["hint"]
    assert vmm.heard("resumed")["dma"]
    vmm.heard("aborted")
    vmm.end()


def test_with_phase_one_the_session_stays_open(disk_path: Path) -> None:
    """An iommufd goes over and does not come back: its session fails, says so, and is kept."""
    with new_world(disk_path / "state", handlers=(PHASE_ONE,), devices=DEVICES) as world:
        go_over(world, in_old_kernel(world, "vm", FIRST))
        vmm = in_new_kernel(world, "vm", FIRST)
        vmm.heard("open")
        failed = vmm.heard("failed")
        assert (failed["step"], failed["errno"]) == (f"{SPACE}/iommufd.retrieve", "EOPNOTSUPP")
        assert vmm.end() == 0
        assert session(world, "vm")["state"] == "failed"
