# SPDX-License-Identifier: Apache-2.0
"""The world: the kernel and its emulator, memory files, and the second holder of session fds."""

from __future__ import annotations

if __package__ != "luod.adapters":  # a second copy of every class, which no `except` and no type would match
    raise ImportError("import luod.adapters, not adapters")
