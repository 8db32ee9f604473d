# SPDX-License-Identifier: Apache-2.0
"""The admin's side of the socket: what there is, and the verbs that move a whole host.

Observing is open to everybody for what is theirs; loading, kexec, abort of an update and resolve need an admin uid.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import msgspec

from .. import __version__
from ..engine.errors import Refused
from ..engine.ports import Intent
from ..states import events as ev
from ..states.fold import Session
from ..views import record_json, session_json, update_json
from .connection import Connection
from .rights import Rights

if TYPE_CHECKING:
    from ..journal.record import Record
    from .core import Luod

Reply = dict[str, Any]
PAGE_BYTES = 48_000


class Admin:
    """Serves observers and admins of one luod."""

    def __init__(self, luod: Luod, rights: Rights) -> None:
        self.luod = luod
        self.engine = luod.engine
        self.rights = rights
        self._loading = anyio.Lock()

    def _only_admin(self, connection: Connection, verb: str) -> None:
        if not self.rights.is_admin(connection.peer.uid):
            raise Refused(
                "NOT_ALLOWED",
                f"{verb} is not for uid {connection.peer.uid}",
                hint="an admin uid may: root, or `admins` in luod.toml",
            )

    def _visible(self, connection: Connection) -> list[Session]:
        return [one for one in self.engine.book.sessions() if self.rights.may_see(connection, one)]

    # -- looking

    async def status(self, connection: Connection) -> Reply:
        """Return the whole host at a glance."""
        kernel = await anyio.to_thread.run_sync(self.luod.kernel.status)
        loaded = kernel.state in ("ok", "busy") and await anyio.to_thread.run_sync(self.luod.kernel.loaded)
        rows, head = self.luod.journal.head()
        updates = self.engine.book.updates()
        visible = self._visible(connection)
        ids = {one.id for one in visible}
        if self.rights.is_admin(connection.peer.uid):
            ids |= {"luod", *(one.id for one in updates)}
        return {
            "version": __version__,
            "pid": os.getpid(),
            "boot_id": self.engine.boot_id,
            "kernel": {"backend": self.luod.config.kernel, **msgspec.to_builtins(kernel)},
            "journal": {"path": str(self.luod.config.journal_path), "rows": rows, "head": head.hex()},
            "update": update_json(updates[-1]) if updates else None,
            "sessions": dict(Counter(str(one.state) for one in visible)),
            "clients": sum(bool(one.clients) for one in self.luod.connections),
            "keeper": self.luod.second_holder.view(),
            "image_loaded": loaded,
            "in_doubt": [
                {"key": effect.key, "kind": effect.kind, "stream": stream, "status": effect.status}
                for stream, effect in self.engine.doubts()
                if stream in ids
            ],
        }

    async def sessions(self, connection: Connection, after: str) -> Reply:
        """Return the sessions that the caller may see, as many as fit in a line; `next` is what to ask for after it."""
        rows, more = page([session_json(one) for one in self._visible(connection)], after)
        return {"sessions": rows, "next": more}

    async def session(self, connection: Connection, name: str) -> Reply:
        """Return one session, by its id or by its client's id."""
        book = self.engine.book
        found = book.session(name) or book.of_client(name)
        if found is None or found.seq == 0 or not self.rights.may_see(connection, found):
            raise Refused("UNKNOWN_ID", f"there is no session {name!r}", hint="`luoctl sessions` lists them")
        return {"session": session_json(found)}

    async def clients(self, connection: Connection, after: str) -> Reply:
        """Return the connected clients that the caller may see, paged like the sessions."""
        rows: list[Reply] = []
        for one in self.luod.connections:
            if one.peer.uid != connection.peer.uid and not self.rights.is_admin(connection.peer.uid):
                continue
            for client in one.clients:
                session = self.engine.book.of_client(client)
                rows.append({
                    "id": client, "uid": one.peer.uid, "pid": one.peer.pid, "features": sorted(one.features),
                    "session": session.id if session else None, "state": str(session.state) if session else None,
                    "connected_s": round(time.monotonic() - one.since, 3),
                })  # fmt: skip
        fitting, more = page(sorted(rows, key=lambda row: str(row["id"])), after)
        return {"clients": fitting, "next": more}

    async def journal(self, connection: Connection, command: Any) -> Reply:
        """Return records of the journal, oldest first."""
        limit = max(1, min(command.limit or 1000, 1000))
        out: list[Reply] = []
        size = 0
        for record in self.luod.journal.read(command.after or 0):
            if (command.stream and record.stream != command.stream) or not self.may_read(
                connection, record.stream
            ):
                continue
            one = record_json(record)
            size += len(msgspec.json.encode(one)) + 1
            if out and size > PAGE_BYTES:
                break
            out.append(one)
            if len(out) >= limit:
                break
        return {"records": out, "head": self.luod.journal.head()[0]}

    def may_read(self, connection: Connection, stream: str) -> bool:
        """Say whether a caller may read a stream of the journal."""
        if self.rights.is_admin(connection.peer.uid):
            return True
        session = self.engine.book.session(stream)
        return session is not None and self.rights.may_see(connection, session)

    async def watch(self, connection: Connection, after: int | None) -> Reply:
        """Send every record from now on, or from a journal id on, as PROGRESS events."""
        if connection.watching:
            raise Refused("OUT_OF_ORDER", "this connection watches already", hint="open another one")
        connection.watching = True
        last = after if after is not None else self.luod.journal.head()[0]

        def push(record: Record) -> None:
            nonlocal last
            if record.id <= last:
                return
            last = record.id
            if self.may_read(connection, record.stream) and not connection.closed:
                connection.push({"event": "PROGRESS", "record": record_json(record)})
            if connection.closed:
                stop()

        for record in list(self.luod.journal.read(last)):
            push(record)
        stop = self.luod.watch(push)
        connection.on_close.append(stop)
        return {"head": last}

    # -- moving

    async def load(self, connection: Connection, command: Any) -> Reply:
        """Load the next kernel and record what it is."""
        self._only_admin(connection, "LOAD")
        if "\0" in command.cmdline:
            raise Refused("BAD_FIELD", "LOAD: a command line cannot hold a NUL byte")
        async with self._loading:
            kernel, initrd = Path(command.kernel), command.initrd or ""
            if any("\0" in text for text in (command.kernel, initrd, command.cmdline)):
                raise Refused("BAD_FIELD", "LOAD: a NUL byte ends a path", hint="give it without")
            digest = await anyio.to_thread.run_sync(_digest, kernel)
            initrd_digest = await anyio.to_thread.run_sync(_digest, Path(initrd)) if initrd else ""
            args = {"kernel": str(kernel), "initrd": initrd, "cmdline": command.cmdline}
            (done,) = await self.engine.perform(Intent("luod", "luod/load", "update.load", args), again=True)
            if done.status != "done":
                raise Refused("KERNEL", f"{kernel} could not be loaded: {done.message}")
            image = ev.ImageLoaded(str(kernel), initrd, command.cmdline, digest, initrd_digest)
            await self.engine.record(("luod", image))
        return {"image": msgspec.to_builtins(image)}

    async def kexec(self, connection: Connection, command: Any) -> Reply:
        """Begin an update; its course is told by WATCH."""
        self._only_admin(connection, "KEXEC")
        uid, deadline = connection.peer.uid, command.deadline_s or 0.0
        return {"update": await self.luod.director.start(uid, deadline, force=bool(command.force))}

    async def abort(self, connection: Connection, command: Any) -> Reply:
        """Undo the running update, or one session."""
        reason = command.reason or f"asked for by uid {connection.peer.uid}"
        if command.id:
            book = self.engine.book
            found = book.session(command.id) or book.of_client(command.id)
            if found is None or found.seq == 0 or not self.rights.may_see(connection, found):
                raise Refused(
                    "UNKNOWN_ID", f"there is no session {command.id!r}", hint="`luoctl sessions` lists them"
                )
            await self.luod.director.abort_session(found, reason)
            return {"aborted": [found.id]}
        self._only_admin(connection, "ABORT of an update")
        return {"aborted": [await self.luod.director.abort(reason)]}

    async def resolve(self, connection: Connection, command: Any) -> Reply:
        """Settle an effect in doubt by a person's word."""
        self._only_admin(connection, "RESOLVE")
        session = self.engine.book.session(command.key)
        if session is not None and session.seq:
            return await self._resolve_session(session, command.decision, f"uid {connection.peer.uid}")
        effect = await self.engine.resolve(command.key, command.decision)
        self.luod.spawn(self.luod.director.close_if_done)
        return {"key": effect.key, "status": effect.status}

    async def _resolve_session(self, session: Session, decision: str, by: str) -> Reply:
        match decision:
            case "retry":
                await self.luod.ending.retry(session, by)
            case "give-up":
                await self.luod.ending.give_up(session, f"given up by {by}")
            case _:
                raise Refused(
                    "BAD_FIELD", f"{decision!r} is no decision about a session", hint="retry or give-up"
                )
        after = self.engine.book.session(session.id) or session
        return {"key": session.id, "status": after.state}


def page(rows: list[Reply], after: str) -> tuple[list[Reply], str | None]:
    """Return the rows behind the one whose id is `after` that fit in a line, and the id to go on after, if any are left."""
    start = next((index + 1 for index, row in enumerate(rows) if row["id"] == after), 0) if after else 0
    size = 0
    for index in range(start, len(rows)):
        size += len(msgspec.json.encode(rows[index])) + 1
        if size > PAGE_BYTES and index > start:
            return rows[start:index], str(rows[index - 1]["id"])
    return rows[start:], None


def _digest(path: Path) -> str:
    try:
        if not path.is_file():  # a FIFO or a device would never end
            raise Refused("BAD_IMAGE", f"{path} is no file", hint="give the path of a kernel image")
        with path.open("rb") as file:
            digest = blake2b(digest_size=16)
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except ValueError:
        raise Refused(
            "BAD_IMAGE", f"{str(path)!r} is no path", hint="give the path of a kernel image"
        ) from None
    except OSError as error:
        raise Refused(
            "BAD_IMAGE", f"{path} cannot be read: {error.strerror}", hint="give the path of a kernel image"
        ) from None
