# SPDX-License-Identifier: Apache-2.0
"""Load the next kernel in a lab guest and jump into it, through the same adapter that luod uses.

python -m luod.lab.jump --kernel IMAGE [--append ARGUMENTS] [--load-only]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..adapters.liveupdate.device import LiveUpdate
from ..adapters.liveupdate.syscalls import RealSyscalls
from ..engine.ports import KexecImage
from ..states.errors import LuodError
from .script import DEFAULT_ARGUMENTS


def next_cmdline(current: str, append: str | None) -> str:
    """Build the next kernel's command line out of this one's: with `append` in place of what enables live updates.

    The lab's own part of the line is the same for every kernel; init and its arguments stand behind ` -- `.
    """
    if append is None:
        return current
    kernel, mark, init = current.partition(" -- ")
    words = [word for word in kernel.split() if word not in DEFAULT_ARGUMENTS.split()]
    return " ".join([*words, *append.split()]) + mark + init


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns only when it did not jump."""
    parser = argparse.ArgumentParser(prog="luod.lab.jump")
    parser.add_argument("--kernel", type=Path, required=True)
    parser.add_argument("--append")
    parser.add_argument("--load-only", action="store_true")
    options = parser.parse_args(argv)
    kernel = LiveUpdate(RealSyscalls())
    try:
        cmdline = next_cmdline(Path("/proc/cmdline").read_text("utf-8").strip(), options.append)
        kernel.load(KexecImage(options.kernel, None, cmdline))
        if options.load_only:
            return 0
        os.sync()
        kernel.kexec()
    except LuodError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
