# SPDX-License-Identifier: Apache-2.0
"""What happened and what may follow: events, tables, guards and folds; no input or output."""

from __future__ import annotations

if __package__ != "luod.states":  # a second copy of every class, which no `except` and no type would match
    raise ImportError("import luod.states, not states")
