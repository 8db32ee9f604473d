# SPDX-License-Identifier: Apache-2.0
"""Crash points: the numbered instants around every effect at which a process may be made to die.

A point is named `<effect key>:<stage>`. In service nothing listens. A crash test traces the points of a clean run and then runs once
per point with `kill_at` set, which ends the process by SIGKILL at that instant, as the kernel's out-of-memory killer would.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Stage = Literal["before_intent", "after_intent", "after_call", "after_outcome"]
STAGES: tuple[Stage, ...] = ("before_intent", "after_intent", "after_call", "after_outcome")
Points = Callable[[str, Stage], None]


def nowhere(_key: str, _stage: Stage) -> None:
    """Ignore every point: what runs in service."""


def injector(kill_at: str = "", trace: Path | None = None) -> Points:
    """Return points that append each name reached to `trace` and SIGKILL this process at the point named `kill_at`.

    The kill happens once per trace file: a restarted process that finds the point already in the trace goes on.
    """
    if not kill_at and trace is None:
        return nowhere

    def reached(key: str, stage: Stage) -> None:
        name = f"{key}:{stage}"
        seen = trace is not None and trace.exists() and name in trace.read_text().splitlines()
        if trace is not None:
            with trace.open("a") as file:
                file.write(name + "\n")
        if name == kill_at and not seen:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached
