# SPDX-License-Identifier: Apache-2.0
"""The rehearsal of a start: what would become of a command line, and whether a guest that runs now would come back with it.

After an update luo-qemu is started with whatever its unit says by then, and refuses what would build another machine: the guest
stands still until somebody has put that right. `luo-qemu --check` finds it while the guest runs, and asks the QEMU of the next start
what it can do, so that this is not asked in the blackout.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from ..adapters.qemu.arguments import running
from ..adapters.qemu.errors import NotThatQemu
from ..adapters.qemu.process import identity
from ..journal.errors import JournalMissing
from ..journal.replay import Replay
from ..states.codec import decode
from ..states.events import EffectOutcome
from .plan import Changed, Plan, Return


class Rehearsal(msgspec.Struct, frozen=True):
    """What was found. `runs` says whether a guest of this name runs; `differences` are what makes its machine another one.

    `comes_back` says whether an update now would bring it back, by `argv`; `as_saved`, that this is what it was started with, and not what
    was given.
    """

    name: str
    argv: tuple[str, ...]
    notes: tuple[str, ...]
    runs: bool
    differences: tuple[str, ...] = ()
    as_saved: bool = False
    comes_back: bool = False


def rehearse(name: str, command: list[str], state: Path, changed: Changed = "refuse") -> Rehearsal:
    """See what would become of a command line; `state` is the guest's directory, if it has one.

    Raises `NotAdaptable`, `NotACommandLine` and `QemuUnusable`.
    """
    notes: list[str] = []
    mine = os.access(state, os.R_OK | os.W_OK | os.X_OK)
    if not mine and state.exists():
        notes.append(f"whether {name} runs cannot be seen: {state} is another user's")
    words = running_argv(state) if mine else []
    plan = Plan(command, state if mine else None, changed)
    back = plan.returning(running(words)) if words else Return(plan.adapted())
    adapted = back.adapted
    argv = adapted.argv({one.id: 3 + number for number, one in enumerate(adapted.ram)}, Path("qmp.sock"))
    return Rehearsal(
        name, tuple(argv), (*adapted.notes, *notes), bool(words), back.changes, back.as_saved,
        comes_back=bool(words) and (back.as_saved or not back.changes),
    )  # fmt: skip


def running_argv(state: Path) -> list[str]:
    """Return the command line of the QEMU that a guest has now; empty where it has none."""
    try:
        with Replay(state / "journal.db") as replay:
            bodies = [decode(one.type, one.body) for one in replay if one.type.startswith("effect.outcome.")]
    except JournalMissing:
        return []
    started = [
        one.result for one in bodies if isinstance(one, EffectOutcome) and one.result and "argv" in one.result
    ]
    if not started:
        return []
    newest = started[-1]
    return (
        [str(word) for word in newest["argv"]] if _lives(int(newest["pid"]), int(newest["started"])) else []
    )


def _lives(pid: int, started: int) -> bool:
    """Say whether this very process runs; a dead one that nobody has waited for has no command line any more."""
    try:
        return identity(pid).started == started and bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (NotThatQemu, FileNotFoundError, ProcessLookupError):
        return False
