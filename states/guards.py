# SPDX-License-Identifier: Apache-2.0
"""The guards of the table: pure predicates over the folded record, the event and where it was recorded.

A guard never asks the world; what it needs to know is in the record. Each takes (record, event, at).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Guard = Callable[[Any, Any, Any], bool]


def undoubted(record: Any, _event: Any, _at: Any) -> bool:
    """No effect of this stream is without an outcome."""
    return not record.doubts()


def not_aborting(record: Any, _event: Any, _at: Any) -> bool:
    """Nobody has asked to undo it."""
    return not record.abort_reason


def may_reboot(record: Any, event: Any, at: Any) -> bool:
    """Neither in doubt nor being undone."""
    return undoubted(record, event, at) and not_aborting(record, event, at)


def same_boot(record: Any, _event: Any, at: Any) -> bool:
    """Recorded in the boot in which it was said to be rebooting."""
    return bool(record.reboot_boot_id == at.boot_id)


def other_boot(record: Any, _event: Any, at: Any) -> bool:
    """Recorded in another boot than the last one of the old kernel that this record speaks of."""
    if record.reboot_boot_id:
        return bool(record.reboot_boot_id != at.boot_id)
    boots = [entered.boot_id for entered in record.entered.values()]
    return bool(boots) and boots[-1] != at.boot_id


def every_step(record: Any, _event: Any, _at: Any) -> bool:
    """Every step of every restore plan has a good outcome."""
    return not record.open_steps()


GUARDS: dict[str, Guard] = {
    guard.__name__: guard
    for guard in (undoubted, not_aborting, may_reboot, same_boot, other_boot, every_step)
}
