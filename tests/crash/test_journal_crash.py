# SPDX-License-Identifier: Apache-2.0
"""The journal alone against every crash. How densely each sweep samples stands in the test; 1 is every point."""

from __future__ import annotations

import pytest
from crash_harness import sweep

WORKLOAD = "crash_workload:JournalWorkload"
PRODUCT_PREGROW = 4 << 20


def test_killed_after_every_change(shim, arena):
    result = sweep(shim, arena, "kill", WORKLOAD, every=1)
    assert result.points > 120
    assert result.failures == []


def test_killed_after_every_change_and_again_in_recovery(shim, arena):
    result = sweep(shim, arena, "again", WORKLOAD, every=17, again_every=13)
    assert result.points > 20
    assert result.failures == []


def test_killed_with_the_log_as_the_product_grows_it(shim, arena):
    result = sweep(shim, arena, "kill", WORKLOAD, every=6, pregrow=PRODUCT_PREGROW)
    assert result.points > 20
    assert result.failures == []


def test_power_cut_after_every_change(shim, arena):
    result = sweep(shim, arena, "power", WORKLOAD, every=1, subsets=1)
    assert result.runs > 350
    assert result.failures == []


def test_power_cut_with_the_log_as_the_product_grows_it(shim, arena):
    result = sweep(shim, arena, "power", WORKLOAD, every=8, subsets=1, pregrow=PRODUCT_PREGROW)
    assert result.runs > 50
    assert result.failures == []


def test_every_sync_fails_once(shim, arena):
    result = sweep(shim, arena, "sync", WORKLOAD)
    assert result.points > 20
    assert result.failures == []


def test_the_disk_is_full_at_every_write(shim, arena):
    result = sweep(shim, arena, "space", WORKLOAD)
    assert result.points > 80
    assert result.failures == []


# Each of these runs a sweep from above with one thing broken, and the sweep must say so.


@pytest.mark.parametrize(
    ("kind", "mutant", "told", "every"),
    [
        ("power", "normal", "acknowledged and lost", 11),
        ("power", "effect-first", "the effects are", 7),
        ("power", "blind", "the effects are", 7),
        ("kill", "effect-first", "the effects are", 5),
        ("kill", "blind", "the effects are", 5),
    ],
)
def test_the_harness_sees_a_mutant(shim, arena, kind, mutant, told, every):
    result = sweep(shim, arena, kind, WORKLOAD, every=every, subsets=1, until=told, mutant=mutant)
    assert any(told in failure for failure in result.failures), result
