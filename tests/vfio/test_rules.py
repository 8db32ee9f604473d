# SPDX-License-Identifier: Apache-2.0
"""The order rules: each one is broken alone, and named."""

from __future__ import annotations

import itertools

import pytest

from luod.devices.rules import (
    Asked,
    OrderViolated,
    Standing,
    before_mapping,
    before_preserving,
    before_the_jump,
    enforce,
)

RIGHT = (
    Asked("0x10", "memfd", "s"),
    Asked("0x11", "memfd", "s"),
    Asked("0x20", "iommufd", "s", ("0x10", "0x11")),
    Asked("0x30", "vfio", "s", ("0x20",)),
)


def rules(violations) -> list[str]:
    return [one.rule for one in violations]


def test_the_right_order_breaks_nothing() -> None:
    assert before_preserving(RIGHT) == []
    assert before_mapping("0x10", sealed=True) == []
    assert before_the_jump([Standing("disk")]) == []
    enforce([])


def test_every_other_order_breaks_a_rule() -> None:
    """All permutations: right are exactly those in which everything comes after what it rests on."""
    for order in itertools.permutations(RIGHT):
        place = {one.token: at for at, one in enumerate(order)}
        right = all(place[need] < place[one.token] for one in RIGHT for need in one.needs)
        assert (before_preserving(order) == []) == right, order


def test_a_memory_that_comes_too_late_is_named() -> None:
    late = [RIGHT[0], RIGHT[2], RIGHT[1], RIGHT[3]]
    found = before_preserving(late)
    assert rules(found) == ["memory-first"]
    assert "0x20" in found[0].subject
    assert "0x11" in found[0].message


def test_a_device_before_its_iommufd_is_named() -> None:
    assert rules(before_preserving([RIGHT[0], RIGHT[1], RIGHT[3], RIGHT[2]])) == ["iommufd-first"]


def test_a_second_session_is_named() -> None:
    apart = [*RIGHT[:3], Asked("0x30", "vfio", "other", ("0x20",))]
    found = before_preserving(apart)
    assert rules(found) == ["one-session"]
    assert "other" in found[0].message


def test_an_unsealed_memory_is_named() -> None:
    assert rules(before_mapping("0x10", sealed=False)) == ["sealed-before-mapping"]


def test_devices_that_would_stop_the_jump_are_all_named_at_once() -> None:
    found = before_the_jump(
        [Standing("disk", ("MSI-X",)), Standing("net", (), 3), Standing("gpu", ("INTx",), 3)]
    )
    assert [(one.rule, one.subject) for one in found] == [
        ("interrupts-off", "device disk"), ("awake", "device net"), ("interrupts-off", "device gpu"),
        ("awake", "device gpu"),
    ]  # fmt: skip
    with pytest.raises(OrderViolated) as caught:
        enforce(found)
    assert caught.value.violations == tuple(found)
    assert "disk" in caught.value.message
    assert caught.value.hint.count("D0") == 1
