# SPDX-License-Identifier: Apache-2.0
"""Copies of journals: whole, in use, cut, damaged; and the text form."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod.journal import export, wal
from luod.journal.errors import JournalError, JournalMissing, NewerSchema, NotAJournal
from luod.journal.record import Entry
from luod.journal.replay import Replay
from luod.journal.sqlite import sqlite
from luod.journal.verify import verify
from luod.states.events import DaemonStopped, EffectIntended, SessionReady

WRITER = """
import sys
from luod.journal.writer import Journal
from luod.journal.record import Entry
from luod.states.events import DaemonStopped
with Journal.open(sys.argv[1], boot_id="b", run_id="r", pregrow=65536) as journal:
    print("ready", flush=True)
    n = 0
    while n < 200000 and not (n % 50 == 0 and n and "stop" in open(sys.argv[2]).read()):
        n += 1
        journal.append([Entry("luod", DaemonStopped(f"row {n} " + "x" * (n % 700)))])
        if n % 17 == 0:
            journal.checkpoint()
"""


def fill(journal, rows=40, size=300):
    return [
        journal.append([Entry(f"vm{n % 4}.1", EffectIntended(f"k{n}", "x", {"pad": "y" * size}))])[0]
        for n in range(rows)
    ]


def test_a_closed_journal_is_read_from_its_file_alone(opened, path):
    journal = opened()
    records = fill(journal)
    journal.close()
    before = path.read_bytes()
    with Replay(path) as replay:
        assert list(replay) == records
        report = replay.report()
    assert (report.ok, report.rows, report.head, report.damage, report.torn) == (True, 40, 40, (), None)
    assert report.chain == records[-1].chain.hex()
    assert report.journal == journal.journal_id
    assert path.read_bytes() == before


def test_the_process_that_writes_may_not_copy(opened, path):
    opened()
    with pytest.raises(JournalError, match="open in this process"):
        Replay(path)


def test_copies_made_while_a_writer_works_are_whole(path, disk_path):
    switch = disk_path / "switch"
    switch.write_text("")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(switch)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "ready\n"
        seen = []
        while len(seen) < 25 and (not seen or seen[-1] < 100000):
            try:
                with Replay(path, deep=True) as replay:
                    rows = list(replay)
                    report = replay.report()
            except JournalError as error:
                if "changes faster" not in str(error):
                    raise
                continue
            assert report.ok, report.damage
            assert [record.id for record in rows] == list(range(1, len(rows) + 1))
            seen.append(len(rows))
        switch.write_text("stop")
        assert writer.wait(30) == 0
    assert seen == sorted(seen)
    assert verify(path).rows >= seen[-1] > seen[0]


def test_what_is_not_there_is_told(path):
    with pytest.raises(JournalMissing, match="there is no journal"):
        Replay(path)
    with pytest.raises(NotAJournal, match="a directory"):
        Replay(path.parent)


def test_a_newer_layout_is_not_read(opened, path):
    opened().close()
    connection = sqlite.connect(path, isolation_level=None)
    connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(NewerSchema):
        verify(path)


def test_rows_before_and_after_an_unreadable_page_are_read(opened, path):
    journal = opened()
    records = fill(journal, rows=200)
    journal.close()
    raw = bytearray(path.read_bytes())
    marker = raw.index(b'"key":"k100"') // 4096 * 4096
    raw[marker : marker + 4096] = b"\xff" * 4096
    path.write_bytes(raw)
    with Replay(path) as replay:
        found = list(replay)
        report = replay.report()
    gap = next(damage for damage in report.damage if damage.kind == "unreadable")
    assert gap.first <= 101 <= gap.last
    assert found == records[: gap.first - 1] + records[gap.last :]
    assert len(found) > 180
    assert any(damage.kind == "unproved" and damage.first == gap.last + 1 for damage in report.damage)


def test_an_edited_row_is_named_with_its_column_and_the_rest_is_read(opened, path):
    journal = opened()
    records = fill(journal)
    journal.close()
    connection = sqlite.connect(path, isolation_level=None)
    connection.execute("UPDATE events SET run_id = 'sun-1' WHERE id = 9")
    connection.execute("UPDATE events SET cause = 5, type = 'other' WHERE id = 20")
    connection.close()
    report = verify(path)
    assert [(damage.first, damage.column) for damage in report.damage] == [(9, "run_id"), (20, "")]
    assert "it reads 'sun-1' and was 'run-1'" in report.damage[0].what
    with Replay(path) as replay:
        assert list(replay) == [record for record in records if record.id != 20]
    assert msgspec.json.decode(msgspec.json.encode(report))["damage"][0]["column"] == "run_id"


def test_unknown_event_types_are_counted_and_are_no_damage(opened, path, monkeypatch):
    from luod.journal import writer

    real = writer.codec.encode
    monkeypatch.setattr(writer.codec, "encode", lambda event: ("vm.teleported.v9", real(event)[1]))
    journal = opened()
    fill(journal, rows=3)
    journal.close()
    monkeypatch.undo()
    report = verify(path)
    assert report.ok
    assert report.unknown == {"vm.teleported.v9": 3}


def test_a_known_event_with_a_bad_body_is_damage(opened, path, monkeypatch):
    from luod.journal import writer

    monkeypatch.setattr(writer.codec, "encode", lambda event: (event.TYPE, b'{"nonsense":1}'))
    journal = opened()
    fill(journal, rows=1)
    journal.close()
    monkeypatch.undo()
    (damage,) = verify(path).damage
    assert (damage.kind, damage.first, damage.column) == ("body", 1, "body")


def test_records_in_memory_are_checked_too(opened):
    journal = opened()
    records = fill(journal)
    start = journal.chain_at(0)
    assert verify(records, start=start).ok
    assert verify([*records[:5], *records[6:]], start=start).damage[0].first == 6
    assert not verify(records, start=bytes(16)).ok


# -- the text form


def exported(records, journal):
    out = io.BytesIO()
    manifest = export.Manifest(export.FORMAT, journal.journal_id, journal.chain_at(0).hex(), "0.1", "3.53")
    export.write(records, out, manifest)
    return out.getvalue()


def test_an_export_proves_itself_and_comes_back(opened, path, disk_path):
    journal = opened()
    records = fill(journal)
    file = disk_path / "x.jsonl"
    file.write_bytes(exported(records, journal))
    assert list(export.Import(file)) == records
    report = verify(file)
    assert report.ok
    assert (report.rows, report.head, report.chain, report.journal) == (
        40,
        40,
        records[-1].chain.hex(),
        journal.journal_id,
    )
    assert msgspec.json.decode(file.read_bytes().splitlines()[1])["body"]["key"] == "k0"


def test_an_empty_journal_exports_too(opened, disk_path):
    file = disk_path / "x.jsonl"
    file.write_bytes(exported([], opened()))
    assert verify(file).ok


def test_every_flipped_bit_in_an_export_is_told(opened, disk_path):
    journal = opened()
    records = fill(journal, rows=4, size=10)
    raw = exported(records, journal)
    file = disk_path / "x.jsonl"
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            source = export.Import(file)
            found = list(source)
            report = source.report()
        except JournalError:
            continue
        doubtful = {damage.first for damage in report.damage if damage.kind == "unproved"}
        if report.ok:
            assert found == records, (at, bytes(damaged[at - 20 : at + 20]))
        assert all(record in records for record in found if record.id not in doubtful), at


def test_a_cut_export_is_told(opened, disk_path):
    journal = opened()
    raw = exported(fill(journal, rows=4, size=10), journal)
    file = disk_path / "x.jsonl"
    for cut in range(raw.index(b"\n") + 1, len(raw) - 1, 7):
        file.write_bytes(raw[:cut])
        assert not verify(file).ok, cut


def test_a_newer_export_is_not_read(disk_path):
    file = disk_path / "x.jsonl"
    file.write_bytes(b'{"luod_journal":2,"journal":"j","genesis":"' + b"0" * 32 + b'"}\n')
    with pytest.raises(NewerSchema):
        verify(file)


# -- the log


@given(
    data=st.binary(min_size=8, max_size=400).map(lambda raw: raw[: len(raw) // 8 * 8]),
    s0=st.integers(0, 2**32 - 1),
)
def test_the_checksum_is_that_of_the_format(data, s0):
    expected = [s0, s0 ^ 0xFFFF]
    for at in range(0, len(data), 8):
        expected[0] = (expected[0] + int.from_bytes(data[at : at + 4], "little") + expected[1]) % 2**32
        expected[1] = (expected[1] + int.from_bytes(data[at + 4 : at + 8], "little") + expected[0]) % 2**32
    assert wal.checksum((s0, s0 ^ 0xFFFF), data, big=False) == tuple(expected)


def test_a_log_in_use_is_seen_as_sqlite_sees_it(opened, path):
    journal = opened(pregrow=65536)
    assert wal.scan_file(path.with_name("journal.db-wal")).frames == 0
    journal.append([Entry("luod", SessionReady())])
    scan = wal.scan_file(path.with_name("journal.db-wal"))
    assert (scan.frames > 0, scan.torn, scan.damage) == (True, None, ())


def test_a_flip_in_an_early_transaction_is_damage_and_in_the_last_is_a_torn_end(opened, path):
    journal = opened()
    for _ in range(4):
        journal.append([Entry("luod", DaemonStopped("x"))])
    raw = path.with_name("journal.db-wal").read_bytes()
    early, late = bytearray(raw), bytearray(raw)
    early[32 + 24 + 100] ^= 1
    late[-100] ^= 1
    assert wal.scan(bytes(early)).damage[0].offset == 32
    assert wal.scan(bytes(late)).damage == ()
    assert wal.scan(bytes(late)).torn.frames > 0


def test_a_torn_end_is_tolerated_and_told(opened, path, disk_path):
    journal = opened()
    records = fill(journal, rows=5)
    for name in ("journal.db", "journal.db-wal"):
        (disk_path / "copy").mkdir(exist_ok=True)
        subprocess.run(["cp", str(disk_path / name), str(disk_path / "copy")], check=True)
    log = disk_path / "copy" / "journal.db-wal"
    log.write_bytes(log.read_bytes()[:-10])
    with Replay(disk_path / "copy" / "journal.db") as replay:
        assert list(replay) == records[:-1]
        assert replay.report().ok
        assert replay.report().torn.frames > 0
    again = opened(disk_path / "copy" / "journal.db")
    assert again.torn is not None
    assert list(again.read()) == records[:-1]
    again.close()
    shutil.rmtree(disk_path / "copy")
