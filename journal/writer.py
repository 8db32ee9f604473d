# SPDX-License-Identifier: Apache-2.0
"""The journal as the rest of luod knows it: one writer thread, and one fsync for everything that waits.

While the writer syncs one transaction, new entries queue up; the next transaction takes all of them. So the cost of an fsync is
shared by as many sessions as are busy, and nobody waits for a timer.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

import msgspec

from ..states import codec
from .errors import JournalDamaged, JournalError, JournalWriteError
from .record import Entry, Record, follows, link, payload
from .sqlite import sqlite
from .store import PREGROW, Store

Mirror = Callable[[Sequence[Record]], None]
Clock = Callable[[], tuple[int, int]]
_PAGE = 500  # rows read under the lock at a time, so that a long read does not hold up the writer
_GROUP = 4096  # entries in one transaction at most
_log = logging.getLogger("luod.journal")


def now() -> tuple[int, int]:
    """Return CLOCK_REALTIME and CLOCK_BOOTTIME in nanoseconds."""
    return time.time_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class _Item(msgspec.Struct, frozen=True):
    """An entry with its event encoded."""

    stream: str
    type: str
    body: bytes
    cause: int | None


class _Job:
    """What one call to `submit` asked for."""

    def __init__(self, items: list[_Item]) -> None:
        self.items = items
        self.future: Future[list[Record]] = Future()
        self.future.set_running_or_notify_cancel()  # a write that is under way cannot be taken back


class Journal:
    """A journal open for writing. Safe from any thread.

    `mirror` gets every new record, in order, once: after its commit and before the future of its call resolves. `on_fatal` is called
    once, from the thread that found out, when a write fails: the process must end then, for only the next start can tell what
    became of the last transaction.
    """

    def __init__(
        self,
        store: Store,
        *,
        boot_id: str,
        run_id: str,
        mirror: Mirror | None = None,
        on_fatal: Callable[[JournalWriteError], None] | None = None,
        clock: Clock = now,
    ) -> None:
        self.path = store.path
        self.journal_id = store.journal_id
        self.torn = store.torn
        self._store = store
        self._boot_id, self._run_id = boot_id, run_id
        self._mirror, self._on_fatal, self._clock = mirror, on_fatal, clock
        self._lock = threading.Lock()
        self._tip = store.head
        self._seqs = dict(store.seqs)
        self._noted: list[Record] = []
        self._fatal: JournalWriteError | None = None
        self._closed = False
        self._admission = threading.Lock()
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="luod-journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        boot_id: str,
        run_id: str,
        volatile: bool = False,
        mirror: Mirror | None = None,
        on_fatal: Callable[[JournalWriteError], None] | None = None,
        pregrow: int = PREGROW,
        clock: Clock = now,
    ) -> Journal:
        """Open the journal at `path`, or make it. All of it is read and checked first.

        `volatile` allows a file system that forgets. `pregrow` is the size in bytes to which the log is written at start; 0
        leaves it to grow. Raises `JournalBusy`, `JournalVolatile`, `JournalMissing`, `NotAJournal`, `NewerSchema`,
        `JournalDamaged`, `JournalWriteError`.
        """
        store = Store.open(Path(path), volatile=volatile, pregrow=pregrow)
        return cls(store, boot_id=boot_id, run_id=run_id, mirror=mirror, on_fatal=on_fatal, clock=clock)

    # -- writing

    def submit(self, entries: Sequence[Entry]) -> Future[list[Record]]:
        """Queue entries for one transaction; the future resolves to their records once they are durable.

        Calls are written in the order they were made. A future cannot be cancelled. Raises `JournalError` at once after `close`
        and for entries that make no sense; after a failed write the future holds `JournalWriteError`.
        """
        job = _Job([_encode(entry) for entry in entries])
        with self._admission:
            if self._closed:
                raise JournalError(f"the journal {self.path} is closed", hint="open it again")
            self._queue.put(job)
        return job.future

    def append(self, entries: Sequence[Entry]) -> list[Record]:
        """Write entries in one transaction and return their records once they are durable."""
        return self.submit(entries).result()

    def note(self, entries: Sequence[Entry]) -> list[Record]:
        """Give entries their place and hand them to the mirror only: no fsync, for the last microseconds before a kexec.

        They are written with the next transaction, or by `close`; after a kexec the mirror brings them back. Entries still in
        the queue come behind them. Raises what the mirror raises, and `JournalWriteError` after a failed write.
        """
        items = [_encode(entry) for entry in entries]
        with self._lock:
            self._check_alive()
            records = self._place(items)
            self._noted.extend(records)
            if self._mirror is not None:
                self._mirror(records)
            return records

    def adopt(self, records: Sequence[Record]) -> None:
        """Write ready-made records that follow the head: what the mirror had and the disk had not. Durable on return.

        Raises `JournalDamaged` when they do not follow; then none is written.
        """
        with self._lock:
            self._check_alive()
            last, seqs = self._tip, dict(self._seqs)
            for record in records:
                runs_on = record.id == last[0] + 1 and record.seq == seqs.get(record.stream, 0) + 1
                if not runs_on or not follows(last[1], record):
                    raise JournalDamaged(
                        f"record {record.id} does not follow record {last[0]} of {self.path}",
                        hint="the black box belongs to another journal",
                    )
                last, seqs[record.stream] = (record.id, record.chain), record.seq
            if not records:
                return
            self._tip, self._seqs = last, seqs
            self._commit([*self._noted, *records])
            self._noted.clear()
        self._announce()
        self._raise_fatal()

    def set_mirror(self, mirror: Mirror | None) -> None:
        """Send new records to another mirror, from the next transaction on."""
        with self._lock:
            self._mirror = mirror

    # -- reading

    def read(self, after: int = 0) -> Iterator[Record]:
        """Yield the durable records behind id `after`, as far as they go when they are reached."""
        while True:
            with self._lock:
                self._check_alive()
                page = self._store.rows(after, _PAGE)
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].id

    def head(self) -> tuple[int, bytes]:
        """Return id and chain value of the last durable record."""
        with self._lock:
            return self._store.head

    def chain_at(self, id: int) -> bytes | None:
        """Return the chain value of a durable record; for 0 the one that the first record follows; None for no such record."""
        with self._lock:
            self._check_alive()
            return self._store.chain_at(id)

    # -- care

    def checkpoint(self) -> None:
        """Move the log into the database; never done by itself, for it costs fsyncs. Raises `JournalWriteError`."""
        with self._lock:
            self._check_alive()
            try:
                self._store.checkpoint()
            except (sqlite.Error, OSError, JournalWriteError) as error:
                self._fail(error)
        self._announce()
        self._raise_fatal()

    def checkpoint_due(self) -> bool:
        """Tell whether the log is more than half of its pre-grown size: a quiet moment should be used for `checkpoint`."""
        with self._lock:
            return self._store.log_used() > self._store.pregrow // 2

    def close(self) -> None:
        """Write what is queued and noted, end the writer, close the file. A second call does nothing."""
        with self._admission:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        with self._lock:
            try:
                if self._noted and self._fatal is None:
                    self._commit(self._noted)
                    self._noted = []
            finally:
                with contextlib.suppress(sqlite.Error):
                    self._store.close()
        self._announce()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the writer thread

    def _work(self) -> None:
        closing = False
        while not closing:
            jobs: list[_Job] = []
            job = self._queue.get()
            with contextlib.suppress(Empty):
                size = 0
                while job is not None:
                    jobs.append(job)
                    size += len(job.items)
                    if size >= _GROUP:
                        break
                    job = self._queue.get_nowait()
            closing = job is None
            if jobs:
                self._write(jobs)

    def _write(self, jobs: list[_Job]) -> None:
        done: list[list[Record]] = []
        with self._lock:
            if self._fatal is None:
                noted, self._noted = self._noted, []
                for job in jobs:
                    done.append(self._place(job.items))
                fresh = [record for records in done for record in records]
                self._commit([*noted, *fresh])
                if self._fatal is None:
                    self._reflect(fresh)
            fatal = self._fatal
        self._announce()
        for index, job in enumerate(jobs):
            if fatal is None:
                job.future.set_result(done[index])
            else:
                job.future.set_exception(fatal)

    def _place(self, items: Sequence[_Item]) -> list[Record]:
        wall_ns, boot_ns = self._clock()
        records: list[Record] = []
        for item in items:
            id, seq = self._tip[0] + 1, self._seqs.get(item.stream, 0) + 1
            cause = item.cause
            if cause is not None and cause < 0:
                cause = records[cause].id if -cause <= len(records) else None
            boot, run = self._boot_id, self._run_id
            data = payload(id, item.stream, seq, item.type, wall_ns, boot_ns, boot, run, cause, item.body)
            chain = link(self._tip[1], data)
            records.append(
                Record(id, item.stream, seq, item.type, wall_ns, boot_ns, boot, run, cause, item.body, chain)
            )
            self._tip, self._seqs[item.stream] = (id, chain), seq
        return records

    def _commit(self, records: Sequence[Record]) -> None:
        if not records:
            return
        try:
            self._store.insert(records)
        except Exception as error:  # whatever it was, the state of the transaction is unknown
            self._fail(error)

    def _reflect(self, records: Sequence[Record]) -> None:
        if self._mirror is None or not records:
            return
        try:
            self._mirror(records)
        except Exception:  # the disk has them: the journal goes on without its mirror
            self._mirror = None
            _log.exception("the black box of %s cannot be written; going on without it", self.path)

    def _fail(self, error: BaseException) -> None:
        if self._fatal is not None:
            return
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        fatal = JournalWriteError(
            f"writing the journal {self.path} failed: {error} ({name})",
            hint="luod must end; the next start finds out what was written. Free space or repair the disk first",
        )
        fatal.__cause__ = error
        self._fatal = fatal

    def _announce(self) -> None:
        """Call `on_fatal`, once, without holding the lock."""
        with self._lock:
            tell, fatal = self._on_fatal, self._fatal
            if fatal is None or tell is None:
                return
            self._on_fatal = None
        tell(fatal)

    def _check_alive(self) -> None:
        if self._closed:
            raise JournalError(f"the journal {self.path} is closed", hint="open it again")
        self._raise_fatal()

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal


def _encode(entry: Entry) -> _Item:
    if not entry.stream or len(entry.stream) > 200 or not entry.stream.isprintable():
        raise JournalError(
            f"{entry.stream[:80]!r} cannot name a stream", hint="1 to 200 printable characters"
        )
    if entry.cause == 0:
        raise JournalError(
            "a cause is the id of a record, from 1, or counts back from -1", hint="use None for no cause"
        )
    type, body = codec.encode(entry.event)
    return _Item(entry.stream, type, body, entry.cause)
