# SPDX-License-Identifier: Apache-2.0
"""Print the docs page on the state machines."""

from __future__ import annotations

import sys

from .render import page

if __name__ == "__main__":
    sys.stdout.write(page())
