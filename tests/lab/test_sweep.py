# SPDX-License-Identifier: Apache-2.0
"""luod dies at every crash point on real kernels, dozens of times a boot, and every update still ends as it must."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from luod.demo.outcome import Setting
from luod.demo.sweep import clean_points
from luod.engine.book import Book
from luod.journal.replay import Replay
from luod.journal.verify import verify
from luod.lab.sweep import general
from luod.lab.update import crash_script, judge
from luod.views import session_json

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

CLIENTS = 2
SIZE = 64 << 10


@pytest.fixture(scope="module")
def sweep(pair, run_lab):
    old, new = pair
    boots = crash_script(new, clients=CLIENTS, size=SIZE)
    done = run_lab("sweep", old, boots, timeout_s=800, memory_mib=1100).check()
    return done, judge(done, old, new)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> set[str]:
    """Every crash point of updates in which nobody dies, on the emulator: one that goes through and one that is refused."""
    base: Path = tmp_path_factory.mktemp("clean")
    setting = Setting(sessions=CLIENTS, size=SIZE)
    points: set[str] = set()
    for name, refuse in (("through", False), ("refused", True)):
        _, found = clean_points(base / name, msgspec.structs.replace(setting, refuse=refuse))
        points |= {f"{'old' if one[0] == '1' else 'new'}:{general(one[2:])}" for one in found}
    return points


def test_every_point_of_a_clean_update_killed_luod(sweep, clean) -> None:
    done, told = sweep
    killed = {event["point"] for event in done.of("crash")}
    assert not clean - killed
    assert told["crash_points"] == len(killed) > 60
    assert told["recoveries"] >= len(killed)


def test_no_luod_was_anywhere_where_none_died(sweep) -> None:
    (swept,) = sweep[0].of("swept")
    assert swept["missed"] == []


def test_refused_updates_left_every_byte_with_the_clients(sweep) -> None:
    rounds = [event for event in sweep[0].of("round") if event["boot"] == 0]
    assert rounds[-1]["killed"] == 0
    assert {event["bytes"] for event in rounds} == {CLIENTS * SIZE}


def test_updates_that_went_through_brought_every_byte(sweep) -> None:
    done, told = sweep
    recovered = done.of("recovered")
    assert len(recovered) == len(done.boots) - 1
    assert {(event["state"], event["bytes"]) for event in recovered} == {("done", CLIENTS * SIZE)}
    assert (told["finished"], told["bytes_verified"]) == (CLIENTS, CLIENTS * SIZE)


def test_no_descriptor_is_left_behind(sweep) -> None:
    done, _ = sweep
    assert [event["keeper"] for event in done.of("leak")] == [{}]
    for event in done.of("recovered"):
        assert event["leaked"] == {"luod": {}, "keeper": {}}, event["boot"]


def test_one_more_recovery_writes_nothing_but_that_luod_was_started(sweep) -> None:
    (swept,) = sweep[0].of("swept")
    assert swept["late"] == ["daemon.started.v1"]


def test_journal_is_whole_and_replays_to_what_luod_said(sweep) -> None:
    journal = sweep[0].file("luod/journal.db")
    assert verify(journal).ok
    with Replay(journal) as replay:
        book = Book(replay)
    replayed = msgspec.json.decode(msgspec.json.encode([session_json(one) for one in book.sessions()]))
    assert replayed == json.loads(sweep[0].file("sweep/sessions.json").read_text("utf-8"))
    assert {one["state"] for one in replayed} <= {"finished", "aborted"}
    assert not [one["id"] for one in replayed if one["anomalies"]]
