# SPDX-License-Identifier: Apache-2.0
"""The one place that chooses the SQLite module: the one that sqlite-utils chooses, so that its exceptions are ours.

sqlite-utils itself is not imported: it is needed for migrations alone, and takes a third of the time in which luod starts after a kexec.

With pysqlite3 installed that is a SQLite without the log-reset bug of 3.7.0 to 3.51.2 (https://www.sqlite.org/wal.html#walresetbug).
A journal is open in exclusive mode by one connection, which the bug needs two of; so an older SQLite is safe too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    import sqlite3 as sqlite
else:
    try:
        import pysqlite3 as sqlite
    except ImportError:
        import sqlite3 as sqlite

__all__ = ["READ_ERRORS", "Connection", "connect", "inspect", "pragma", "sqlite"]

Connection = sqlite.Connection
READ_ERRORS = (sqlite.Error, UnicodeError)
"""What reading a damaged file raises; UnicodeError comes from the module itself, over the text of SQLite's own message."""


def _text(data: bytes) -> str:
    # A damaged text must be readable to be reported; surrogates keep its bytes and spoil its chain value.
    return data.decode("utf-8", "surrogateescape")


def pragma(connection: Connection, statement: str) -> Any:
    """Run a pragma and return its first value, or None."""
    row = connection.execute(f"PRAGMA {statement}").fetchone()
    return row[0] if row else None


def connect(path: Path) -> Connection:
    """Open the database for writing, alone. Nothing is read or locked before the first statement that needs it."""
    connection = sqlite.connect(
        path, isolation_level=None, check_same_thread=False, timeout=0, cached_statements=32
    )
    connection.text_factory = _text
    pragma(connection, "locking_mode=EXCLUSIVE")  # before the log is touched: no shared memory file
    pragma(connection, "cell_size_check=ON")
    pragma(connection, "trusted_schema=OFF")
    return connection


def inspect(path: Path) -> Connection:
    """Open the database and its log for reading, changing neither, not even on close.

    The descriptor is read-only and no lock is taken: the caller makes sure that nobody writes.
    """
    uri = f"file:{quote(str(path.absolute()))}?mode=ro&vfs=unix-none"
    connection = sqlite.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=0)
    connection.text_factory = _text
    for setting in ("locking_mode=EXCLUSIVE", "cell_size_check=ON", "trusted_schema=OFF", "query_only=ON"):
        pragma(connection, setting)
    return connection
