# SPDX-License-Identifier: Apache-2.0
"""Which databases are journals, and of which layout; `schema` has the steps to it."""

from __future__ import annotations

APPLICATION_ID = 0x6C756F64
"""ASCII `luod`, at byte 68 of the file."""
VERSION = 1
"""The layout that this version writes."""
