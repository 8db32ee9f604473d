# SPDX-License-Identifier: Apache-2.0
"""Turns: whatever orders and limits there are, everybody is stopped, in order, and nobody is beyond the limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from luod.engine.turns import may_restore, to_freeze
from luod.states.fold import Session
from luod.states.table import SessionState as S

ORDERS = st.lists(st.integers(-2, 2), min_size=1, max_size=8)


def sessions(orders: list[int], state: S) -> list[Session]:
    return [Session(id=f"vm{n}.1", order=order, state=state) for n, order in enumerate(orders)]


@given(orders=ORDERS, limit=st.integers(0, 3), data=st.data())
def test_all_are_frozen_in_their_order(orders: list[int], limit: int, data: st.DataObject) -> None:
    going = {one.id: one for one in sessions(orders, S.PRESERVED)}
    asked: list[str] = []
    while any(one.state == S.PRESERVED for one in going.values()):
        asked += [one.id for one in to_freeze(list(going.values()), asked, limit)]
        busy = [one for one in asked if going[one].state == S.PRESERVED]
        assert busy, "somebody is always at it"
        assert not limit or len(busy) <= limit
        assert len({going[one].order for one in busy}) == 1
        end = data.draw(st.sampled_from(busy))
        going[end] = replace(going[end], state=data.draw(st.sampled_from([S.READY, S.READY, S.ABORTED])))
    assert [going[one].order for one in asked] == sorted(orders)
    assert to_freeze(list(going.values()), asked, limit) == []


@given(orders=ORDERS, limit=st.integers(0, 3), data=st.data())
def test_all_come_back_the_other_way_round(orders: list[int], limit: int, data: st.DataObject) -> None:
    held = {one.id: one for one in sessions(orders, S.REBOOTING)}
    back: list[int] = []
    while waiting := [one for one in held.values() if one.state == S.REBOOTING]:
        if may := [one for one in waiting if may_restore(one, held.values(), (), limit)]:
            one = data.draw(st.sampled_from(may))
            back.append(one.order)
            held[one.id] = replace(one, state=S.RETRIEVED)
        busy = [one for one in held.values() if one.state == S.RETRIEVED]
        assert busy, "somebody is always at it"
        assert not limit or len(busy) <= limit
        if not may or data.draw(st.booleans()):
            end = data.draw(st.sampled_from(busy))
            held[end.id] = replace(end, state=data.draw(st.sampled_from([S.RESTORED, S.FAILED, S.LOST])))
    assert back == sorted(orders, reverse=True)


@pytest.mark.parametrize(("coming", "may"), [((), True), (("vm1.1",), False), (("vm0.1",), True)])
def test_who_is_on_the_way_has_a_place(coming: tuple[str, ...], may: bool) -> None:
    first, second = sessions([0, 0], S.REBOOTING)
    assert may_restore(first, [first, second], coming, 1) is may
