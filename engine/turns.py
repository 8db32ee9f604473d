# SPDX-License-Identifier: Apache-2.0
"""Turns: who is stopped next, and who may come back now. Pure: a function of the sessions of one update.

A session's `order` is its client's hint. A lower one is stopped before the others and comes back after them: a storage daemon that says 10
is stopped when the guests that use it stand still, and runs again before they do. Equal orders go together, as many at a time as the
limit allows; a limit of 0 is none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ..states.fold import Session
from ..states.table import SessionState as S

_WAITING = (S.CREATED, S.PRESERVED, S.READY, S.REBOOTING)


def to_freeze(going: Sequence[Session], asked: Collection[str], limit: int) -> list[Session]:
    """Return the sessions to be told now to freeze; `asked` are those that were told already."""
    running = [one for one in going if one.state == S.PRESERVED]
    lowest = min((one.order for one in running), default=0)
    turn = [one for one in running if one.order == lowest]
    fresh = [one for one in turn if one.id not in asked]
    return fresh[: max(limit - (len(turn) - len(fresh)), 0)] if limit else fresh


def may_restore(session: Session, others: Iterable[Session], coming: Collection[str], limit: int) -> bool:
    """Say whether a session may be retrieved now. `coming` are those that may already and are not retrieved yet."""
    busy = 0
    for one in others:
        if one.id == session.id:
            continue
        if one.order > session.order and one.state in (*_WAITING, S.RETRIEVED):
            return False
        busy += one.state == S.RETRIEVED or (one.id in coming and one.state in _WAITING)
    return not limit or busy < limit
