# SPDX-License-Identifier: Apache-2.0
"""Journals read without luod: whole, damaged, cut, foreign, or in use. Nothing on disk changes by it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from luoctl_process import Luoctl, fingerprint, whole_update
from luod_world import World

from luod.journal.export import Import
from luod.journal.record import Entry
from luod.journal.writer import Journal
from luod.states import events as ev

READERS: list[tuple[str, ...]] = [("show",), ("replay",), ("timeline",), ("why", "1")]


def ask(luoctl: Luoctl, verb: tuple[str, ...], path: Path, *more: object):  # type: ignore[no-untyped-def]
    return luoctl("journal", *verb, "--journal", path, *more)


def test_a_whole_journal(offline: Luoctl, copy: Path) -> None:
    before = fingerprint(copy.parent)
    for verb in (*READERS, ("verify",)):
        answer = ask(offline, verb, copy)
        assert (answer.code, answer.err) == (0, ""), verb
        assert answer.out
    shown = ask(offline, ("show",), copy, "--json").json
    assert [one["id"] for one in shown["records"]] == list(range(1, len(shown["records"]) + 1))
    assert shown["damage"] == []
    assert fingerprint(copy.parent) == before


def test_show_is_cut_as_asked(offline: Luoctl, copy: Path) -> None:
    def ids(*more: object) -> list[int]:
        return [one["id"] for one in ask(offline, ("show",), copy, "--json", *more).json["records"]]

    everything = ids()
    assert ids("--after", 3, "--until", 7) == [4, 5, 6, 7]
    assert ids("--limit", 2) == everything[:2]
    assert ids("--after", everything[-1]) == []
    assert ids("--until", 10**6) == everything
    streams = ask(offline, ("show",), copy, "--json", "--stream", "vm1.1").json["records"]
    assert {one["stream"] for one in streams} == {"vm1.1"}
    assert [one["seq"] for one in streams] == list(range(1, len(streams) + 1))


def test_replay_stops_anywhere(offline: Luoctl, copy: Path) -> None:
    """At every point there is a state, and what has begun and not ended is in doubt there."""
    records = ask(offline, ("show",), copy, "--json").json["records"]
    begun: set[str] = set()
    for record in records:
        key = record["body"].get("key")
        if record["type"] == "effect.intended.v1":
            begun.add(key)
        elif record["type"].startswith("effect."):
            begun.discard(key)
        state = ask(offline, ("replay",), copy, "--json", "--until", record["id"]).json
        assert state["head"] == record["id"]
        assert {one["key"] for one in state["in_doubt"]} == begun
        assert state["anomalies"] == []
    assert begun == set()
    assert state["update"]["state"] == "done"


def test_doubts_and_anomalies_are_shown(offline: Luoctl, disk_path: Path) -> None:
    path = disk_path / "journal.db"
    with Journal.open(path, boot_id="b", run_id="r") as journal:
        journal.append([
            Entry("vm1.1", ev.SessionBound("vm1", 1, ev.Owner(7, 7, 99))),
            Entry("vm1.1", ev.SessionFinished("client")),
            Entry("vm1.1", ev.EffectIntended("vm1.1/create", "session.create")),
            Entry("update/1", ev.UpdateDone(1, 0, 0)),
        ])  # fmt: skip
    state = ask(offline, ("replay",), path, "--json").json
    assert [(one["key"], one["status"]) for one in state["in_doubt"]] == [("vm1.1/create", "intended")]
    assert {one["stream"] for one in state["anomalies"]} == {"vm1.1", "update/1"}
    text = ask(offline, ("replay",), path).out
    assert "vm1.1/create (session.create): intended, no outcome" in text
    assert "vm1.1: anomaly: session.finished.v1 in new at 2: refused by the table" in text
    assert "update/1: anomaly: update.done.v1 in idle" in text
    why = ask(offline, ("why", "vm1"), path).out
    assert "in doubt: vm1.1/create" in why


def test_unknown_events_and_states_are_shown_as_they_are(offline: Luoctl, disk_path: Path) -> None:
    """Records of a newer luod: the journal is whole, and who reads it is told what this version cannot understand."""

    class SessionCloned(ev.Event, frozen=True):
        TYPE = "session.cloned.v7"
        into: str

    path = disk_path / "journal.db"
    with Journal.open(path, boot_id="b", run_id="r") as journal:
        journal.append([
            Entry("vm1.1", ev.SessionBound("vm1", 1, ev.Owner(7, 7, 99))), Entry("vm1.1", SessionCloned("vm2")),
        ])  # fmt: skip
    answer = ask(offline, ("show",), path)
    assert answer.code == 0
    assert 'session.cloned.v7 {"into": "vm2"}' in answer.out
    report = ask(offline, ("verify",), path, "--json")
    assert (report.code, report.json["ok"], report.json["unknown"]) == (0, True, {"session.cloned.v7": 1})
    assert (
        "1 record of type session.cloned.v7: not known to this version" in ask(offline, ("verify",), path).out
    )
    assert ask(offline, ("replay",), path, "--json").json["unknown"] == {"vm1.1": "session.cloned.v7"}
    assert "event type 'session.cloned.v7' is not known" in ask(offline, ("replay",), path).out


def flip(path: Path, record: int) -> None:
    """Damage one record behind SQLite's back."""
    base = sqlite3.connect(path)
    base.execute("UPDATE events SET body = CAST(CAST(body AS TEXT) || ' ' AS BLOB) WHERE id = ?", (record,))
    base.commit()
    base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    base.close()


def test_damage_in_the_middle(offline: Luoctl, copy: Path) -> None:
    whole = ask(offline, ("show",), copy, "--json").json["records"]
    flip(copy, 5)
    before = fingerprint(copy.parent)
    for verb in (*READERS, ("verify",)):
        answer = ask(offline, verb, copy)
        assert answer.code == 4, verb
        assert "row 5" in answer.err + answer.out
        if verb != ("verify",):
            assert answer.err.splitlines()[0].startswith(f"luoctl: {copy} is damaged: row 5")
            assert answer.err.splitlines()[-1].startswith("hint: ")
        told = ask(offline, verb, copy, "--json")
        assert told.code == 4
        assert told.json["damage"][0]["first"] == 5
        assert told.err == ""
    shown = ask(offline, ("show",), copy, "--json").json["records"]
    assert shown == [one for one in whole if one["id"] != 5], "what stands before and behind is shown"
    limited = ask(offline, ("show",), copy, "--limit", 2)
    assert (limited.code, len(limited.out.splitlines())) == (4, 3), "also when what is shown is whole"
    for verb in ("show",), ("replay",):
        assert ask(offline, verb, copy, "--until", 2).code == 4
    assert fingerprint(copy.parent) == before


@pytest.mark.parametrize("left", [0.3, 0.6, 0.9])
def test_truncated(offline: Luoctl, copy: Path, left: float) -> None:
    os.truncate(copy, int(copy.stat().st_size * left))
    before = fingerprint(copy.parent)
    for verb in (("show",), ("replay",), ("verify",)):
        answer = ask(offline, verb, copy)
        assert answer.code == 4
        assert "damage" in answer.err + answer.out
    assert fingerprint(copy.parent) == before


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbled(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def foreign(path: Path) -> None:
    path.unlink()
    base = sqlite3.connect(path)
    base.execute("CREATE TABLE events (id INTEGER)")
    base.commit()
    base.close()


def newer(path: Path) -> None:
    base = sqlite3.connect(path)
    base.execute("PRAGMA user_version = 99")
    base.commit()
    base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    base.close()


def newer_export(path: Path) -> None:
    path.write_text(
        json.dumps({"luod_journal": 99, "journal": "j", "genesis": "00" * 16}, separators=(",", ":")) + "\n"
    )


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("spoil", "code", "message", "name"),
    [
        (empty, 4, "it is empty", "NOT_A_JOURNAL"),
        (garbled, 4, "it does not begin like a SQLite database", "NOT_A_JOURNAL"),
        (foreign, 4, "is not a journal of luod: it is a database of another application", "NOT_A_JOURNAL"),
        (newer, 5, "has layout 99; this luod knows layouts up to", "NEWER_SCHEMA"),
        (newer_export, 5, "has format 99; this luod knows 1", "NEWER_SCHEMA"),
        (directory, 4, "is a directory", "NOT_A_JOURNAL"),
        (missing, 2, "there is no journal at", "JOURNAL_MISSING"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_journal(
    offline: Luoctl, copy: Path, spoil: Callable[[Path], None], code: int, message: str, name: str
) -> None:
    spoil(copy)
    before = fingerprint(copy.parent)
    for verb in (*READERS, ("verify",), ("export",)):
        answer = ask(offline, verb, copy)
        assert (answer.code, answer.out) == (code, ""), (verb, answer)
        first, last = answer.err.splitlines()
        assert first.startswith("luoctl: ")
        assert message in first
        assert str(copy) in first
        assert last.startswith("hint: ")
        if verb != ("export",):
            told = ask(offline, verb, copy, "--json")
            assert (told.code, told.json["error"]["code"]) == (code, name)
    assert fingerprint(copy.parent) == before


def test_export_and_back(offline: Luoctl, copy: Path, tmp_path: Path) -> None:
    text = tmp_path / "out" / "journal.jsonl"
    text.parent.mkdir()
    told = ask(offline, ("export",), copy, "--output", text, "--json").json
    source = Import(text)
    assert (len(list(source)), source.report().ok) == (told["rows"], True)
    assert ask(offline, ("export",), copy).out == text.read_text()
    for verb in (*READERS, ("verify",)):
        if verb == ("verify",):
            mine, theirs = (ask(offline, verb, path, "--json").json for path in (copy, text))
            assert {**mine, "source": ""} == {**theirs, "source": ""}
        else:
            assert ask(offline, verb, text, "--json").json == ask(offline, verb, copy, "--json").json
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join(lines[:-4]))
    cut = ask(offline, ("show",), text)
    assert cut.code == 4
    assert "ends without its trailer" in cut.err
    assert [path.name for path in text.parent.iterdir()] == ["journal.jsonl"]
    nowhere = ask(offline, ("export",), copy, "--output", tmp_path / "none" / "x")
    assert (nowhere.code, nowhere.out) == (1, "")
    assert "cannot be written: No such file or directory" in nowhere.err
    assert ask(offline, ("export",), copy, "--json").code == 2


def test_export_of_a_damaged_journal(offline: Luoctl, copy: Path, tmp_path: Path) -> None:
    flip(copy, 5)
    text = tmp_path / "journal.jsonl"
    assert ask(offline, ("export",), copy, "-o", text).code == 4
    again = ask(offline, ("verify",), text, "--json")
    assert again.code == 4
    assert again.json["damage"][0]["first"] == 5


def test_a_journal_in_use(world: World, luoctl: Luoctl, offline: Luoctl, tmp_path: Path) -> None:
    """While luod runs its journal is read from a copy of its files, made by luoctl or by hand, and says the same as luod."""
    whole_update(world, luoctl)
    luoctl("wait")
    by_hand = tmp_path / "by-hand"
    shutil.copytree(world.state, by_hand)
    for path in (world.state / "journal.db", by_hand / "journal.db"):
        assert ask(offline, ("verify",), path).code == 0
        for verb in READERS:
            mine = ask(offline, verb, path, "--json").json
            assert mine == luoctl("journal", *verb, "--json").json, verb
            assert ask(offline, verb, path).out == luoctl("journal", *verb).out
        state = ask(offline, ("replay",), path, "--json").json
        assert state["sessions"] == luoctl("sessions", "--json").json["sessions"]
        assert state["update"] == luoctl("status", "--json").json["update"]
    assert luoctl("journal", "verify").code == 0
    assert luoctl("journal", "export").out == ask(offline, ("export",), by_hand / "journal.db").out
