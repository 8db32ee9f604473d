# SPDX-License-Identifier: Apache-2.0
"""How a program inside the lab guest tells the host what it found: result lines, and readiness.

Outside a guest both do nothing but print, so that a program can be tried anywhere. Standard library only: imports are slow there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from ..adapters.notify import tell_ready
from .guest import REPORT_VARIABLE

LONGEST_LINE = 32768
"""Bytes that virtio-serial takes as one message; two programs that report at once must not cut each other's lines."""


def emit(event: str, **fields: Any) -> None:
    """Send one result line: an event of the run, with this boot's number. Texts are cut to keep the line within its limit."""
    fields = {key: value[-6000:] if isinstance(value, str) else value for key, value in fields.items()}
    boot = int(os.environ.get("LUOD_LAB_BOOT", "0"))
    line = {
        "event": event,
        "boot": boot,
        "uptime": round(time.clock_gettime(time.CLOCK_BOOTTIME), 3),
        **fields,
    }
    data = json.dumps(line).encode() + b"\n"
    if len(data) > LONGEST_LINE:
        raise ValueError(f"a result line of {len(data)} bytes is over {LONGEST_LINE}: {data[:80]!r}")
    fd = os.environ.get(REPORT_VARIABLE)
    os.write(int(fd) if fd else sys.stdout.fileno(), data)


def ready() -> None:
    """Say READY=1 to whoever started this program."""
    tell_ready(None)
