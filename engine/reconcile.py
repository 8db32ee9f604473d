# SPDX-License-Identifier: Apache-2.0
"""Reconciliation as data: what to do with what a dead process left, by what the world says now.

Three tables, each total: a test walks every combination and finds exactly one row. `*` matches anything.

*Effects*: an intent without an outcome, by boot and by the answer of its probe. *Sessions*: a state, by boot and by whether a second
holder (same boot) or the kernel's incoming side (other boot; known through the black box) has it. *Updates*: a state, by boot and by
what the black box said.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple

from ..states.table import OUTGOING
from ..states.table import SessionState as S
from ..states.table import UpdateState as U

Boot = Literal["same", "other"]
Answer = Literal["done", "absent", "unknown"]
Held = Literal["yes", "no", "unknown"]


class Action(StrEnum):
    """What reconciliation does with an effect in doubt."""

    ADOPT = "adopt"  # record it as done
    REDO = "redo"  # make the call again, as the next attempt
    DENY = "deny"  # record that it did not happen; who planned it decides
    VOID = "void"  # the world that held it is gone
    ASK = "ask"  # only a person knows: `luoctl resolve`


class SessionAction(StrEnum):
    """What reconciliation does with a session."""

    KEEP = "keep"  # nothing to do
    ADOPT = "adopt"  # take the fd from the second holder and go on
    THAW = "thaw"  # adopt, and tell the client to go on: nobody reboots without being asked again
    REFUSED = "refused"  # the kexec did not happen: back to ready, then thaw
    ABORT = "abort"  # it vanished with both holders, or never reached the kernel: undone
    AWAIT = "await"  # the kernel may hold it: it is retrieved when its client claims it
    LOST = "lost"  # the world no longer holds it


class UpdateAction(StrEnum):
    """What reconciliation does with an update."""

    KEEP = "keep"
    RESUME = "resume"  # go on towards the barrier
    DISARM = "disarm"  # clients run again; a person decides
    REFUSED = "refused"  # the kexec did not happen: undo everything
    RECOVER = "recover"  # the new kernel runs: hand the sessions back
    LOST = "lost"


class EffectRule(NamedTuple):
    """One row: effects whose kind is `carried` outlive a boot, `repeatable` ones may be made twice."""

    boot: Boot
    answer: str
    kind: Literal["repeatable", "once", "carried", "*"]
    action: Action


EFFECT_RULES: tuple[EffectRule, ...] = (
    EffectRule("same", "done", "*", Action.ADOPT),
    EffectRule("same", "absent", "repeatable", Action.REDO),
    EffectRule("same", "absent", "once", Action.REDO),
    EffectRule("same", "absent", "carried", Action.DENY),
    EffectRule("same", "unknown", "repeatable", Action.REDO),
    EffectRule("same", "unknown", "once", Action.ASK),
    EffectRule("same", "unknown", "carried", Action.ASK),
    EffectRule("other", "*", "repeatable", Action.VOID),
    EffectRule("other", "*", "once", Action.VOID),
    EffectRule("other", "*", "carried", Action.ADOPT),
)


class SessionRule(NamedTuple):
    """One row of what becomes of a session."""

    states: tuple[S, ...]
    boot: Boot
    held: str
    action: SessionAction


_ENDED = (S.FINISHED, S.ABORTED, S.LOST, S.EXPIRED)
_INCOMING = (S.RETRIEVED, S.RESTORED, S.FAILED)

SESSION_RULES: tuple[SessionRule, ...] = (
    SessionRule(_ENDED, "same", "*", SessionAction.KEEP),
    SessionRule(_ENDED, "other", "*", SessionAction.KEEP),
    SessionRule((S.NEW,), "same", "*", SessionAction.KEEP),
    SessionRule((S.NEW,), "other", "*", SessionAction.ABORT),
    SessionRule((S.CREATED, S.PRESERVED), "same", "yes", SessionAction.ADOPT),
    SessionRule((S.READY,), "same", "yes", SessionAction.THAW),
    SessionRule(OUTGOING, "same", "no", SessionAction.ABORT),
    SessionRule(OUTGOING, "same", "unknown", SessionAction.KEEP),
    SessionRule(OUTGOING, "other", "yes", SessionAction.AWAIT),
    SessionRule(OUTGOING, "other", "unknown", SessionAction.AWAIT),
    SessionRule(OUTGOING, "other", "no", SessionAction.LOST),
    SessionRule((S.REBOOTING,), "same", "*", SessionAction.REFUSED),
    SessionRule((S.REBOOTING,), "other", "yes", SessionAction.AWAIT),
    SessionRule((S.REBOOTING,), "other", "unknown", SessionAction.AWAIT),
    SessionRule((S.REBOOTING,), "other", "no", SessionAction.LOST),
    SessionRule(_INCOMING, "same", "yes", SessionAction.ADOPT),
    SessionRule(_INCOMING, "same", "no", SessionAction.LOST),
    SessionRule(_INCOMING, "same", "unknown", SessionAction.KEEP),
    SessionRule(_INCOMING, "other", "*", SessionAction.LOST),
)


class UpdateRule(NamedTuple):
    """One row of what becomes of an update."""

    states: tuple[U, ...]
    boot: Boot
    held: str
    action: UpdateAction


_UPDATE_ENDED = (U.IDLE, U.DONE, U.ABORTED, U.LOST)

UPDATE_RULES: tuple[UpdateRule, ...] = (
    UpdateRule(_UPDATE_ENDED, "same", "*", UpdateAction.KEEP),
    UpdateRule(_UPDATE_ENDED, "other", "*", UpdateAction.KEEP),
    UpdateRule((U.PREPARING,), "same", "*", UpdateAction.RESUME),
    UpdateRule((U.ARMED,), "same", "*", UpdateAction.DISARM),
    UpdateRule((U.REBOOTING,), "same", "*", UpdateAction.REFUSED),
    UpdateRule((U.RECOVERING,), "same", "*", UpdateAction.KEEP),
    UpdateRule((U.PREPARING, U.ARMED), "other", "*", UpdateAction.LOST),
    UpdateRule((U.REBOOTING,), "other", "yes", UpdateAction.RECOVER),
    UpdateRule((U.REBOOTING,), "other", "unknown", UpdateAction.RECOVER),
    UpdateRule((U.REBOOTING,), "other", "no", UpdateAction.LOST),
    UpdateRule((U.RECOVERING,), "other", "*", UpdateAction.LOST),
)


def effect_action(boot: Boot, answer: Answer, *, repeatable: bool, carried: bool) -> Action:
    """Return what to do with an effect in doubt."""
    kind = "carried" if carried else "repeatable" if repeatable else "once"
    for row in EFFECT_RULES:
        if row.boot == boot and row.answer in (answer, "*") and row.kind in (kind, "*"):
            return row.action
    raise AssertionError((boot, answer, kind))


def session_action(state: str, boot: Boot, held: Held) -> SessionAction:
    """Return what to do with a session in `state`, last recorded in this boot or another, held or not."""
    for row in SESSION_RULES:
        if state in row.states and row.boot == boot and row.held in (held, "*"):
            return row.action
    raise AssertionError((state, boot, held))


def update_action(state: str, boot: Boot, held: Held) -> UpdateAction:
    """Return what to do with an update; `held` tells what is known of a live update into this boot."""
    for row in UPDATE_RULES:
        if state in row.states and row.boot == boot and row.held in (held, "*"):
            return row.action
    raise AssertionError((state, boot, held))
