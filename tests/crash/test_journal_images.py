# SPDX-License-Identifier: Apache-2.0
"""Damaged images of a journal: what is read is right, or the damage is told. Strides are in bytes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from crash_workload import payload_of_body_only

from luod.journal import record as record_module
from luod.journal import wal
from luod.journal import writer as writer_module
from luod.journal.errors import JournalError, JournalWriteError
from luod.journal.record import Entry, Record
from luod.journal.replay import Files
from luod.journal.writer import Journal
from luod.states.events import DaemonStarted, EffectIntended, EffectOutcome, SessionReady


@dataclass
class Image:
    """The two files of a journal, and the records that it holds."""

    database: bytes
    log: bytes
    records: list[Record]


def entries(number: int) -> list[Entry]:
    return [
        Entry(f"vm{number % 3}.1", EffectIntended(f"key/{number}", "test", {"n": number})),
        Entry(f"vm{number % 3}.1", EffectOutcome(f"key/{number}", "done"), cause=-1),
        Entry("luod", SessionReady()),
    ]


def make(directory: Path, rows: int, *, log: bool) -> Image:
    path = directory / "journal.db"
    journal = Journal.open(path, boot_id="boot", run_id="run", volatile=True, pregrow=0)
    journal.append([Entry("luod", DaemonStarted("1", "k", 7))])
    for number in range(rows):
        journal.append(entries(number))
    records = list(journal.read())
    if not log:
        journal.close()
    files = [file.read_bytes() if file.exists() else b"" for file in (path, directory / "journal.db-wal")]
    journal.close()
    return Image(files[0], files[1], records)


def read(directory: Path, database: bytes, log: bytes) -> tuple[list[Record], bool, set[int]]:
    """Read an image; return the records, whether anything was said about it, and the ids that were called unproved."""
    path = directory / "journal.db"
    path.write_bytes(database)
    path.with_name("journal.db-wal").write_bytes(log)
    try:
        with Files(path, wal.scan(log), called=path) as files:
            records = list(files)
            report = files.report()
    except JournalError:
        return [], True, set()
    doubtful = {damage.first for damage in report.damage if damage.kind == "unproved"}
    return records, not report.ok or report.torn is not None, doubtful


def flips(data: bytes, stride: int, seed: int) -> list[tuple[int, bytes]]:
    dice = random.Random(seed)
    images = []
    for at in range(0, len(data), stride):
        image = bytearray(data)
        image[at] ^= 1 << dice.randrange(8)
        images.append((at, bytes(image)))
    return images


def silently_wrong(
    directory: Path, image: Image, part: str, stride: int, *, stop_at_first: bool = False
) -> tuple[list[str], int]:
    """Flip a bit in every `stride`th byte; return the places where something is wrong and not told, and how many were told."""
    wrong, told = [], 0
    originals = set(image.records)
    for at, flipped in flips(getattr(image, part), stride, 3):
        database = flipped if part == "database" else image.database
        log = flipped if part == "log" else image.log
        records, said, doubtful = read(directory, database, log)
        told += said
        if not said and records != image.records:
            wrong.append(f"byte {at}: {len(records)} rows of {len(image.records)} and no word")
        if not {record for record in records if record.id not in doubtful} <= originals:
            wrong.append(f"byte {at}: a changed row passed as sound")
        if stop_at_first and wrong:
            break
    return wrong, told


@pytest.fixture
def rooms(arena):
    made, tried = arena / "made", arena / "tried"
    made.mkdir()
    tried.mkdir()
    return made, tried


def test_a_flipped_bit_in_the_database_is_told_or_has_no_effect(rooms):
    image = make(rooms[0], 12, log=False)
    wrong, told = silently_wrong(rooms[1], image, "database", 11)
    assert wrong == []
    assert told > 300


def test_a_flipped_bit_in_the_log_is_told_or_has_no_effect(rooms):
    image = make(rooms[0], 3, log=True)
    wrong, told = silently_wrong(rooms[1], image, "log", 11)
    assert wrong == []
    assert told > 1000


def test_the_sweep_sees_that_a_checksum_of_the_body_is_not_enough(rooms, monkeypatch):
    narrow = payload_of_body_only()
    monkeypatch.setattr(record_module, "payload", narrow)
    monkeypatch.setattr(writer_module, "payload", narrow)
    image = make(rooms[0], 12, log=False)
    wrong, _ = silently_wrong(rooms[1], image, "database", 11, stop_at_first=True)
    assert any("a changed row passed as sound" in line for line in wrong)


def test_a_log_cut_anywhere_is_read_up_to_its_last_whole_transaction(rooms):
    image = make(rooms[0], 5, log=True)
    lengths = set()
    for cut in range(0, len(image.log) + 1, 16):
        records, _, _ = read(rooms[1], image.database, image.log[:cut])
        assert records == image.records[: len(records)], cut
        lengths.add(len(records))
    assert lengths == {0, *range(1, 17, 3)}


def test_a_cut_database_is_never_silent(rooms):
    image = make(rooms[0], 12, log=False)
    originals = set(image.records)
    for cut in range(0, len(image.database), 512):
        records, told, doubtful = read(rooms[1], image.database[:cut], b"")
        assert told, cut
        assert {record for record in records if record.id not in doubtful} <= originals, cut


@pytest.mark.parametrize(("part", "stride"), [("database", 101), ("log", 211)])
def test_a_journal_refused_for_writing_is_not_touched(rooms, part, stride):
    image = make(rooms[0], 5, log=part == "log")
    path = rooms[1] / "journal.db"
    refused = 0
    for at, flipped in flips(getattr(image, part), stride, 5):
        shutil.rmtree(rooms[1])
        rooms[1].mkdir()
        before = {"journal.db": image.database}
        if part == "log":
            before["journal.db-wal"] = flipped
        else:
            before["journal.db"] = flipped
        for name, content in before.items():
            (rooms[1] / name).write_bytes(content)
        try:
            with Journal.open(path, boot_id="b", run_id="r", volatile=True, pregrow=0) as journal:
                there = list(journal.read())
                assert there == image.records[: len(there)], at
                assert len(there) == len(image.records) or journal.torn, at
        except JournalError:
            refused += 1
            after = {file.name: file.read_bytes() for file in rooms[1].iterdir() if file.suffix != ".lock"}
            assert after == before, at
    assert refused > 10


def test_a_file_that_may_not_grow_loses_nothing_acknowledged(rooms):
    path, acknowledged = rooms[0] / "journal.db", rooms[0] / "ack"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            journal = Journal.open(path, boot_id="b", run_id="r", volatile=True, pregrow=0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            with acknowledged.open("w", buffering=1) as ack:
                for number in range(1000):
                    ack.write(f"{journal.append(entries(number))[-1].id}\n")
        except JournalWriteError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    last = int(acknowledged.read_text().split()[-1])
    with Journal.open(path, boot_id="b", run_id="r", volatile=True, pregrow=0) as journal:
        assert last > 30
        assert last <= journal.head()[0] <= last + 3
        assert journal.append(entries(0))[0].id == journal.head()[0] - 2
