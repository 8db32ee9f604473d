# SPDX-License-Identifier: Apache-2.0
"""Opening: what is made, and what is refused without a byte changed."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from luod.journal import layout, store, volume
from luod.journal.errors import (
    JournalBusy,
    JournalDamaged,
    JournalError,
    JournalMissing,
    JournalVolatile,
    NewerSchema,
    NotAJournal,
)
from luod.journal.record import Entry
from luod.journal.sqlite import connect, pragma, sqlite
from luod.journal.writer import Journal
from luod.states.events import SessionReady


def contents(directory: Path):
    return {
        file.name: file.read_bytes()
        for file in directory.iterdir()
        if file.is_file() and file.suffix != ".lock"
    }


def refuses(path: Path, error: type[JournalError], match: str) -> JournalError:
    before = contents(path.parent)
    with pytest.raises(error, match=match) as refused:
        Journal.open(path, boot_id="b", run_id="r")
    assert contents(path.parent) == before
    assert refused.value.hint
    return refused.value


def filled(path: Path, rows: int = 30) -> None:
    with Journal.open(path, boot_id="b", run_id="r", pregrow=0) as journal:
        for _ in range(rows):
            journal.append([Entry("vm1.1", SessionReady())])


def change(path: Path, *statements: str) -> None:
    connection = sqlite.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_a_new_journal_is_private_and_says_what_it_is(opened, path):
    opened().close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.with_name("journal.db.lock").stat().st_mode) == 0o600
    assert path.read_bytes()[68:72] == b"luod"
    assert sorted(contents(path.parent)) == ["journal.db"]


def test_the_log_is_private_too(opened, path):
    opened()
    assert stat.S_IMODE(path.with_name("journal.db-wal").stat().st_mode) == 0o600


def test_a_half_made_journal_is_made_again(opened, path):
    path.with_name("journal.db.new").write_bytes(b"half")
    assert opened().head()[0] == 0


def test_a_second_opener_hears_who_has_it(path):
    code = (
        "import sys; from luod.journal.writer import Journal\n"
        "j = Journal.open(sys.argv[1], boot_id='b', run_id='r', pregrow=0); print('ready', flush=True); sys.stdin.read(); j.close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(JournalBusy, match=f"{path} is in use by process {holder.pid}") as busy:
            Journal.open(path, boot_id="b", run_id="r")
        assert busy.value.pid == holder.pid
        holder.stdin.close()
        assert holder.wait(30) == 0


def test_a_link_to_the_journal_is_the_same_journal(opened, path):
    opened()
    link = path.with_name("link.db")
    link.hardlink_to(path)
    with pytest.raises(JournalBusy):
        Journal.open(link, boot_id="b", run_id="r")


def test_a_newer_layout_is_left_alone(path):
    filled(path)
    change(path, f"PRAGMA user_version={layout.VERSION + 1}")
    assert refuses(path, NewerSchema, "has layout 2").exit_code == 5


def test_a_newer_layout_that_stands_in_the_log_alone_is_left_alone(path):
    filled(path)
    pid = os.fork()
    if pid == 0:
        connection = connect(path)
        connection.execute("PRAGMA user_version=9")
        os._exit(0)  # no close: it would move the log into the file
    assert os.waitpid(pid, 0)[1] == 0
    assert path.with_name("journal.db-wal").stat().st_size
    refuses(path, NewerSchema, "has layout 9")


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"garbage " * 100, NotAJournal, "not a SQLite database"),
        (b"", JournalDamaged, "the file is empty"),
        (bytes(8192), JournalDamaged, "begins with zeros"),
    ],
)
def test_what_is_no_journal_is_refused(path, content, error, match):
    path.write_bytes(content)
    refuses(path, error, match)


def test_a_database_of_somebody_else_is_refused(path):
    change(path, "CREATE TABLE t(a)")
    refuses(path, NotAJournal, "another application")


def test_a_directory_is_refused(path):
    path.mkdir()
    refuses(path, NotAJournal, "it is a directory")


def test_a_socket_is_refused(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        refuses(path, NotAJournal, "not a regular file")


def test_a_missing_directory_is_told(path):
    with pytest.raises(JournalMissing, match="ENOENT"):
        Journal.open(path.parent / "none" / "journal.db", boot_id="b", run_id="r")


def test_a_log_without_its_database_is_not_used_for_a_new_one(path):
    path.with_name("journal.db-wal").write_bytes(b"frames")
    refuses(path, JournalDamaged, "journal.db-wal is there and journal.db is not")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_directory_without_permission_is_told(path):
    path.parent.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            Journal.open(path, boot_id="b", run_id="r")
        except JournalMissing as error:
            status = 0 if "EACCES" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_memory_is_refused_unless_it_is_wanted(tmp_path):
    memory = Path("/dev/shm") / f"luod-test-{os.getpid()}"
    memory.mkdir()
    try:
        with pytest.raises(JournalVolatile, match="is on tmpfs, which is lost at a reboot"):
            Journal.open(memory / "journal.db", boot_id="b", run_id="r")
        Journal.open(memory / "journal.db", boot_id="b", run_id="r", volatile=True, pregrow=0).close()
    finally:
        for file in memory.iterdir():
            file.unlink()
        memory.rmdir()


@pytest.mark.parametrize("magic", volume.UNSUITABLE)
def test_every_unsuitable_file_system_is_refused(disk_path, monkeypatch, magic):
    monkeypatch.setattr(volume, "magic", lambda path: magic)
    with pytest.raises(JournalVolatile, match=volume.UNSUITABLE[magic][0]):
        volume.check(disk_path)
    volume.check(disk_path, volatile=True)


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        (
            "UPDATE events SET wall_ns = (wall_ns | 4) - (wall_ns & 4) WHERE id = 7",
            "row 7, column wall_ns: one bit is flipped",
        ),
        ("UPDATE events SET body = x'7b' WHERE id = 7", "row 7: the row does not hash"),
        ("UPDATE events SET chain = zeroblob(16) WHERE id = 7", "row 7"),
        ("DELETE FROM events WHERE id = 7", "row 7: no such rows"),
        ("UPDATE events SET id = 99 WHERE id = 7", "row 7: no such rows"),
        ("UPDATE journal SET uuid = 'x'", "the identity of the journal was changed"),
        ("DROP TABLE journal", "the identity of the journal cannot be read"),
        ("DELETE FROM journal", "the identity of the journal is missing"),
        ("PRAGMA user_version=0", "the layout number is 0"),
    ],
)
def test_a_changed_journal_is_not_acted_on(path, statement, match):
    filled(path)
    change(path, statement)
    assert refuses(path, JournalDamaged, match).damage


def test_a_lost_tail_is_known_from_the_index(path):
    filled(path)
    connection = sqlite.connect(path, isolation_level=None)
    root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'events'").fetchone()[0]
    depth = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.close()
    raw = bytearray(path.read_bytes())
    for page in range(root, depth + 1):  # take the last cell off the leaf that ends the table
        at = (page - 1) * 4096
        cells = int.from_bytes(raw[at + 3 : at + 5], "big")
        if raw[at] == 13 and cells > 1:
            last = at, cells
    raw[last[0] + 3 : last[0] + 5] = (last[1] - 1).to_bytes(2, "big")
    path.write_bytes(raw)
    refuses(path, JournalDamaged, "the index of streams")


def test_a_failed_opening_leaves_no_lock_behind(opened, path):
    path.write_bytes(b"garbage " * 100)
    refuses(path, NotAJournal, "not a SQLite")
    path.unlink()
    assert opened().head()[0] == 0


def test_durability_that_does_not_stick_is_refused(path, monkeypatch):
    real = store.pragma

    def lying(connection, statement):
        return 1 if statement == "synchronous" else real(connection, statement)

    monkeypatch.setattr(store, "pragma", lying)
    with pytest.raises(JournalError, match="synchronous=1"):
        Journal.open(path, boot_id="b", run_id="r")


def test_the_layout_is_recorded_by_its_migration(opened, path):
    connection = opened()._store.connection
    assert pragma(connection, "user_version") == layout.VERSION
    assert connection.execute("SELECT name FROM _sqlite_migrations").fetchall() == [("m001_events",)]
