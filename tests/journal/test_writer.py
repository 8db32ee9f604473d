# SPDX-License-Identifier: Apache-2.0
"""The writer: order, groups, the mirror, notes, and what a failed write does."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luod.journal.errors import JournalDamaged, JournalError, JournalWriteError
from luod.journal.record import Entry, follows
from luod.journal.sqlite import pragma
from luod.states.events import DaemonStarted, DaemonStopped, EffectIntended, SessionReady


def ready(stream="vm1.1", cause=None):
    return Entry(stream, SessionReady(), cause)


def test_records_carry_their_place_time_and_origin(opened):
    times = iter([(1_000, 10), (2_000, 20)])
    journal = opened(clock=lambda: next(times))
    first, second = journal.append([Entry("luod", DaemonStarted("1", "k", 7)), ready(cause=-1)])
    (third,) = journal.append([ready(cause=1)])
    assert [(r.id, r.stream, r.seq, r.cause) for r in (first, second, third)] == [
        (1, "luod", 1, None),
        (2, "vm1.1", 1, 1),
        (3, "vm1.1", 2, 1),
    ]
    assert [(r.wall_ns, r.boot_ns) for r in (first, second, third)] == [(1000, 10), (1000, 10), (2000, 20)]
    assert (first.boot_id, first.run_id) == ("boot-1", "run-1")
    assert first.event() == DaemonStarted("1", "k", 7)
    assert list(journal.read()) == [first, second, third]
    assert list(journal.read(after=2)) == [third]
    assert journal.head() == (3, third.chain)
    assert follows(journal.chain_at(0), first)
    assert follows(first.chain, second)
    assert journal.chain_at(4) is None


def test_numbers_run_on_after_a_restart(opened):
    journal = opened()
    (before,) = journal.append([ready()])
    journal.close()
    (after,) = opened(boot_id="boot-2").append([ready()])
    assert (after.id, after.seq, after.boot_id) == (2, 2, "boot-2")
    assert follows(before.chain, after)


def test_what_waits_shares_one_transaction(opened):
    journal = opened()
    commits, held = [], threading.Event()
    insert = journal._store.insert

    def slow(records):
        if not commits:
            held.wait(30)
        commits.append(len(records))
        insert(records)

    journal._store.insert = slow
    first = journal.submit([ready()])
    rest = [journal.submit([ready(f"vm{n}.1"), ready(f"vm{n}.1")]) for n in range(20)]
    held.set()
    ids = [record.id for future in [first, *rest] for record in future.result(30)]
    assert ids == list(range(1, 42))
    assert sum(commits) == 41
    assert len(commits) <= 3


def test_many_threads_get_each_their_own_records(opened):
    journal = opened()
    results = {}

    def work(name):
        results[name] = [journal.append([ready(name), ready(name)]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(f"vm{n}.1",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, batches in results.items():
        assert [r.seq for batch in batches for r in batch] == list(range(1, 41))
        assert {r.stream for batch in batches for r in batch} == {name}
        assert all(second.id == first.id + 1 for first, second in batches)
    assert [record.id for record in journal.read()] == list(range(1, 321))


def test_a_future_cannot_be_cancelled(opened):
    future = opened().submit([ready()])
    assert not future.cancel()
    assert future.result(30)[0].id == 1


def test_an_empty_call_writes_nothing(opened):
    journal = opened()
    assert journal.append([]) == []
    assert journal.head()[0] == 0


@pytest.mark.parametrize("stream", ["", "x" * 201, "line\nbreak"])
def test_a_stream_needs_a_decent_name(opened, stream):
    with pytest.raises(JournalError, match="cannot name a stream"):
        opened().append([ready(stream)])


def test_the_mirror_has_the_records_before_the_future_resolves(opened):
    seen = []
    journal = opened(mirror=seen.extend)
    future = journal.submit([ready(), ready()])
    future.add_done_callback(lambda done: seen.append("resolved"))
    records = future.result(30)
    journal.close()
    assert seen == [*records, "resolved"]


def test_a_broken_mirror_does_not_stop_the_journal(opened, caplog):
    def broken(records):
        raise OSError("no box")

    journal = opened(mirror=broken)
    assert journal.append([ready()])[0].id == 1
    assert journal.append([ready()])[0].id == 2
    assert "black box" in caplog.text


def test_a_note_is_mirrored_at_once_and_written_with_the_next_transaction(opened):
    seen = []
    journal = opened(mirror=seen.extend)
    (first,) = journal.append([ready()])
    (noted,) = journal.note([ready()])
    assert seen == [first, noted]
    assert journal.head()[0] == 1
    (last,) = journal.append([ready()])
    assert seen == [first, noted, last]
    assert list(journal.read()) == [first, noted, last]


def test_a_note_is_written_by_close(opened):
    journal = opened()
    (noted,) = journal.note([ready()])
    journal.close()
    assert list(opened().read()) == [noted]


def test_a_note_costs_no_sync(opened, monkeypatch):
    journal = opened()
    journal._store.insert = None
    assert journal.note([ready()])[0].id == 1
    journal._noted.clear()


def test_adopt_takes_what_follows_and_nothing_else(opened, disk_path):
    source, target = opened(), None
    first, second = source.append([ready(), ready()])
    source.close()
    for suffix in ("", "-wal"):
        assert not suffix or not os.path.exists(f"{source.path}{suffix}")
    journal = opened(boot_id="boot-2")
    (noted,) = journal.note([ready()])
    journal._noted.clear()
    journal.close()
    target = opened(boot_id="boot-3")
    with pytest.raises(JournalDamaged, match="does not follow"):
        target.adopt([second])
    target.adopt([noted])
    assert list(target.read()) == [first, second, noted]
    (last,) = target.append([ready()])
    assert (last.id, last.seq) == (4, 4)


def test_a_failed_write_is_fatal_once_and_for_all(opened):
    told = []
    journal = opened(on_fatal=told.append)
    journal.append([ready()])
    journal._store.connection.execute("PRAGMA query_only=ON")
    with pytest.raises(JournalWriteError, match="writing the journal") as failed:
        journal.append([ready()])
    with pytest.raises(JournalWriteError):
        journal.append([ready()])
    with pytest.raises(JournalWriteError):
        journal.note([ready()])
    with pytest.raises(JournalWriteError):
        list(journal.read())
    with pytest.raises(JournalWriteError):
        journal.checkpoint()
    assert told == [failed.value]
    assert failed.value.exit_code == 4
    journal.close()
    assert [record.id for record in opened().read()] == [1]


def test_a_second_writer_would_be_noticed(opened):
    journal = opened()
    journal.append([ready()])
    journal._seqs["vm1.1"] = 0  # as if another process had written number 1 meanwhile
    with pytest.raises(JournalWriteError, match="UNIQUE"):
        journal.append([ready()])


def test_after_close_nothing_is_taken(opened):
    journal = opened()
    journal.close()
    journal.close()
    for call in (
        lambda: journal.append([ready()]),
        lambda: journal.note([ready()]),
        lambda: list(journal.read()),
    ):
        with pytest.raises(JournalError, match="is closed"):
            call()


def test_close_writes_what_is_queued(opened):
    journal = opened()
    futures = [journal.submit([ready()]) for _ in range(50)]
    journal.close()
    assert [future.result(0)[0].id for future in futures] == list(range(1, 51))


def test_durability_is_set_and_read_back(opened):
    connection = opened()._store.connection
    assert pragma(connection, "synchronous") == 2
    assert pragma(connection, "journal_mode") == "wal"
    assert pragma(connection, "locking_mode") == "exclusive"
    assert pragma(connection, "wal_autocheckpoint") == 0


def test_the_log_is_grown_once_and_kept_by_checkpoints(opened, path):
    log = path.with_name("journal.db-wal")
    journal = opened(pregrow=1 << 20)
    assert log.stat().st_size == 1 << 20
    assert not journal.checkpoint_due()
    while not journal.checkpoint_due():
        journal.append([Entry("vm1.1", EffectIntended("k", "x", {"text": "y" * 3000})) for _ in range(20)])
    assert log.stat().st_size == 1 << 20
    rows = len(list(journal.read()))
    journal.checkpoint()
    assert not journal.checkpoint_due()
    journal.append([Entry("luod", DaemonStopped("x"))])
    assert log.stat().st_size == 1 << 20
    assert len(list(journal.read())) == rows + 1


def test_without_checkpoints_no_page_of_the_database_is_written(opened, path):
    journal = opened()
    before = path.read_bytes()
    for _ in range(30):
        journal.append([ready()])
    assert path.read_bytes() == before


texts = st.text(max_size=30)
steps = st.lists(
    st.tuples(
        st.sampled_from(["append", "note", "restart"]), st.lists(st.tuples(st.sampled_from("abc"), texts))
    ),
    max_size=12,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_what_goes_in_comes_out_in_order(opened, disk_path, steps):
    path = disk_path / f"{os.urandom(8).hex()}.db"
    journal, expected = opened(path), []
    for what, content in steps:
        if what == "restart":
            journal.close()
            journal = opened(path)
            continue
        entries = [Entry(stream, DaemonStopped(text)) for stream, text in content]
        expected += [(entry.stream, entry.event) for entry in entries]
        (journal.append if what == "append" else journal.note)(entries)
    journal.close()
    journal = opened(path)
    assert [(record.stream, record.event()) for record in journal.read()] == expected
    journal.close()
