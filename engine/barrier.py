# SPDX-License-Identifier: Apache-2.0
"""The barrier: may the update go on, must it wait, or must it stop. Pure.

Two barriers stand before a kexec: `preserved` (everybody has preserved, still running) and `ready` (everybody has stopped). A session
that cannot follow is judged by its policy: a `required` one stops the update, an `optional` one is dropped and reported, a
`best-effort` one is dropped. Times are seconds on any one clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..states.fold import Session
from ..states.table import SessionState as S

PASSED = {
    "preserved": (S.PRESERVED, S.READY),
    "ready": (S.READY,),
}
_GONE = (S.ABORTED, S.LOST, S.EXPIRED, S.FINISHED, S.FAILED)


class Trouble(NamedTuple):
    """A session that does not follow, and why."""

    session: str
    why: str


class Verdict(NamedTuple):
    """What the barrier says: `go` with these sessions, or stop because of `abort`, else wait until `wake`.

    `drop` are the sessions to be undone now because their policy lets the update go on without them. `wake` is the earliest deadline
    that could change the answer, infinite where there is none.
    """

    go: tuple[str, ...] | None
    drop: tuple[Trouble, ...]
    abort: str
    wake: float


def judge(
    barrier: str,
    sessions: Sequence[Session],
    *,
    now: float,
    since: float,
    deadline: float,
    is_gone: Callable[[Session], bool],
) -> Verdict:
    """Judge a barrier over `sessions`.

    `since` is when the barrier was put up, `deadline` the end of the whole update; a session's own `deadline_s` counts from `since`.
    `is_gone` says whether the process that must still act for a session has died.
    """
    drop: list[Trouble] = []
    going: list[str] = []
    abort, wake, waiting = "", deadline, False
    for session in sessions:
        own = since + session.deadline_s if session.deadline_s > 0 else deadline
        why = ""
        if session.state in _GONE:
            why = f"it is {session.state}"
        elif session.nack is not None:
            why = f"its client refused: {session.nack.errno} {session.nack.message}".rstrip()
        elif session.abort_reason:
            why = session.abort_reason
        elif session.state in PASSED[barrier]:
            going.append(session.id)
        elif is_gone(session):
            why = "its client died"
        elif now >= min(own, deadline):
            why = f"its client was not {barrier} in time"
        else:
            waiting = True
            wake = min(wake, own)
        if why and session.policy == "required":
            abort = abort or f"{session.id}: {why}"
        elif why:
            drop.append(Trouble(session.id, why))
    if abort:
        return Verdict(None, tuple(drop), abort, wake)
    if waiting:
        return Verdict(None, tuple(drop), "", wake)
    return Verdict(tuple(going), tuple(drop), "", wake)
