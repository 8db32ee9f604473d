# SPDX-License-Identifier: Apache-2.0
"""How a guest is started: by the command line that luo-qemu was given, or, when that has changed since, by the one it was saved with.

A unit may be edited while its guest runs: more memory, another network card, meant for the next cold start. What it says then builds
another machine, on which what was saved must not be loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from ..adapters.qemu.arguments import Adapted, NotAdaptable, adapt
from ..adapters.qemu.commandline import NotACommandLine
from ..adapters.qemu.compare import unlike
from ..adapters.qemu.probe import Capabilities, MachineUnknown, MachineUnversioned, probe
from ..states.errors import LuodError

Changed = Literal["refuse", "as-saved"]
"""What becomes of a guest whose command line builds another machine by now: nothing, or it is started as it was saved."""

_ANOTHER_MACHINE = (NotAdaptable, NotACommandLine, MachineUnknown, MachineUnversioned)


class Return(msgspec.Struct, frozen=True):
    """By what a guest comes back: the command line; what makes the one that was given another machine; which of the two it is."""

    adapted: Adapted
    changes: tuple[str, ...] = ()
    as_saved: bool = False


class Plan:
    """The user's command line, the directory in which answers of QEMU binaries are kept, and what is done about a change."""

    def __init__(self, command: list[str], cache: Path | None, changed: Changed = "refuse") -> None:
        self.command = command
        self.cache = cache
        self.changed: Changed = changed

    def capabilities(self) -> Capabilities:
        """Ask the binary. Raises `QemuUnusable`."""
        return probe(self.command[0], cache=self.cache)

    def adapted(self) -> Adapted:
        """Return the command line ready for a kexec. Raises `NotAdaptable`, `NotACommandLine` and `QemuUnusable`."""
        return adapt(self.command, self.capabilities())

    def returning(self, was: Adapted) -> Return:
        """Say by what a guest comes back that was started by `was`.

        Where a change is to be refused that is what was given, which `compare` then refuses. Raises as `adapted`; where the guest is to be
        started as it was saved, only `QemuUnusable`, for a binary that cannot do that.
        """
        capabilities = self.capabilities()
        sizes = {one.id: one.size for one in was.ram}
        try:
            given = adapt(self.command, capabilities, recorded_machine=was.hardware.machine)
            argv = given.argv({one.id: 0 for one in given.ram}, Path("qmp.sock"))
            changes = tuple(unlike(was.hardware, sizes, argv[1:]))
        except _ANOTHER_MACHINE as error:
            if self.changed == "refuse":
                raise
            given, changes = was, _reasons(error)
        if changes and self.changed == "as-saved":
            capabilities.pin(was.hardware.machine)
            return Return(msgspec.structs.replace(was, binary=self.command[0]), changes, as_saved=True)
        return Return(given, changes)


def _reasons(error: LuodError) -> tuple[str, ...]:
    """Return an error as one would say it in a list of changes."""
    found = error.obstacles if isinstance(error, NotAdaptable) else (error.message,)
    return tuple(str(each) for each in found)
