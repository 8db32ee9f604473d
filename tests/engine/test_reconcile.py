# SPDX-License-Identifier: Apache-2.0
"""The reconciliation tables are total and unambiguous, and say what the design says."""

from __future__ import annotations

import itertools

import pytest

from luod.engine import reconcile
from luod.engine.reconcile import (
    EFFECT_RULES,
    SESSION_RULES,
    UPDATE_RULES,
    Action,
    SessionAction,
    UpdateAction,
    effect_action,
    session_action,
    update_action,
)
from luod.states.table import SESSION, SESSION_NEXT, UPDATE, SessionState, UpdateState

BOOTS = ("same", "other")
HELD = ("yes", "no", "unknown")


@pytest.mark.parametrize(
    ("rules", "states"),
    [(SESSION_RULES, SESSION.states), (UPDATE_RULES, UPDATE.states)],
    ids=["session", "update"],
)
def test_exactly_one_row_for_every_combination(rules: tuple, states: tuple) -> None:
    for state, boot, held in itertools.product(states, BOOTS, HELD):
        rows = [row for row in rules if state in row.states and row.boot == boot and row.held in (held, "*")]
        assert len(rows) == 1, (state, boot, held, rows)


def test_exactly_one_effect_row_for_every_combination() -> None:
    kinds = ("repeatable", "once", "carried")
    for boot, answer, kind in itertools.product(BOOTS, ("done", "absent", "unknown"), kinds):
        rows = [
            r for r in EFFECT_RULES if r.boot == boot and r.answer in (answer, "*") and r.kind in (kind, "*")
        ]
        assert len(rows) == 1, (boot, answer, kind, rows)


def test_a_hole_in_a_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "SESSION_RULES", SESSION_RULES[1:])
    with pytest.raises(AssertionError):
        session_action(SessionState.FINISHED, "same", "yes")


def test_nothing_is_ever_redone_blindly() -> None:
    """A call that may not be made twice is never made again while nobody knows whether it happened."""
    assert effect_action("same", "unknown", repeatable=False, carried=False) is Action.ASK
    assert effect_action("same", "done", repeatable=True, carried=False) is Action.ADOPT
    for answer in ("done", "absent", "unknown"):
        assert effect_action("other", answer, repeatable=True, carried=False) is Action.VOID
        assert effect_action("same", answer, repeatable=False, carried=True) is not Action.REDO


def test_no_session_that_may_be_held_is_called_lost() -> None:
    for state, boot, held in itertools.product(SESSION.states, BOOTS, ("yes", "unknown")):
        action = session_action(state, boot, held)
        incoming = state in ("retrieved", "restored", "failed")
        if not (incoming and boot == "other"):  # the kernel never forwards an unfinished incoming session
            assert action not in (SessionAction.LOST,), (state, boot, held)


def test_no_session_that_is_not_held_is_claimed() -> None:
    for state in SESSION.states:
        if state not in SESSION.final and state != "new":
            assert session_action(state, "other", "no") in (SessionAction.LOST, SessionAction.ABORT)


def test_actions_are_legal_moves() -> None:
    """What a row says can be recorded: the table has the event for every state that the row names."""
    event = {
        SessionAction.ABORT: "aborted",
        SessionAction.LOST: "lost",
        SessionAction.THAW: "thawed",
        SessionAction.REFUSED: "reboot_refused",
        SessionAction.AWAIT: "retrieved",
    }
    for row in SESSION_RULES:
        if row.action in event:
            for state in row.states:
                assert (state, event[row.action]) in SESSION_NEXT, (state, row.action)


def test_luod_never_reboots_by_itself_after_a_restart() -> None:
    for held in HELD:
        assert update_action(UpdateState.ARMED, "same", held) is UpdateAction.DISARM
        assert update_action(UpdateState.REBOOTING, "same", held) is UpdateAction.REFUSED
    assert session_action(SessionState.READY, "same", "yes") is SessionAction.THAW
