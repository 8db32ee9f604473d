# SPDX-License-Identifier: Apache-2.0
"""The barrier: who holds the update up, who is dropped, who stops it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from luod.engine.barrier import judge
from luod.states.events import SessionNacked
from luod.states.fold import Session
from luod.states.table import SessionState as S


def session(name: str, state: S, **more: Any) -> Session:
    return Session(id=f"{name}.1", client=name, state=state, **more)


def look(
    barrier: str, *sessions: Session, now: float = 1.0, gone: tuple[str, ...] = (), deadline: float = 10.0
) -> Any:
    return judge(
        barrier, sessions, now=now, since=0.0, deadline=deadline, is_gone=lambda one: one.client in gone
    )


def test_it_waits_for_the_slowest_and_wakes_at_the_first_deadline() -> None:
    verdict = look("ready", session("a", S.READY), session("b", S.PRESERVED, deadline_s=4.0))
    assert (verdict.go, verdict.abort, verdict.wake) == (None, "", 4.0)


def test_all_passed() -> None:
    assert look("ready", session("a", S.READY), session("b", S.READY)).go == ("a.1", "b.1")
    assert look("preserved", session("a", S.READY), session("b", S.PRESERVED)).go == ("a.1", "b.1")
    assert look("ready").go == ()


TROUBLES = {
    "nack": (session("x", S.CREATED, nack=SessionNacked("EBUSY", "busy")), {}),
    "died": (session("x", S.CREATED), {"gone": ("x",)}),
    "late": (session("x", S.CREATED), {"now": 11.0}),
    "own deadline": (session("x", S.CREATED, deadline_s=0.5), {}),
    "asked": (session("x", S.PRESERVED, abort_reason="operator"), {}),
    "gone": (session("x", S.ABORTED), {}),
}


@pytest.mark.parametrize(
    ("trouble", "policy"), list(itertools.product(TROUBLES, ("required", "optional", "best-effort")))
)
def test_policy_decides_what_trouble_means(trouble: str, policy: str) -> None:
    from msgspec.structs import replace

    one, more = TROUBLES[trouble]
    verdict = look("ready", replace(one, policy=policy), session("ok", S.READY), **more)
    if policy == "required":
        assert verdict.go is None
        assert "x.1" in verdict.abort
    else:
        assert verdict.go == ("ok.1",)
        assert [dropped.session for dropped in verdict.drop] == ["x.1"]
        assert verdict.drop[0].why


def test_a_client_that_is_ready_may_leave() -> None:
    """The VMM can exit once it is READY: its session is held for it."""
    assert look("ready", session("a", S.READY), gone=("a",)).go == ("a.1",)
    assert look("ready", session("a", S.PRESERVED), gone=("a",)).abort


def test_a_required_trouble_is_not_hidden_by_an_optional_one() -> None:
    verdict = look("ready", session("o", S.ABORTED, policy="optional"), session("r", S.LOST))
    assert verdict.abort.startswith("r.1")
    assert [dropped.session for dropped in verdict.drop] == ["o.1"]
