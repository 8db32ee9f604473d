# SPDX-License-Identifier: Apache-2.0
"""Hold one session `kept` with 64 MiB in it, until the machine is taken away."""

from __future__ import annotations

import signal
import sys

from raw import create, memfd, preserve

from luod.lab.report import ready


def main() -> int:
    preserve(create("kept"), 1, memfd(b"k" * (64 << 20)))
    ready()
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
