# SPDX-License-Identifier: Apache-2.0
"""The socket: accepts connections, turns lines into commands, and commands into replies.

A bad line is answered and forgotten; it never ends the connection of a client whose guest depends on it, unless the stream itself can
no longer be understood. The socket of a living luod is never taken over: a lock file decides, not the socket.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from .. import protocol, wire
from ..adapters.keeper.client import KeeperError
from ..adapters.liveupdate.errors import KernelError
from ..engine.errors import Refused
from ..journal.errors import JournalError
from ..states.errors import BadName, IllegalTransition, LuodError
from .admin import Admin
from .claims import Claims
from .connection import Connection
from .desk import Desk
from .rights import Rights

if TYPE_CHECKING:
    from .core import Luod

log = logging.getLogger("luod")


CODE_OF: tuple[tuple[type[LuodError], str], ...] = (
    (KernelError, "KERNEL"),
    (KeeperError, "CUSTODY"),
    (JournalError, "JOURNAL"),
    (IllegalTransition, "OUT_OF_ORDER"),
    (BadName, "BAD_ID"),
)
"""How errors that are no refusal of luod's own are called on the wire."""


class SocketTaken(LuodError):
    """Another luod serves this run directory."""

    exit_code = 3


class RunDirectory:
    """The lock and the socket of a run directory. Raises `SocketTaken` when another luod has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o755)
            self._lock = os.open(path / "luod.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SocketTaken(
                f"run directory {path} cannot be used: {error.strerror}", hint="check --run"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            raise SocketTaken(
                f"another luod (pid {pid or '?'}) serves {path}",
                hint="stop it first, or choose another --run directory",
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        self.listener: socket.socket | None = None

    def listen(self, name: Path) -> socket.socket:
        """Bind the socket; a leftover of a dead luod is replaced."""
        name.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(str(name))
            name.chmod(0o666)  # who may do what is decided by SO_PEERCRED
            listener.listen(1024)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise SocketTaken(
                f"{name} cannot be bound: {error.strerror}", hint="a path may have 107 bytes at most"
            ) from None
        self.listener = listener
        return listener

    def close(self) -> None:
        """Stop listening and give the lock back."""
        if self.listener is not None:
            self.listener.close()
        os.close(self._lock)


class Server:
    """Serves one socket for one luod."""

    def __init__(self, luod: Luod) -> None:
        self.luod = luod
        self.rights = Rights(luod)
        self.desk = Desk(luod, self.rights)
        self.claims = Claims(luod, self.rights)
        self.admin = Admin(luod, self.rights)

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections for ever."""
        async with anyio.create_task_group() as group:
            while True:
                await anyio.wait_readable(listener)
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    log.error("cannot accept a connection: %s", error)
                    await anyio.sleep(0.1)  # out of descriptors: let others end before trying again
                    continue
                group.start_soon(self._connection, sock)

    async def _connection(self, sock: socket.socket) -> None:
        try:
            connection = Connection(sock, self.luod.config.limits.outbox_bytes)
        except OSError:
            sock.close()
            return
        per_uid = Counter(one.peer.uid for one in self.luod.connections)
        uid = connection.peer.uid
        self.luod.connections.add(connection)
        connection.since = time.monotonic()
        try:
            if not self.rights.is_admin(uid) and per_uid[uid] >= self.luod.config.limits.connections:
                connection.push(
                    _event_error(Refused("LIMIT", f"uid {uid} has {per_uid[uid]} connections already"))
                )
                return
            async with anyio.create_task_group() as group:
                group.start_soon(connection.pump)
                while (frames := await connection.receive()) is not None:
                    for frame in frames:
                        await self._frame(connection, frame)
                connection.close()
        finally:
            with anyio.CancelScope(shield=True):
                connection.close()
                clients = self.luod.detach(connection)
                await self.claims.left(connection, clients)

    async def _frame(self, connection: Connection, frame: wire.Frame | wire.ProtocolError) -> None:
        if isinstance(frame, wire.ProtocolError):
            connection.push(_event_error(frame) if frame.seq is None else _reply_error(frame.seq, frame))
            return
        seq = frame.obj.get("seq")
        seq = seq if isinstance(seq, int) and not isinstance(seq, bool) else None
        try:
            command = protocol.parse_command(frame.obj)
            reply = await self._obey(connection, command, frame.fds)
        except LuodError as error:
            connection.push(_reply_error(seq, error) if seq is not None else _event_error(error))
        except (ValueError, TypeError, LookupError, OSError) as error:
            # One caller's odd request must not end what others' guests depend on; the journal's own failures end luod elsewhere.
            log.exception("a command of pid %s failed", connection.peer.pid)
            wrong = LuodError(
                f"luod failed at this command: {error}", hint="see luod's log; this is a bug in luod"
            )
            connection.push(_reply_error(seq, wrong) if seq is not None else _event_error(wrong))
        else:
            if reply is not None and seq is not None:
                self._answer(connection, seq, reply)
        finally:
            for fd in frame.fds:
                os.close(fd)

    def _answer(self, connection: Connection, seq: int, reply: dict[str, Any]) -> None:
        try:
            connection.push({"reply": seq, "ok": True, **reply})
        except wire.ProtocolError as error:
            connection.push(_reply_error(seq, error))

    async def _obey(self, connection: Connection, command: Any, fds: list[int]) -> dict[str, Any] | None:
        desk, claims, admin = self.desk, self.claims, self.admin
        match str(command.__struct_config__.tag):
            case "HELLO":
                return await desk.hello(connection, command)
            case "PING":
                return {}
            case "SUBSCRIBE":
                return await desk.subscribe(connection, command)
            case "UNSUBSCRIBE":
                return await desk.unsubscribe(connection, command)
            case "PRESERVED":
                return await desk.preserved(connection, command)
            case "READY":
                return await desk.ready(connection, command)
            case "NACK":
                return await desk.nack(connection, command)
            case "ABORTED":
                return await desk.aborted(connection, command)
            case "ADOPT":
                return await desk.adopt(connection, command, fds)
            case "CLAIM":
                await claims.claim(connection, command)
                return None
            case "RESTORED":
                return await claims.restored(connection, command)
            case "FINISHED":
                return await claims.finished(connection, command)
            case "STATUS":
                return await admin.status(connection)
            case "CLIENTS":
                return await admin.clients(connection, command.after)
            case "SESSIONS":
                return await admin.sessions(connection, command.after)
            case "SESSION":
                return await admin.session(connection, command.id)
            case "JOURNAL":
                return await admin.journal(connection, command)
            case "WATCH":
                return await admin.watch(connection, command.after)
            case "LOAD":
                return await admin.load(connection, command)
            case "KEXEC":
                return await admin.kexec(connection, command)
            case "ABORT":
                return await admin.abort(connection, command)
            case "RESOLVE":
                return await admin.resolve(connection, command)
            case other:
                raise Refused(
                    "UNKNOWN_COMMAND", f"{other} is not served", hint="docs/protocol.md lists the commands"
                )


def _error(error: LuodError) -> dict[str, Any]:
    code = getattr(error, "code", "") or next(
        (name for kind, name in CODE_OF if isinstance(error, kind)), "INTERNAL"
    )
    body: dict[str, Any] = {"code": code, "message": error.message, "hint": error.hint}
    number = getattr(error, "errno", "")
    if isinstance(number, int) and number:
        import errno as numbers

        body["errno"] = numbers.errorcode.get(number, str(number))
    elif isinstance(number, str) and number:
        body["errno"] = number
    return body


def _reply_error(seq: int, error: LuodError) -> dict[str, Any]:
    return {"reply": seq, "ok": False, "error": _error(error)}


def _event_error(error: LuodError) -> dict[str, Any]:
    return {"event": "ERROR", "error": _error(error)}


__all__ = ["RunDirectory", "Server", "SocketTaken"]
