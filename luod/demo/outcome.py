# SPDX-License-Identifier: Apache-2.0
"""What a run of the demo is asked for and what it has shown, and where its files are."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from ..journal.errors import JournalVolatile
from ..journal.volume import check
from ..states.errors import LuodError


class DemoFailed(LuodError):
    """The demo did not end as it must; the message says where, the hint where to look."""


class Setting(msgspec.Struct, frozen=True):
    """What one run is: how many sessions of how many bytes each, and where luod is to die."""

    sessions: int = 8
    size: int = 16 << 20
    kill_at: str = ""
    boot: int = 0
    """The boot in which luod is to die: 1 is the old kernel, 2 the new one, 0 whichever reaches the point first."""
    then_at: str = ""
    """Where the luod that was started in its place is to die as well, in the same boot."""
    operator: str = "again"
    """What the operator does with an update that waits for a person: `again` or `abort`."""
    refuse: bool = False
    """Whether the kernel refuses the kexec, so that everything must be rolled back."""

    @property
    def point(self) -> str:
        """The crash point as a person names it: `2:vm0.1/hand:after_call`."""
        first = f"{self.boot}:{self.kill_at}" if self.boot and self.kill_at else self.kill_at
        return f"{first} then {self.then_at}" if self.then_at else first


class Outcome(msgspec.Struct):
    """What one run has shown."""

    ending: str
    restarts: int = 0
    bytes_verified: int = 0
    points: list[str] = []
    recovery_points: list[str] = []
    """The crash points that the luod has reached that was started in place of the killed one, in the boot of the kill."""
    sessions: list[dict[str, Any]] = []
    update: dict[str, Any] | None = None
    audit: list[dict[str, Any]] = []
    held: dict[str, Any] = {}
    """What the emulated kernel holds in the end."""
    fds_before: dict[str, list[str]] = {}
    fds_after: dict[str, list[str]] = {}
    late_records: list[str] = []
    kernel: str = "emulated luo-v5"
    boots: list[str] = []


BOX = {
    "luod": Counter({"socket": 1, "/memfd:luod.ring (deleted)": 2}),  # held, and duplicated by its mapping
    "keeper": Counter({"socket": 1, "/memfd:luod.ring (deleted)": 1}),
}
"""What the black box of a boot that prepared an update costs each process."""


def leaked(outcome: Outcome) -> dict[str, Counter[str]]:
    """Return what luod and the keeper have open in the end beyond what they began with and the black box, by process."""
    found: dict[str, Counter[str]] = {}
    for name, after in outcome.fds_after.items():
        box = BOX[name] if len(outcome.boots) == 1 else Counter[str]()
        if extra := Counter(after) - Counter(outcome.fds_before[name]) - box:
            found[name] = extra
    return found


def is_volatile(place: Path) -> bool:
    """Say whether a journal in `place` would be forgotten by a power cut."""
    try:
        check(place)
    except JournalVolatile:
        return True
    return False


def workspace(parent: Path | None = None) -> Path:
    """Make a directory for a run, on a file system that keeps what is synced where there is one."""
    for place in (parent, Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()):
        if place is not None and os.access(place, os.W_OK) and not is_volatile(place):
            return Path(tempfile.mkdtemp(prefix="luod-demo-", dir=place))
    return Path(tempfile.mkdtemp(prefix="luod-demo-"))


def journal_of(directory: Path) -> Path:
    """Return the journal of a run."""
    return directory / "state" / "journal.db"


def discard(directory: Path) -> None:
    """Remove what a run has left."""
    shutil.rmtree(directory, ignore_errors=True)
