# SPDX-License-Identifier: Apache-2.0
"""A VMM that dies while its devices are restored: at every point of every step, and started again each time.

The walk dies at every point once, one death after the other, in one restoration; the matrix has a restoration of its own for each point.
What the emulated kernel was asked is its audit; nothing may have been made twice there.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from emulated_vmm import EmulatedVmm, Running, guest_with
from luod_world import CMDLINE, World, new_world
from passthrough_host import PLUGIN

from luod.devices.guest import plans
from luod.engine.points import STAGES, Points, injector, nowhere
from luod.engine.ports import Absent, Done, KexecImage

ADDRESS, SECOND = "0000:00:04.0", "0000:00:05.0"
DEVICES = (f"vfio0,bdf={ADDRESS}", f"vfio1,bdf={SECOND}")
ONCE = {
    "preserve": (
        "IOMMU_IOAS_ALLOC", "IOMMU_IOAS_MAP_FILE", "VFIO_DEVICE_BIND_IOMMUFD", "IOMMU_HWPT_LU_RESTORE",
        "IOMMU_HWPT_ALLOC", "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE",
    ),
    "reattach": ("IOMMU_IOAS_ALLOC", "IOMMU_IOAS_MAP_FILE", "VFIO_DEVICE_BIND_IOMMUFD", "IOMMU_HWPT_ALLOC"),
}  # fmt: skip
MODES = [(devices, kept) for devices in ("preserve", "reattach") for kept in (True, False)]


class Arrival:
    """A session with a guest's memory and devices that has come through a jump, held by this process."""

    def __init__(self, world: World, devices: str, kept: bool, also: tuple[str, ...] = ()) -> None:
        self.world = world
        self.count = 1 + len(also)
        journal = Path(tempfile.mkdtemp(dir=world.dir)) / "journal.db"
        self.options: dict[str, Any] = {"devices": devices, "kept": kept, "journal": journal, "also": also}
        if kept and world.keeper is None:
            world.start_keeper()
        session = world.kernel.create_session("vm")
        try:
            old = Running(lambda pipe: self.vmm(pipe).preserve_only(session))
            heard = old.heard("preserved")
            assert heard["dma"]
            self.fields = heard["resources"]
        finally:
            os.close(session)
        world.kernel.load(KexecImage(world.image, None, CMDLINE))
        world.control.kexec()
        old.buried()
        if world.keeper is not None:
            world.keeper.wait()
            world.start_keeper()
        self.session = world.kernel.retrieve_session("vm")
        self.before = len(world.control.audit())

    def vmm(self, pipe: int, points: Points = nowhere) -> EmulatedVmm:
        return EmulatedVmm(self.world, "vm", ADDRESS, pipe, points=points, **self.options)

    def restore(self, points: Points = nowhere) -> dict[str, Any] | None:
        """Run the plans in a new process; what it says, or None when it was killed."""
        running = Running(lambda pipe: self.vmm(pipe, points).restore_only(self.session, self.fields))
        found = running.next_report()
        code = running.end()
        assert code == (0 if found else -signal.SIGKILL), code
        return found

    def judge(self, found: dict[str, Any] | None) -> None:
        """See that everything is restored, and that nothing of it was made twice."""
        assert found is not None
        assert found["dma"]
        assert found["proof"]
        carried = self.options["devices"] == "preserve"
        count = self.count
        assert [len(ids) for ids in found["objects"]] == [1, count, count * (1 + carried)]
        calls = self.world.control.audit()[self.before :]
        assert [call["op"] for call in calls if call["op"] == "FINISH"] == ["FINISH"]
        lasting = carried or self.options["kept"]
        binds = [call for call in calls if call["op"] == "VFIO_DEVICE_BIND_IOMMUFD"]
        assert lasting <= (len(binds) == count), "a device that was kept open was bound twice"
        last = [call for call in calls if call["op"] == "IOMMU_IOAS_ALLOC"][-1]["file"]
        for op in ONCE[self.options["devices"]]:
            # Without a keeper and a session that hold it, every process has an iommufd of its own.
            made = [call for call in calls if call["op"] == op and call["file"] in (last, "vfio0", "vfio1")]
            expected = 1 if "IOAS" in op else count
            made = made if lasting else made[-expected:]
            assert len(made) == expected, (op, made)


@contextmanager
def arrivals(
    directory: Path, devices: str, kept: bool, also: tuple[str, ...] = ()
) -> Iterator[Callable[[], Arrival]]:
    """Make arrivals, one after the other, on one machine."""
    handlers = (PLUGIN,) if devices == "preserve" else ()
    with (
        new_world(directory / "state", boot=False, handlers=handlers, devices=DEVICES) as world,
        ExitStack() as stack,
    ):

        def arrive() -> Arrival:
            stack.close()
            made = Arrival(world, devices, kept, also)
            stack.callback(os.close, made.session)
            return made

        yield arrive


def first_times(trace: Path, among: str = "") -> Points:
    """Points that kill this process at each of them that no process has reached before; only at those with `among` in their names."""

    def reached(key: str, stage: str) -> None:
        name = f"{key}:{stage}"
        if among in name and name not in trace.read_text().splitlines():
            with trace.open("a") as file:
                file.write(name + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


@pytest.fixture(autouse=True)
def few_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe asks for every id that a plan may have made, and each of these calls goes to another process and back here."""
    monkeypatch.setattr("luod.devices.steps.OBJECT_IDS", range(1, 12))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("devices", "kept"),
    [
        ("preserve", False),
        ("reattach", True),
        pytest.param("preserve", True, marks=pytest.mark.lab),
        pytest.param("reattach", False, marks=pytest.mark.lab),
    ],
)
def test_a_walk_of_deaths(disk_path: Path, devices: str, kept: bool) -> None:
    with arrivals(disk_path, devices, kept) as arrive:
        arrived = arrive()
        trace = disk_path / "deaths"
        trace.touch()
        found = None
        while found is None:
            found = arrived.restore(first_times(trace))
        arrived.judge(found)
        names = trace.read_text().splitlines()
        steps = [f"{one['token']}/{step['step']}" for one in arrived.fields for step in one["plan"]]
        for step in steps:
            stages = {name.rpartition(":")[2] for name in names if name.startswith(f"vm/plan/{step}:")}
            # What was made and not recorded is believed when its probe finds it, so that it has no outcome to die after; and memory
            # that the process itself has mapped is its own, so that it has no process to change.
            call = set() if "change_process" in step else {"after_call"}
            assert stages >= {"before_intent", "after_intent", *call}, (step, stages)


@pytest.mark.timeout(120)
def test_page_tables_of_two_devices_are_told_apart(disk_path: Path) -> None:
    """Each of a process that died is found again by its place among all of them."""
    with arrivals(disk_path, "preserve", False, (SECOND,)) as arrive:
        arrived, found = arrive(), None
        trace = disk_path / "deaths"
        trace.touch()
        while found is None:
            found = arrived.restore(first_times(trace, "hwpt"))
        arrived.judge(found)
        assert len(trace.read_text().splitlines()) >= 3 * 2 * 2
        attached = [
            call
            for call in arrived.world.control.audit()[arrived.before :]
            if call["op"] == "VFIO_DEVICE_ATTACH_IOMMUFD_PT"
        ]
        tables = {call["file"]: call["argument"]["pt_id"] for call in attached}
        assert tables.keys() == {"vfio0", "vfio1"}
        assert tables["vfio0"] != tables["vfio1"]


def planned(devices: str) -> list[str]:
    found = plans(guest_with(ADDRESS), devices)  # type: ignore[arg-type]
    return [f"{one.token}/{step.step}" for one in found for step in one.plan]


@pytest.mark.lab
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("devices", "kept", "step"),
    [(devices, kept, step) for devices, kept in MODES for step in planned(devices)],
)
def test_one_death(disk_path: Path, devices: str, kept: bool, step: str) -> None:
    with arrivals(disk_path, devices, kept) as arrive:
        for stage in STAGES:
            arrived = arrive()
            points = injector(f"vm/plan/{step}:{stage}", disk_path / stage)
            assert arrived.restore(points) is None, f"it was to die {stage}"
            arrived.judge(arrived.restore(points))


def nowhere_to_be_found(_self: object, _args: object) -> Absent:
    return Absent()


def always_there(_self: object, _args: object) -> Done:
    return Done({})


@pytest.mark.parametrize(
    ("devices", "kept", "step", "broken", "lie"),
    [
        ("preserve", False, "0x20/iommufd.ioas_alloc", "SpaceSteps.ioas_there", nowhere_to_be_found),
        ("preserve", False, "0x30/vfio.bind", "DeviceSteps.bound", nowhere_to_be_found),
        ("preserve", False, "0x30/iommufd.hwpt_alloc", "SpaceSteps.hwpt_there", nowhere_to_be_found),
        ("preserve", False, "0x30/vfio.trigger#MSI", "DeviceSteps.irqs_on", always_there),
        ("reattach", True, "0x30/vfio.bind", "SpaceSteps.had", nowhere_to_be_found),
    ],
)
def test_a_probe_that_lies_is_noticed(
    disk_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: str,
    kept: bool,
    step: str,
    broken: str,
    lie: Callable[[object, object], Done | Absent],
) -> None:
    """One death after the call, and a process that is told wrong about what the dead one has left."""
    with arrivals(disk_path, devices, kept) as arrive:
        arrived = arrive()
        points = injector(f"vm/plan/{step}:after_call", disk_path / "trace")
        assert arrived.restore(points) is None
        monkeypatch.setattr(f"luod.devices.steps.{broken}", lie)
        with pytest.raises(AssertionError):
            arrived.judge(arrived.restore(points))
