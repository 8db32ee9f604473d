# SPDX-License-Identifier: Apache-2.0
"""The Live Update Orchestrator as a pure model: one object is one boot of one kernel.

No I/O happens here: files are opaque objects, arguments are the raw structs, answers are objects or `Refused(errno)`. The order
of the checks is the kernel's (kernel/liveupdate/luo_core.c, luo_session.c, luo_file.c of Linux 7.3), since callers can see it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..liveupdate import abi
from .faults import Faults
from .handlers import File, FileHandler, Payload, Refused, RetrieveStatus

SESSIONS_PER_BLOCK = 51
MAX_SESSIONS = 10_000 * SESSIONS_PER_BLOCK
MAX_FILES = 10_000 * 63

_DEVICE_REQUESTS = (abi.CREATE_SESSION, abi.RETRIEVE_SESSION)
_SESSION_SIZES = {
    abi.PRESERVE_FD: abi.S_FD.size,
    abi.RETRIEVE_FD: abi.S_FD.size,
    abi.FINISH: abi.S_FINISH.size,
    abi.GET_NAME: abi.S_NAME.size,
}


class Blocked(Exception):
    """The call sleeps uninterruptibly: sessions are serialized, and the jump is all that can follow."""


@dataclass
class Outgoing:
    """A file preserved in an outgoing session."""

    token: int
    handler: FileHandler
    file: File
    data: Payload


@dataclass
class Incoming:
    """A file that came with the last kexec: not tried yet, retrieved (`file`), or failed for ever (`error`)."""

    token: int
    handler: FileHandler
    payload: Payload
    file: File | None = None
    error: int = 0

    @property
    def status(self) -> RetrieveStatus:
        """How far its retrieval got."""
        if self.file is not None:
            return "retrieved"
        return "failed" if self.error else "untouched"


@dataclass(frozen=True)
class FileRecord:
    """A file as it crosses the jump."""

    compatible: str
    token: int
    payload: Payload


@dataclass(frozen=True)
class SessionRecord:
    """A session as it crosses the jump."""

    name: bytes
    files: tuple[FileRecord, ...]


@dataclass(eq=False)
class Session:
    """A session of this boot. `incoming` says where it comes from; an outgoing one is never `retrieved`."""

    name: bytes
    incoming: bool
    retrieved: bool = False
    leaked: bool = False
    out: dict[int, Outgoing] = field(default_factory=dict[int, Outgoing])
    arrived: dict[int, Incoming] = field(default_factory=dict[int, Incoming])

    def preserved(self) -> Iterable[tuple[int, str, File, Payload]]:
        """Yield what is preserved here, in order of preservation."""
        for entry in self.out.values():
            yield entry.token, entry.handler.compatible, entry.file, entry.data


def user_size(buf: bytes | bytearray) -> int:
    """Read the u32 `size` every argument starts with; EFAULT when there is not that much to read."""
    if len(buf) < 4:
        raise Refused(errno.EFAULT)
    return int.from_bytes(buf[:4], "little")


def copy_struct(buf: bytes | bytearray, size: int, known: int) -> bytes:
    """Take the argument in as copy_struct_from_user() does: EINVAL if short, EFAULT if unreadable, E2BIG if the tail says something."""
    if size < known:
        raise Refused(errno.EINVAL)
    if size > len(buf):
        raise Refused(errno.EFAULT)
    if any(buf[known:size]):
        raise Refused(errno.E2BIG)
    return bytes(buf[:known])


class KernelModel:
    """One boot with live update enabled. `records` is what the kernel before handed over."""

    def __init__(
        self,
        handlers: Iterable[FileHandler],
        records: Iterable[SessionRecord] = (),
        faults: Faults | None = None,
    ) -> None:
        self.handlers = list(handlers)
        self.faults = faults or Faults()
        self.outgoing: dict[bytes, Session] = {}
        self.incoming: dict[bytes, Session] = {}
        self.serialized = False
        self.device_open = False
        self._records = list(records)
        self._deserialize_error: int | None = None
        self._blocks = 0
        self._objects: set[object] = set()
        known = {handler.compatible: handler for handler in self.handlers}
        for record in self._records:
            for file in record.files:
                if file.compatible in known:
                    known[file.compatible].boot(file.payload)

    # -- the device ------------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the device: EBUSY while it is open anywhere, EIO for ever when the handed-over state cannot be rebuilt."""
        if self.device_open:
            raise Refused(errno.EBUSY)
        code = self.faults.errno("open")
        if code:
            raise Refused(code)
        if self._deserialize_error is None:
            self._deserialize_error = self._deserialize()
        if self._deserialize_error:
            raise Refused(errno.EIO)
        self.device_open = True

    def close(self) -> None:
        """Last close of the device: nothing but the device is let go."""
        self.device_open = False

    def _deserialize(self) -> int:
        code = self.faults.errno("deserialize")
        if code:
            return code
        known = {handler.compatible: handler for handler in self.handlers}
        if any(file.compatible not in known for record in self._records for file in record.files):
            return errno.ENOENT
        for record in self._records:
            files = {
                file.token: Incoming(file.token, known[file.compatible], file.payload)
                for file in record.files
            }
            self.incoming[record.name] = Session(record.name, True, arrived=files)
        self._records = []
        return 0

    def device_ioctl(self, request: int, buf: bytes | bytearray) -> Session:
        """CREATE_SESSION or RETRIEVE_SESSION; returns the session that the new fd stands for."""
        if request & 0xFF >= len(_DEVICE_REQUESTS):
            raise Refused(errno.EINVAL)
        size = user_size(buf)
        if request not in _DEVICE_REQUESTS:
            raise Refused(errno.ENOTTY)
        name = abi.S_SESSION.unpack(copy_struct(buf, size, abi.S_SESSION.size))[2]
        if request == abi.CREATE_SESSION:
            return self._create(name)
        return self._retrieve_session(name)

    def _create(self, raw: bytes) -> Session:
        name, terminator, _ = raw.partition(b"\0")
        if not name or not terminator:
            raise Refused(errno.EINVAL)
        self._check_lock()
        code = self.faults.errno("create", session=name)
        if code:
            raise Refused(code)
        self._insert_room()
        if name in self.outgoing:
            raise Refused(errno.EEXIST)
        session = self.outgoing[name] = Session(name, False)
        return session

    def _insert_room(self) -> None:
        # The kernel grows the chain of blocks before it looks for a session of the same name, and does not shrink it when it
        # finds one: with 51 sessions that leaves an empty block behind, which the next kernel refuses to boot with.
        if len(self.outgoing) >= MAX_SESSIONS:
            raise Refused(errno.ENOSPC)
        if len(self.outgoing) == self._blocks * SESSIONS_PER_BLOCK:
            self._blocks += 1

    def _remove_room(self) -> None:
        if len(self.outgoing) <= (self._blocks - 1) * SESSIONS_PER_BLOCK:
            self._blocks -= 1

    @property
    def has_empty_block(self) -> bool:
        """Whether the chain of session blocks ends in one without sessions."""
        return bool(self.outgoing) and len(self.outgoing) <= (self._blocks - 1) * SESSIONS_PER_BLOCK

    def _retrieve_session(self, raw: bytes) -> Session:
        self._check_lock()
        name = raw.partition(b"\0")[0] if b"\0" in raw else raw
        session = self.incoming.get(name)
        if session is None:
            raise Refused(errno.ENOENT)
        if session.retrieved:
            raise Refused(errno.EINVAL)
        code = self.faults.errno("retrieve_session", session=name)
        if code:
            raise Refused(code)
        session.retrieved = True
        return session

    def _check_lock(self) -> None:
        if self.serialized:
            raise Blocked

    # -- sessions --------------------------------------------------------------------------------------------------------------

    def session_ioctl(
        self, session: Session, request: int, buf: bytes | bytearray, file: File | None = None
    ) -> tuple[bytes, File | None]:
        """Run a session ioctl. `file` is what the argument's fd resolves to in the caller, or None if it is not open.

        Returns the struct to write back, and the file whose new fd the caller gets. PRESERVE_FD keeps `file`; every other call
        leaves it with the caller.
        """
        if not abi.PRESERVE_FD & 0xFF <= request & 0xFF <= abi.GET_NAME & 0xFF:
            raise Refused(errno.EINVAL)
        size = user_size(buf)
        if request not in _SESSION_SIZES:
            raise Refused(errno.ENOTTY)
        self._check_direction(session, request)
        arg = copy_struct(buf, size, _SESSION_SIZES[request])
        self._check_lock()
        if request == abi.PRESERVE_FD:
            self._preserve(session, abi.S_FD.unpack(arg)[2], file)
        elif request == abi.RETRIEVE_FD:
            return arg, self._retrieve(session, abi.S_FD.unpack(arg)[2])
        elif request == abi.FINISH:
            self._check_reserved(arg)
            self._finish(session)
        else:
            self._check_reserved(arg)
            # The name is copied in words of 8 bytes: zeros up to the end of its last word, then the caller's own bytes.
            written = session.name.ljust(len(session.name) // 8 * 8 + 8, b"\0")
            return arg[:8] + written + arg[8 + len(written) :], None
        return arg, None

    @staticmethod
    def _check_reserved(arg: bytes) -> None:
        if any(arg[4:8]):
            raise Refused(errno.EINVAL)

    @staticmethod
    def _check_direction(session: Session, request: int) -> None:
        wants_incoming = request in (abi.RETRIEVE_FD, abi.FINISH)
        wants_outgoing = request == abi.PRESERVE_FD
        if (wants_incoming and not session.retrieved) or (wants_outgoing and session.retrieved):
            raise Refused(errno.EINVAL)

    def _preserve(self, session: Session, token: int, file: File | None) -> None:
        if token in session.out:
            raise Refused(errno.EEXIST)
        if len(session.out) >= MAX_FILES:
            raise Refused(errno.ENOSPC)
        if file is None:
            raise Refused(errno.EBADF)
        handler = self._handler_for(file)
        identity = handler.get_id(file)
        if identity in self._objects:
            raise Refused(errno.EBUSY)
        code = self.faults.errno("preserve", session=session.name, token=token)
        if code:
            raise Refused(code)
        data = handler.preserve(file, session)
        self._objects.add(identity)
        session.out[token] = Outgoing(token, handler, file, data)

    def _handler_for(self, file: File) -> FileHandler:
        for handler in self.handlers:
            if handler.can_preserve(file):
                return handler
        raise Refused(errno.ENOENT)

    def _retrieve(self, session: Session, token: int) -> File:
        entry = session.arrived.get(token)
        if entry is None:
            raise Refused(errno.ENOENT)
        if entry.error:
            raise Refused(entry.error)
        if entry.file is None:
            entry.file = self._first_retrieve(session, entry)
            self._objects.add(entry.handler.get_id(entry.file))
        return entry.file

    def _first_retrieve(self, session: Session, entry: Incoming) -> File:
        code = self.faults.errno("retrieve", session=session.name, token=entry.token)
        try:
            if code:
                entry.handler.discard(entry.payload)
                raise Refused(code)
            return entry.handler.retrieve(entry.payload)
        except Refused as refusal:
            entry.error = refusal.code
            raise

    def _finish(self, session: Session) -> None:
        for entry in session.arrived.values():
            ordered = self.faults.errno("can_finish", session=session.name, token=entry.token)
            if ordered or not entry.handler.can_finish(entry.payload, entry.status):
                raise Refused(errno.EBUSY)
        for token in reversed(list(session.arrived)):
            entry = session.arrived.pop(token)
            if entry.file is not None:
                self._objects.discard(entry.handler.get_id(entry.file))
            entry.handler.finish(entry.payload, entry.status)
            if entry.file is not None:
                entry.file.close()

    def session_close(self, session: Session) -> None:
        """Last close of a session fd: an outgoing one is undone, an incoming one finished; one that cannot finish is leaked."""
        self._check_lock()
        if not session.incoming:
            self._unpreserve_all(session)
            del self.outgoing[session.name]
            self._remove_room()
            return
        try:
            self._finish(session)
        except Refused:
            session.leaked = True
            return
        del self.incoming[session.name]

    def _unpreserve_all(self, session: Session) -> None:
        for token in reversed(list(session.out)):
            entry = session.out.pop(token)
            self._objects.discard(entry.handler.get_id(entry.file))
            entry.handler.unpreserve(entry.file, entry.data)
            entry.file.close()

    # -- kexec -----------------------------------------------------------------------------------------------------------------

    def serialize(self) -> None:
        """Freeze every outgoing session, in order of creation, its files in order of preservation; then lock everything.

        A file that will not freeze rolls all of it back, and `Refused` carries its errno.
        """
        done: list[tuple[Session, list[Outgoing]]] = []
        for session in self.outgoing.values():
            frozen: list[Outgoing] = []
            done.append((session, frozen))
            for entry in session.out.values():
                try:
                    self._freeze(session, entry)
                except Refused:
                    self._roll_back(done)
                    raise
                frozen.append(entry)
        self.serialized = True

    def _freeze(self, session: Session, entry: Outgoing) -> None:
        code = self.faults.errno("freeze", session=session.name, token=entry.token)
        if code:
            raise Refused(code)
        entry.handler.freeze(entry.file, entry.data, session)

    @staticmethod
    def _roll_back(done: list[tuple[Session, list[Outgoing]]]) -> None:
        for _, frozen in reversed(done):
            for entry in frozen:
                if entry.handler.can_unfreeze:
                    entry.handler.unfreeze(entry.file, entry.data)

    def jump(self) -> list[SessionRecord]:
        """Leave this boot: what was serialized becomes records, all else of this world is dropped."""
        records = [
            SessionRecord(session.name, tuple(self._carry(session.out.values())))
            for session in self.outgoing.values()
        ]
        self.power_off()
        return records

    @staticmethod
    def _carry(entries: Iterable[Outgoing]) -> Iterator[FileRecord]:
        for entry in entries:
            yield FileRecord(
                entry.handler.compatible, entry.token, entry.handler.carry(entry.file, entry.data)
            )

    def power_off(self) -> None:
        """Drop everything this boot holds, as a cold reboot does."""
        for session in self.outgoing.values():
            for entry in session.out.values():
                entry.file.close()
        for session in self.incoming.values():
            for arrived in session.arrived.values():
                if arrived.file is not None:
                    arrived.file.close()
                elif not arrived.error:
                    arrived.handler.discard(arrived.payload)
        discard(self._records, self.handlers)
        self.outgoing.clear()
        self.incoming.clear()
        self._objects.clear()


def discard(records: Iterable[SessionRecord], handlers: Iterable[FileHandler]) -> None:
    """Drop handed-over records that no kernel takes up."""
    for record in records:
        for file in record.files:
            release = getattr(file.payload, "close", None)
            owner = next((handler for handler in handlers if handler.compatible == file.compatible), None)
            if owner is not None:
                owner.discard(file.payload)
            elif release is not None:
                release()
