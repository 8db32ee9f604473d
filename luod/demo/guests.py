# SPDX-License-Identifier: Apache-2.0
"""The guests of a demo: tiny guests in real QEMUs, each under `luo-qemu`, and what they say on their serial ports."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ..states.errors import LuodError
from ..tinyguest.serial import SerialLog

MIB = 1 << 20
LOOK_S = 0.02
"""How often a serial log is looked at for more."""


class GuestSetting(msgspec.Struct, frozen=True):
    """What the guests are: how much memory, how often they tick, and how much of it they check each time."""

    mib: int = 16
    hz: int = 20
    ticks_of_a_pass: int = 16
    """After so many ticks a guest has checked all of its memory once more."""
    before: int = 20
    """How many ticks are awaited before the update is ordered."""

    @property
    def chunk_kib(self) -> int:
        """What a guest checks in each tick, in KiB."""
        return max(4, self.mib * 1024 // self.ticks_of_a_pass)


def qemu_command(
    qemu: str, serial: Path, kernel: Path, number: int, setting: GuestSetting, *more: str
) -> list[str]:
    """Return a usual QEMU command line for guest `number`, with nothing in it that knows of live updates."""
    words = f"seed={number + 1} hz={setting.hz} chunk={setting.chunk_kib}"
    return [
        qemu, "-machine", "q35", "-accel", "tcg", "-m", f"{setting.mib}M", "-nodefaults", "-no-user-config", "-display", "none",
        "-chardev", f"file,id=serial,path={serial},append=on", "-serial", "chardev:serial",
        "-kernel", str(kernel), "-append", words, *more,
    ]  # fmt: skip


class SerialPort:
    """Follows the serial log of one guest, which is a file that only grows."""

    def __init__(self, path: Path, seed: int | None = None) -> None:
        self.path = path
        self.log = SerialLog(seed)
        self._read = 0

    def look(self) -> SerialLog:
        """Take in what has come since, and return the log."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
            self._read += len(data)
            self.log.feed(data)
        return self.log

    def until_tick(
        self, tick: int, passes: int, patience_s: float, *, give_up: Callable[[], str] = str
    ) -> SerialLog:
        """Wait until the guest has come to a tick and has been over its memory so often; return its log.

        Raises `LuodError` when it has not in time, or when `give_up` gives a reason why it never will.
        """
        deadline = time.monotonic() + patience_s
        while (log := self.look()).last < tick or log.passes < passes:
            why = give_up()
            if why or time.monotonic() > deadline:
                said = f"it is at tick {log.last}, pass {log.passes}"
                raise LuodError(f"{self.path.name}: tick {tick}, pass {passes} did not come: {why or said}")
            time.sleep(LOOK_S)
        return self.log

    def until_boots(self, boots: int, patience_s: float) -> SerialLog:
        """Wait until the guest has booted so often; return its log. Raises `LuodError` when it has not in time."""
        deadline = time.monotonic() + patience_s
        while (log := self.look()).boots < boots:
            if time.monotonic() > deadline:
                raise LuodError(f"{self.path.name}: boot {boots} did not come")
            time.sleep(LOOK_S)
        return log


class GuestReport(msgspec.Struct, frozen=True):
    """What one guest has to show after an update."""

    name: str
    ticks: int
    last_before: int
    last: int
    passes: int
    bytes: int
    """Its memory, once it has checked all of it after the update; 0 before."""
    findings: tuple[str, ...]


def report(name: str, log: SerialLog, last_before: int, passes_before: int, memory: int) -> GuestReport:
    """Judge a guest: every step once and in order, one boot, no wrong word, and all of its memory checked since the update."""
    findings = list(log.findings)
    if log.boots != 1:
        findings.append(f"{log.boots} boots")
    if log.last <= last_before:
        findings.append(f"no tick after {last_before}")
    # The pass that was under way at the update counts from its beginning; the second one after it saw everything.
    checked = log.passes >= passes_before + 2 and not log.bad
    if not checked:
        findings.append(
            f"its memory was not checked whole: pass {passes_before} before, {log.passes} now, {log.bad} words wrong"
        )
    return GuestReport(
        name, log.ticks, last_before, log.last, log.passes, memory if checked else 0, tuple(findings)
    )


def draw_guests(reports: Sequence[GuestReport]) -> str:
    """Return a line for each guest: how far it counted before and after, and what is wrong with it."""
    width = max((len(one.name) for one in reports), default=0)
    lines = [
        f"{one.name:<{width}}  counted 1 .. {one.last_before} | {one.last_before + 1} .. {one.last}, "
        + ("no step lost or repeated, memory intact" if not one.findings else "; ".join(one.findings[:3]))
        for one in reports
    ]
    return "\n".join(lines) + "\n"
