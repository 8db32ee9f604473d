# SPDX-License-Identifier: Apache-2.0
"""A VMM that dies while its devices are restored: at every point of every step, and started again each time.

The walk dies at every point once, one death after the other, in one restoration; the matrix has a restoration of its own for each point,
and the four points of a step at the same time, by four guests on one machine.
What the emulated kernel was asked is its audit; nothing may have been made twice there.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
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

ADDRESSES = tuple(f"0000:00:{slot:02x}.0" for slot in range(4, 8))
DEVICES = tuple(f"vfio{place},bdf={address}" for place, address in enumerate(ADDRESSES))
# A process that is killed leaves as much in memory as on a disk, and nothing here dies by losing power.
IN_MEMORY = next(path for path in (Path("/dev/shm"), Path(tempfile.gettempdir())) if path.is_dir())
NUMBERS = itertools.count(1)
ONCE = {
    "preserve": (
        "IOMMU_IOAS_ALLOC", "IOMMU_IOAS_MAP_FILE", "VFIO_DEVICE_BIND_IOMMUFD", "IOMMU_HWPT_LU_RESTORE",
        "IOMMU_HWPT_ALLOC", "IOMMU_HWPT_LIVEUPDATE_MARK_PRESERVE",
    ),
    "reattach": ("IOMMU_IOAS_ALLOC", "IOMMU_IOAS_MAP_FILE", "VFIO_DEVICE_BIND_IOMMUFD"),
}  # fmt: skip
MODES = [(devices, kept) for devices in ("preserve", "reattach") for kept in (True, False)]


class Arrival:
    """A session with a guest's memory and devices that has come through a jump, held by this process."""

    def __init__(self, world: World, name: str, devices: str, kept: bool, addresses: tuple[str, ...]) -> None:
        self.world = world
        self.name = name
        self.devices = devices
        self.lasting = kept or devices == "preserve"
        self.files = {f"vfio{ADDRESSES.index(one)}" for one in addresses}
        self._address, *also = addresses
        journal = IN_MEMORY / world.dir.name / f"{name}.{next(NUMBERS)}" / "journal.db"
        self._options: dict[str, Any] = {
            "devices": devices, "own_tables": devices == "preserve", "kept": kept, "journal": journal, "also": tuple(also)
        }  # fmt: skip
        self._pids: set[int] = set()

    def vmm(self, pipe: int, points: Points = nowhere) -> EmulatedVmm:
        return EmulatedVmm(self.world, self.name, self._address, pipe, points=points, **self._options)

    def leave(self, session: int) -> Running:
        """Have a VMM of the old kernel preserve everything."""
        return Running(lambda pipe: self.vmm(pipe).preserve_only(session))

    def left(self, old: Running) -> None:
        """Wait until it has."""
        heard = old.heard("preserved")
        assert heard["dma"]
        self.fields = heard["resources"]

    def arrived(self, session: int) -> None:
        self.session = session
        self._before = len(self.world.control.audit())

    def begin(self, points: Points = nowhere) -> Running:
        """Run the plans in a new process."""
        running = Running(lambda pipe: self.vmm(pipe, points).restore_only(self.session, self.fields))
        self._pids.add(running.pid)
        return running

    def restore(self, points: Points = nowhere) -> dict[str, Any] | None:
        """The same; what it says, or None when it was killed."""
        return ended(self.begin(points))

    def calls(self) -> list[dict[str, Any]]:
        """What the processes of this guest have asked the new kernel for."""
        audit = self.world.control.audit()[self._before :]
        return [call for call in audit if call["pid"] in self._pids]

    def judge(self, found: dict[str, Any] | None) -> None:
        """See that everything is restored, and that nothing of it was made twice."""
        assert found is not None
        assert found["dma"]
        assert found["proof"]
        count = len(self.files)
        tables = 2 * count if self.devices == "preserve" else count
        assert [len(ids) for ids in found["objects"]] == [1, count, tables]
        calls = self.calls()
        assert [call["op"] for call in calls if call["op"] == "FINISH"] == ["FINISH"]
        binds = [call for call in calls if call["op"] == "VFIO_DEVICE_BIND_IOMMUFD"]
        assert {call["file"] for call in binds} == self.files
        assert self.lasting <= (len(binds) == count), "a device that was kept open was bound twice"
        last = [call for call in calls if call["op"] == "IOMMU_IOAS_ALLOC"][-1]["file"]
        for op in ONCE[self.devices]:
            # Without a keeper and a session that hold it, every process has an iommufd of its own.
            made = [call for call in calls if call["op"] == op and call["file"] in {last, *self.files}]
            expected = 1 if "IOAS" in op else count
            made = made if self.lasting else made[-expected:]
            assert len(made) == expected, (op, made)


def ended(running: Running) -> dict[str, Any] | None:
    """Wait for a process that restores; what it says, or None when it was killed."""
    found = running.next_report()
    code = running.end()
    assert code == (0 if found else -signal.SIGKILL), code
    return found


Guests = Sequence[tuple[str, ...]]
"""Their devices, each by its address."""
ONE_GUEST: Guests = [ADDRESSES[:1]]


@contextmanager
def arrivals(world: World, devices: str, kept: bool, guests: Guests = ONE_GUEST) -> Iterator[list[Arrival]]:
    """Take guests over one jump, all at once: what a guest costs is mostly waiting for others, and so is shared."""
    made = [Arrival(world, f"vm{place}", devices, kept, one) for place, one in enumerate(guests)]
    world.control.cold_reboot()  # a test that went wrong on purpose may have left devices that nobody restored
    with ExitStack() as stack:
        if kept:
            stack.callback(world.start_keeper(forked=True).end)
        sessions = [world.kernel.create_session(one.name) for one in made]
        try:
            old = [one.leave(session) for one, session in zip(made, sessions, strict=True)]
            for one, running in zip(made, old, strict=True):
                one.left(running)
        finally:
            for session in sessions:
                os.close(session)
        world.kernel.load(KexecImage(world.image, None, CMDLINE))
        world.control.kexec()
        for running in old:
            running.buried()
        if kept:
            assert world.keeper is not None
            world.keeper.wait()
            stack.callback(world.start_keeper(forked=True).end)
        for one in made:
            one.arrived(world.kernel.retrieve_session(one.name))
            stack.callback(os.close, one.session)
        yield made


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, World]]:
    """One whose kernel carries devices and one whose kernel does not; they are shared, since every arrival begins with a new boot."""
    with ExitStack() as stack:
        found = {}
        for devices, handlers in (("preserve", (PLUGIN,)), ("reattach", ())):
            state = tmp_path_factory.mktemp(devices)
            found[devices] = world = stack.enter_context(
                new_world(state, boot=False, handlers=handlers, devices=DEVICES)
            )
            stack.callback(shutil.rmtree, IN_MEMORY / world.dir.name, ignore_errors=True)
        yield found


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


@pytest.mark.parametrize(
    ("devices", "kept"),
    [
        ("preserve", False),
        ("reattach", True),
        pytest.param("preserve", True, marks=pytest.mark.lab),
        pytest.param("reattach", False, marks=pytest.mark.lab),
    ],
)
def test_a_walk_of_deaths(machines: dict[str, World], tmp_path: Path, devices: str, kept: bool) -> None:
    with arrivals(machines[devices], devices, kept) as (arrived,):
        trace = tmp_path / "deaths"
        trace.touch()
        found = None
        while found is None:
            found = arrived.restore(first_times(trace))
        arrived.judge(found)
        names = trace.read_text().splitlines()
        steps = [f"{one['token']}/{step['step']}" for one in arrived.fields for step in one["plan"]]
        for step in steps:
            stages = {name.rpartition(":")[2] for name in names if name.startswith(f"vm0/plan/{step}:")}
            # What was made and not recorded is believed when its probe finds it, so that it has no outcome to die after; and memory
            # that the process itself has mapped is its own, so that it has no process to change.
            call = set() if "change_process" in step else {"after_call"}
            assert stages >= {"before_intent", "after_intent", *call}, (step, stages)


@pytest.mark.timeout(300)
def test_page_tables_of_two_devices_are_told_apart(machines: dict[str, World], tmp_path: Path) -> None:
    """Each of a process that died is found again by its place among all of them."""
    with arrivals(machines["preserve"], "preserve", False, [ADDRESSES[:2]]) as (arrived,):
        found = None
        trace = tmp_path / "deaths"
        trace.touch()
        while found is None:
            found = arrived.restore(first_times(trace, "hwpt"))
        arrived.judge(found)
        assert len(trace.read_text().splitlines()) >= 3 * 2 * 2
        attached = [call for call in arrived.calls() if call["op"] == "VFIO_DEVICE_ATTACH_IOMMUFD_PT"]
        tables = {call["file"]: call["argument"]["pt_id"] for call in attached}
        assert tables.keys() == {"vfio0", "vfio1"}
        assert tables["vfio0"] != tables["vfio1"]


def planned(devices: str) -> list[str]:
    found = plans(guest_with(ADDRESSES[0], own_tables=devices == "preserve"), devices)  # type: ignore[arg-type]
    return [f"{one.token}/{step.step}" for one in found for step in one.plan]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("devices", "kept", "step"),
    [(devices, kept, step) for devices, kept in MODES for step in planned(devices)],
)
def test_one_death(machines: dict[str, World], tmp_path: Path, devices: str, kept: bool, step: str) -> None:
    """A guest for each point of the step: they die at the same time and are restored at the same time."""
    with arrivals(machines[devices], devices, kept, [(one,) for one in ADDRESSES]) as arrived:
        points = [
            injector(f"{one.name}/plan/{step}:{stage}", tmp_path / stage)
            for stage, one in zip(STAGES, arrived, strict=True)
        ]

        def together() -> list[dict[str, Any] | None]:
            running = [one.begin(each) for one, each in zip(arrived, points, strict=True)]
            return [ended(each) for each in running]

        assert together() == [None] * len(STAGES), f"not all died at their points, {STAGES}"
        for stage, one, found in zip(STAGES, arrived, together(), strict=True):
            print(f"{one.name} had died at {stage}")
            one.judge(found)


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
    machines: dict[str, World],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: str,
    kept: bool,
    step: str,
    broken: str,
    lie: Callable[[object, object], Done | Absent],
) -> None:
    """One death after the call, and a process that is told wrong about what the dead one has left."""
    with arrivals(machines[devices], devices, kept) as (arrived,):
        points = injector(f"vm0/plan/{step}:after_call", tmp_path / "trace")
        assert arrived.restore(points) is None
        monkeypatch.setattr(f"luod.devices.steps.{broken}", lie)
        with pytest.raises(AssertionError):
            arrived.judge(arrived.restore(points))
