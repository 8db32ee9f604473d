# SPDX-License-Identifier: Apache-2.0
"""The state machines, as data. Everything that says what may follow what lives in this file.

Two machines share one shape. A *session* is one client's attempt to carry its memory over one kexec; an *update* is one attempt to
replace the kernel and holds the barrier over its sessions. A row reads: when `event` happens in one of `sources`, and `guard` (a
name in `guards.py`) agrees, the state becomes `dest`. A row whose `dest` is `SAME` records a fact without moving.

From these rows are made, and by a test proved equal: the `transitions` machine that judges new events, the dictionary that folds old
ones, and the picture and the table in the docs (`python -m luod.states`). `new` and `idle` are where a stream begins, before
its first event; they are never a destination after it, except that `bound` leaves a session in `new`.

Which states mean what, for a session:

    old kernel   new --> created --> preserved <--> ready --> rebooting
    new kernel                                                    `--> retrieved --> restored --> finished
    ends         finished; aborted (undone before the kexec); lost (the world no longer holds it);
                 expired (never claimed or given up). `failed` keeps its fds and waits for the operator.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class SessionState(StrEnum):
    """Where a session stands."""

    NEW = "new"
    CREATED = "created"
    PRESERVED = "preserved"
    READY = "ready"
    REBOOTING = "rebooting"
    RETRIEVED = "retrieved"
    RESTORED = "restored"
    FINISHED = "finished"
    ABORTED = "aborted"
    LOST = "lost"
    FAILED = "failed"
    EXPIRED = "expired"


OUTGOING = (SessionState.CREATED, SessionState.PRESERVED, SessionState.READY)
"""The kernel of this boot holds the session, and may still be told to let go of it."""
UNFINISHED = (SessionState.REBOOTING, SessionState.RETRIEVED, SessionState.RESTORED, SessionState.FAILED)
"""The session came from an earlier boot and waits for its client: another kexec would destroy it."""


class UpdateState(StrEnum):
    """Where an update stands."""

    IDLE = "idle"
    PREPARING = "preparing"
    ARMED = "armed"
    REBOOTING = "rebooting"
    RECOVERING = "recovering"
    DONE = "done"
    ABORTED = "aborted"
    LOST = "lost"


SAME = "="


class Row(NamedTuple):
    """One line of a table; `guard` empty means none."""

    event: str
    sources: tuple[str, ...]
    dest: str
    guard: str
    meaning: str


class Table(NamedTuple):
    """One machine: its name, its states, where it starts, where it ends, and its rows."""

    name: str
    states: tuple[str, ...]
    initial: str
    final: tuple[str, ...]
    rows: tuple[Row, ...]


_S = SessionState
_BEFORE = (_S.CREATED, _S.PRESERVED, _S.READY)

# fmt: off
SESSION = Table("session", tuple(_S), _S.NEW, (_S.FINISHED, _S.ABORTED, _S.LOST, _S.EXPIRED), (
    Row("bound",           (_S.NEW,),                       _S.NEW,       "",             "a client took the id; its owner is fixed"),
    Row("created",         (_S.NEW,),                       _S.CREATED,   "undoubted",    "in the kernel, with a second holder"),
    Row("preserved",       (_S.CREATED,),                   _S.PRESERVED, "not_aborting", "the client preserved everything, still running"),
    Row("ready",           (_S.CREATED, _S.PRESERVED),      _S.READY,     "not_aborting", "the client stopped its writers"),
    Row("thawed",          (_S.READY,),                     _S.PRESERVED, "",             "the client was told to go on"),
    Row("rebooting",       (_S.READY,),                     _S.REBOOTING, "may_reboot",   "last word of the old kernel"),
    Row("reboot_refused",  (_S.REBOOTING,),                 _S.READY,     "same_boot",    "the kernel refused; nothing moved"),
    Row("retrieved",       (*_BEFORE, _S.REBOOTING),        _S.RETRIEVED, "other_boot",   "held again, in the new kernel"),
    Row("step",            (_S.RETRIEVED,),                 SAME,         "",             "a step of a restore plan has an outcome"),
    Row("restored",        (_S.RETRIEVED,),                 _S.RESTORED,  "every_step",   "every step of every plan succeeded"),
    Row("finished",        (_S.RESTORED,),                  _S.FINISHED,  "",             "FINISH ran; the memory is the client's own"),
    Row("nacked",          _BEFORE,                         SAME,         "",             "the client cannot follow"),
    Row("abort_requested", (_S.NEW, *_BEFORE),              SAME,         "",             "the session is being undone"),
    Row("aborted",         (_S.NEW, *_BEFORE),              _S.ABORTED,   "undoubted",    "undone before the kexec"),
    Row("lost",            (*_BEFORE, _S.REBOOTING, _S.RETRIEVED, _S.RESTORED, _S.FAILED),
                                                            _S.LOST,      "other_boot",   "the world no longer holds it"),
    Row("failed",          (_S.RETRIEVED, _S.RESTORED),     _S.FAILED,    "",             "a part could not be restored; fds are kept"),
    Row("retried",         (_S.FAILED,),                    _S.RETRIEVED, "",             "the operator lets the client try again"),
    Row("expired",         (_S.REBOOTING, _S.RETRIEVED, _S.RESTORED, _S.FAILED),
                                                            _S.EXPIRED,   "other_boot",   "never claimed, or given up"),
))

_U = UpdateState
UPDATE = Table("update", tuple(_U), _U.IDLE, (_U.DONE, _U.ABORTED, _U.LOST), (
    Row("started",         (_U.IDLE,),                      _U.PREPARING, "",             "clients are asked to preserve"),
    Row("armed",           (_U.PREPARING,),                 _U.ARMED,     "not_aborting", "the barrier is passed"),
    Row("disarmed",        (_U.ARMED,),                     _U.PREPARING, "",             "luod was restarted; the clients run again"),
    Row("rebooting",       (_U.ARMED,),                     _U.REBOOTING, "may_reboot",   "the last record before the kexec"),
    Row("refused",         (_U.REBOOTING,),                 _U.ARMED,     "same_boot",    "the kernel refused the kexec"),
    Row("recovering",      (_U.REBOOTING,),                 _U.RECOVERING, "other_boot",  "luod runs in the new kernel"),
    Row("done",            (_U.RECOVERING,),                _U.DONE,      "",             "every session has reached its end"),
    Row("abort_requested", (_U.PREPARING, _U.ARMED),        SAME,         "",             "the update is being undone"),
    Row("aborted",         (_U.PREPARING, _U.ARMED),        _U.ABORTED,   "",             "undone; the clients run"),
    Row("lost",            (_U.PREPARING, _U.ARMED, _U.REBOOTING, _U.RECOVERING),
                                                            _U.LOST,      "other_boot",   "the machine came back another way"),
))
# fmt: on

TABLES = (SESSION, UPDATE)
EFFECT_TRIGGERS = ("intended", "outcome", "voided")
"""Effect events belong to any stream and never move its state; `fold.py` keeps them."""


def lookup(table: Table) -> dict[tuple[str, str], tuple[str, str]]:
    """Return `{(state, event): (next state, guard name)}` of a table, `SAME` resolved."""
    return {
        (source, row.event): (source if row.dest == SAME else row.dest, row.guard)
        for row in table.rows
        for source in row.sources
    }


SESSION_NEXT = lookup(SESSION)
UPDATE_NEXT = lookup(UPDATE)
