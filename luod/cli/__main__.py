# SPDX-License-Identifier: Apache-2.0
"""`python -m luod.cli`: luoctl."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()
