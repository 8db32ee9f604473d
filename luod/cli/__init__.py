# SPDX-License-Identifier: Apache-2.0
"""`luoctl`: control, inspection and post-mortem of live updates."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `luoctl` script."""
    from .program import run

    sys.exit(run(sys.argv[1:]))
