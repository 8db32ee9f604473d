# SPDX-License-Identifier: Apache-2.0
"""What systemd says of a service, told from inside a lab machine.

service.py facts UNIT...     their states and the programs in their cgroups
service.py until UNIT TEXT   wait until its log has a line with TEXT
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from luod.lab.report import emit

PROPERTIES = ("MainPID", "NRestarts", "ActiveState", "SubState", "Result", "ControlGroup")


def facts(*units: str) -> None:
    """Emit what systemd knows of units, and which processes are in them: pid -> program."""
    for unit in units:
        facts_of(unit)


def facts_of(unit: str) -> None:
    """Do that for one unit."""
    shown = subprocess.run(
        ["systemctl", "show", "--property", ",".join(PROPERTIES), unit],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    known = dict(line.split("=", 1) for line in shown.stdout.splitlines())
    processes = {}
    group = Path(f"/sys/fs/cgroup{known['ControlGroup']}/cgroup.procs")
    if known["ControlGroup"] and group.exists():
        for pid in group.read_text().split():
            processes[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
    emit("unit", name=unit, processes=processes, **known)


def until(unit: str, text: str) -> None:
    """Wait for a line in the log of a unit."""
    with subprocess.Popen(
        ["journalctl", "--follow", "--lines=all", "--output=cat", "--unit", unit], stdout=subprocess.PIPE, text=True
    ) as journal:  # fmt: skip
        assert journal.stdout is not None
        for line in journal.stdout:
            if text in line:
                break
        journal.kill()


if __name__ == "__main__":
    {"facts": facts, "until": until}[sys.argv[1]](*sys.argv[2:])
