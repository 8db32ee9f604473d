# SPDX-License-Identifier: Apache-2.0
"""Read what the tiny guest says on its serial port, and hold it to what a guest that lived through an update must say.

No step is lost or repeated, there is one boot, no word of memory is wrong, and it is the same guest all along. The reader does no I/O:
it is fed bytes as they come, cut anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_BANNER = re.compile(r"tinyguest boot seed (\d+) memory (\d+) hz (\d+) chunk (\d+)")
_TICK = re.compile(r"tick (\d+) pass (\d+) bad (\d+) seed (\d+)")


@dataclass
class SerialLog:
    """Everything that one guest has said so far.

    `seed` is the guest expected, None takes the first that speaks. `findings` says what is wrong, in the order of the log; `last` is
    the number of the newest tick, 0 before the first; `memory_kib` is what the guest found at boot.
    """

    seed: int | None = None
    boots: int = 0
    first: int = 0
    last: int = 0
    ticks: int = 0
    passes: int = 0
    bad: int = 0
    memory_kib: int = 0
    findings: list[str] = field(default_factory=list[str])
    _rest: bytes = b""

    def feed(self, data: bytes) -> None:
        """Take in more of the log. A line counts when its end has come."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line.decode("ascii", "backslashreplace").rstrip("\r"))

    def _line(self, line: str) -> None:
        if banner := _BANNER.fullmatch(line):
            self._boot(*map(int, banner.groups()))
        elif tick := _TICK.fullmatch(line):
            self._tick(*map(int, tick.groups()))
        elif line:
            self.findings.append(f"after tick {self.last}: not a line of the guest: {line!r}")

    def _boot(self, seed: int, memory_kib: int, _hz: int, _chunk: int) -> None:
        self.boots += 1
        self.memory_kib = memory_kib
        if self.boots > 1:
            self.findings.append(f"after tick {self.last}: booted again")
        elif self.ticks:
            self.findings.append(f"after tick {self.last}: booted")
        self._same(seed)

    def _tick(self, number: int, passes: int, bad: int, seed: int) -> None:
        if not self.ticks:
            self.first = number
            if self.boots and number != 1:
                self.findings.append(f"the first tick after the boot is {number}")
        elif number <= self.last:
            self.findings.append(f"tick {number} after tick {self.last}: repeated")
        elif number != self.last + 1:
            self.findings.append(f"tick {number} after tick {self.last}: {number - self.last - 1} lost")
        if passes < self.passes:
            self.findings.append(f"tick {number}: pass {passes} after pass {self.passes}")
        if bad != self.bad:
            self.findings.append(f"tick {number}: {bad - self.bad} more words of memory are wrong")
        self._same(seed)
        self.ticks += 1
        self.last, self.passes, self.bad = number, passes, bad

    def _same(self, seed: int) -> None:
        if self.seed is None:
            self.seed = seed
        elif seed != self.seed:
            self.findings.append(f"after tick {self.last}: another guest, seed {seed} instead of {self.seed}")
