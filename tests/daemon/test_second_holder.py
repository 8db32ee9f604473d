# SPDX-License-Identifier: Apache-2.0
"""What the second holder turns out to have already is not kept open once more."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

from luod.daemon.second_holder import SecondHolder


def test_a_copy_that_came_to_both_meanwhile_is_closed() -> None:
    """luod compares with names asked for a moment before; the fd that it then gets is its own to close."""
    mine, copy = os.pipe()
    stored: list[str] = []
    there: dict[str, int | None] = {"luod.both": copy, "luod.mine": None}
    held = SimpleNamespace(settled=threading.Lock(), has=lambda _: True, get=lambda _: mine)
    custody = SimpleNamespace(get=there.get, store=lambda name, _: stored.append(name))
    luod: Any = SimpleNamespace(held=held, custody=custody)
    try:
        SecondHolder(luod)._give(["luod.both", "luod.mine"])
        assert stored == ["luod.mine"]
        assert not os.path.exists(f"/proc/self/fd/{copy}"), "the copy is still open"
    finally:
        os.close(mine)
