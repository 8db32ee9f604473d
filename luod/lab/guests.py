# SPDX-License-Identifier: Apache-2.0
"""QEMU guests in a lab machine through a real kexec: `luoctl lab demo --qemu`.

The lab machine is the host: it runs luod, its keeper, and for each guest `luo-qemu` with a real QEMU, which it emulates in turn. In the
second boot the same commands are started again, with the newer QEMU first on the PATH where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..demo.guest_command import add_guests
from ..demo.guests import MIB, GuestReport, GuestSetting, SerialPort, qemu_command, report
from ..journal.replay import Replay
from ..timeline import Story
from ..tinyguest import image as tinyguest
from .accel import acceleration, qemu
from .errors import LabUnavailable
from .images import KernelImage
from .machine import Machine
from .outcome import LabRun
from .qemus import Qemu, available_qemus
from .script import STATE, Boot, Step, python, run
from .update import LUOD_STATE, RUN, judge, keeper, luod, order

PATIENCE_S = 600.0
SERIALS = STATE / "serials"
MARKS = STATE / "marks.json"
KERNEL = STATE / "tinyguest"
SLOW = 10
"""By how much the lab machine is slower than the machine that it runs on, in timeouts."""
GUEST_MIB = 8
"""Memory of a guest in a lab machine: it checks all of it, on a processor that is emulated twice."""
OWN_MIB = 192
"""What a QEMU needs beside the memory of its guest."""


@dataclass(frozen=True)
class Crossing:
    """From which QEMU to which an update takes the guests."""

    old: Qemu
    new: Qemu

    def __str__(self) -> str:
        return f"QEMU {self.old.version} -> {self.new.version}"


def crossing() -> Crossing:
    """Return the oldest and the newest QEMU there are that know how to keep a guest's memory in place (8.2 and later)."""
    qemu()  # says how to get one where there is none
    found = [one for one in available_qemus() if one.numbers >= (8, 2)]
    if not found:
        raise LabUnavailable(
            "no QEMU here can keep a guest's memory in place",
            hint="run .ci/install-qemu, or `luoctl lab fetch-qemu`",
        )
    return Crossing(found[0], found[-1])


def luo_qemu(name: str, binary: Path, command: Sequence[str | Path], *options: str, first: bool) -> Step:
    """Start a guest under luo-qemu: the same command in both boots, but for where its QEMU is found.

    In the first boot the next step waits until it runs and luod knows it.
    """
    arguments = (
        "--name", name, "--socket", RUN / "liveupdate.sock", "--run", RUN / name, "--state", STATE / "guests" / name,
        "--slow", str(SLOW), *(("--ready-fd", "5") if first else ()), *options, "--", *command,
    )  # fmt: skip
    path = f"{binary.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return python(
        name, "luod.qemu.command", *arguments, stays=True, ready_fd=5 if first else 0, cgroup=name,
        environment={"PATH": path}, timeout_s=PATIENCE_S,
    )  # fmt: skip


def guest(number: int, binary: Path, setting: GuestSetting, *options: str, first: bool) -> Step:
    """Start a tiny guest under luo-qemu."""
    name = f"vm{number}"
    command = qemu_command("qemu-system-x86_64", SERIALS / f"{name}.serial", KERNEL, number, setting)
    return luo_qemu(name, binary, command, *options, first=first)


def ticks(what: str, guests: int, *more: str | Path) -> Step:
    """Wait for what the guests say, or mark how far they are."""
    where = ("--serials", SERIALS, "--guests", str(guests))
    return python(f"ticks-{what}", "luod.lab.ticks", what, *where, *more, timeout_s=PATIENCE_S)


def guest_script(
    image: KernelImage,
    across: Crossing,
    *,
    guests: int,
    setting: GuestSetting,
    options: Callable[[int], Sequence[str]] = lambda _: (),
) -> list[Boot]:
    """Return the two boots of an update to `image` with `guests` guests."""
    numbers = range(guests)
    directories = run("directories", ["/bin/mkdir", "-p", RUN, SERIALS, STATE / "guests"])
    # What a guest says after luod has had files written back is on no disk at the jump: without this the last lines would be missing.
    synced = run("synced", ["/usr/bin/env", "chattr", "+S", SERIALS])
    first = [
        directories, synced, keeper(), luod(), *(guest(n, across.old.binary, setting, *options(n), first=True) for n in numbers),
        ticks("until", guests, "--ticks", str(setting.before)), order(image, clients=guests),
    ]  # fmt: skip
    copy = run("keep-journal", ["/bin/cp", "-a", LUOD_STATE, STATE / "luod-after-boot-0"])
    second = [
        directories, copy, ticks("mark", guests, "--marks", MARKS), keeper(), luod(),
        *(guest(n, across.new.binary, setting, *options(n), first=False) for n in numbers),
        done(), ticks("until", guests, "--marks", MARKS),
    ]  # fmt: skip
    return [Boot(first), Boot(second)]


def done() -> Step:
    """Wait until the update has ended."""
    return python(
        "done", "luod.cli", "--socket", RUN / "liveupdate.sock", "wait", "--json", timeout_s=PATIENCE_S
    )


def lab_guests(
    kernel: KernelImage,
    next_kernel: KernelImage,
    directory: Path,
    *,
    guests: int = 2,
    setting: GuestSetting | None = None,
    across: Crossing | None = None,
    options: Callable[[int], Sequence[str]] = lambda _: (),
    timeout_s: float = 1200.0,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], LabRun]:
    """Take guests through a real kexec; return the demo's result object with `guests`, and the run.

    Raises `LabRunFailed` when a step failed and `LabUnavailable` when the lab cannot run here.
    """
    setting = setting or GuestSetting(mib=GUEST_MIB, hz=5, ticks_of_a_pass=24, before=4)
    across = across or crossing()
    machine = Machine(
        kernel, directory, memory_mib=1536 + guests * (2 * setting.mib + OWN_MIB), state_mib=256,
        accel=acceleration(kernel, parallel=True),
    )  # fmt: skip
    script = guest_script(next_kernel, across, guests=guests, setting=setting, options=options)
    outcome = machine.run(
        script, timeout_s=timeout_s, files={"tinyguest": tinyguest.IMAGE}, on_event=on_event
    ).check()
    told = judge(outcome, kernel, next_kernel)
    reports = guest_reports(outcome, guests, setting.mib * MIB)
    told["kernel"] = f"{told['kernel']}, {across}"
    told["bytes_verified"] = sum(one.bytes for one in reports)
    told["detail"]["problems"] = [f"{one.name}: {text}" for one in reports for text in one.findings]
    with Replay(outcome.file("luod/journal.db")) as replay:
        course = Story(replay).course()
    return add_guests(told, reports, course), outcome


def guest_reports(
    outcome: LabRun, guests: int, memory: int, *, marks: Sequence[tuple[int, int]] = ()
) -> list[GuestReport]:
    """Judge the guests of a run by their serial logs and by how far they were when the new kernel came.

    `marks`, the last tick and pass of each guest before it, are those that the run has noted, unless given.
    """
    noted: Sequence[tuple[int, int]] = marks or json.loads(outcome.file("marks.json").read_text("ascii"))
    found: list[GuestReport] = []
    for number, (last, passes) in enumerate(noted[:guests]):
        log = SerialPort(outcome.file(f"serials/vm{number}.serial"), number + 1).look()
        found.append(report(f"vm{number}", log, last, passes, memory))
    return found
