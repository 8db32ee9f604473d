# SPDX-License-Identifier: Apache-2.0
"""Decide and drive: commands become events, effects are intended, made, probed and reconciled."""

from __future__ import annotations

if __package__ != "luod.engine":  # a second copy of every class, which no `except` and no type would match
    raise ImportError("import luod.engine, not engine")
