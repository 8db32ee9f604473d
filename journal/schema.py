# SPDX-License-Identifier: Apache-2.0
"""The steps to the layout of the database that `layout` names. Layouts only grow: each step is one migration in one transaction.

`user_version` counts the steps, so that an older luod sees at once that it must keep away.
"""

from __future__ import annotations

from sqlite_utils import Database, Migrations

migrations = Migrations("luod.journal")


@migrations()
def m001_events(db: Database) -> None:
    """Events in one table; the identity of the journal in another."""
    execute = db.conn.execute  # within the transaction that the migration opened
    execute(
        "CREATE TABLE journal(only_row INTEGER PRIMARY KEY CHECK (only_row = 1), uuid TEXT NOT NULL,"
        " created_wall_ns INTEGER NOT NULL, genesis BLOB NOT NULL) STRICT"
    )
    execute(
        "CREATE TABLE events(id INTEGER PRIMARY KEY, stream TEXT NOT NULL, seq INTEGER NOT NULL, type TEXT NOT NULL,"
        " wall_ns INTEGER NOT NULL, boot_ns INTEGER NOT NULL, boot_id TEXT NOT NULL, run_id TEXT NOT NULL,"
        " cause INTEGER, body BLOB NOT NULL, chain BLOB NOT NULL, UNIQUE(stream, seq)) STRICT"
    )
    execute("PRAGMA user_version = 1")
