# SPDX-License-Identifier: Apache-2.0
"""Say what the kernel port finds in this boot: whether the device can be used, and whether a session `kept` came over."""

from __future__ import annotations

import sys
from pathlib import Path

from luod.adapters.liveupdate.device import LiveUpdate
from luod.adapters.liveupdate.errors import KernelError
from luod.adapters.liveupdate.syscalls import RealSyscalls
from luod.lab.report import emit


def main() -> int:
    kernel = LiveUpdate(RealSyscalls())
    status = kernel.status()
    try:
        kernel.retrieve_session("kept")
        error = ""
    except KernelError as failure:
        error = type(failure).__name__
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    free_kib = int(memory["MemAvailable"].split()[0])
    emit("look", state=status.state, detail=status.detail, hint=status.hint, error=error, free_kib=free_kib)
    return 0


if __name__ == "__main__":
    sys.exit(main())
