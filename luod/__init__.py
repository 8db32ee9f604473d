# SPDX-License-Identifier: Apache-2.0
"""Live updates for Linux hosts that survive anything."""

from __future__ import annotations

__version__ = "0.1.0"
