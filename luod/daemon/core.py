# SPDX-License-Identifier: Apache-2.0
"""LUOD put together: the engine, the kernel, the second holder, the connections and the director.

`Luod` is what its parts share. It knows which connection speaks for which client and what of a session is where; decisions are made in
`desk` and `claims` (what one client may do, before and after the kexec), `director` and `gate` (how an update goes, and whom it waits
for), `ending` (how sessions end) and `recovery` (what a new process or a new kernel finds).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
from anyio.abc import TaskGroup

from ..engine.errors import EffectFailed
from ..engine.points import Points, nowhere
from ..engine.ports import Custody, Kernel
from ..engine.runner import Engine
from ..journal.writer import Journal
from ..states import events as ev
from ..states.errors import IllegalTransition
from ..states.fold import Session
from ..states.table import SESSION
from ..states.table import SessionState as S
from .blackbox import BlackBox
from .config import Config
from .connection import Connection
from .director import Director
from .effects import Held, all_effects
from .ending import Ending
from .gate import Gate
from .peers import Peer, pid_alive
from .pulse import Pulse, now
from .second_holder import SecondHolder
from .turns import Turns
from .writeback import WriteBack

if TYPE_CHECKING:
    from ..journal.record import Record

log = logging.getLogger("luod")


class Luod:
    """One luod process on one boot of one host."""

    def __init__(
        self,
        config: Config,
        *,
        journal: Journal,
        kernel: Kernel,
        custody: Custody,
        group: TaskGroup,
        boot_id: str,
        points: Points = nowhere,
    ) -> None:
        self.config = config
        self.journal = journal
        self.kernel = kernel
        self.custody = custody
        self.held = Held()
        self.pulse = Pulse()
        self.box = BlackBox(journal)
        effects = all_effects(kernel, custody, self.held, self._send_from_thread)
        self.engine = Engine(journal, effects, boot_id=boot_id, points=points)
        self.engine.listeners.append(self._listen)
        self.connections: set[Connection] = set()
        self.gate = Gate(self)
        self.director = Director(self)
        self.ending = Ending(self)
        self.turns = Turns(self)
        self.write_back = WriteBack(self, now)
        self.second_holder = SecondHolder(self)
        self.leaving: set[str] = set()
        self.told_abort: set[str] = set()
        self._by_client: dict[str, Connection] = {}
        self._peers: dict[str, Peer] = {}
        self._let_go: set[str] = set()
        self._locks: dict[str, anyio.Lock] = {}
        self._group = group
        self._watch: list[Callable[[Record], None]] = []

    # -- connections

    def attach(self, client: str, connection: Connection) -> None:
        """Let `connection` speak for a client id from now on."""
        self._by_client[client] = connection
        self.leaving.discard(client)
        old = self._peers.get(client)
        self._peers[client] = connection.peer
        self._close_unwatched(old)
        if client not in connection.clients:
            connection.clients.append(client)
        self.pulse.beat()

    def detach(self, connection: Connection) -> list[str]:
        """Forget a connection; return the client ids that it spoke for. Their processes are still watched."""
        self.connections.discard(connection)
        mine = [client for client in connection.clients if self._by_client.get(client) is connection]
        for client in mine:
            del self._by_client[client]
        for client in mine:
            self._forget_peer(client)
            self._await_end(client)
        self._close_unwatched(connection.peer)
        self.pulse.beat()
        return mine

    def _forget_peer(self, client: str) -> None:
        """Stop watching the process of a client that has nothing left to do."""
        session = self.engine.book.of_client(client)
        if client in self._by_client or (
            session is not None and session.state not in (S.NEW, *SESSION.final)
        ):
            return
        self._close_unwatched(self._peers.pop(client, None))

    def watch_owner(self, session: Session) -> None:
        """Watch the process of a client that this luod has not heard of yet, so that its death is seen."""
        if session.owner is None or session.client in self._peers:
            return
        owner = session.owner
        try:
            pidfd = os.pidfd_open(owner.pid)
        except OSError:
            return
        self._peers[session.client] = Peer(owner.pid, owner.uid, owner.gid, pidfd)
        self._await_end(session.client)

    def _await_end(self, client: str) -> None:
        peer = self._peers.get(client)
        if peer is not None and peer.pidfd >= 0:
            self.spawn(self._beat_at_end, peer)

    async def _beat_at_end(self, peer: Peer) -> None:
        """Look again when a process has died: its connection ends a moment before it does, or long before."""
        if peer.pidfd < 0:
            return
        try:
            await anyio.wait_readable(peer.pidfd)
        except (anyio.ClosedResourceError, anyio.BusyResourceError, OSError):
            return  # nobody watches it any more, or somebody does already
        self.pulse.beat()

    def _close_unwatched(self, peer: Peer | None) -> None:
        """Let go of the pidfd of a process that neither speaks nor is watched any more."""
        watched = [*self._peers.values(), *(one.peer for one in self.connections)]
        if peer is not None and not any(peer is one for one in watched):
            peer.close()

    def lock(self, client: str) -> anyio.Lock:
        """Return the lock under which one client's session is taken, handed over and ended."""
        return self._locks.setdefault(client, anyio.Lock())

    def connection(self, session: Session) -> Connection | None:
        """Return the open connection that speaks for a session's client."""
        found = self._by_client.get(session.client)
        return found if found is not None and not found.closed else None

    def tell(self, session: Session, message: dict[str, Any]) -> bool:
        """Send an event to the client of a session; return whether it has a connection that took it."""
        connection = self.connection(session)
        if connection is None:
            return False
        try:
            connection.send(message)
        except EffectFailed:
            return False
        return True

    def _send_from_thread(self, stream: str, message: dict[str, Any], fd: int) -> None:
        anyio.from_thread.run_sync(self._send, stream, message, fd)

    def _send(self, stream: str, message: dict[str, Any], fd: int) -> None:
        session = self.engine.book.session(stream)
        connection = self.connection(session) if session else None
        if connection is None:
            raise EffectFailed(f"the client of {stream} is not connected", errno="ENOTCONN")
        connection.send(message, fd)

    # -- what became of the holders of a session

    def is_gone(self, session: Session) -> bool:
        """Say whether the process that must still act for a session has died."""
        peer = self._peers.get(session.client)
        if peer is not None:
            return not peer.alive()
        return session.owner is not None and not pid_alive(session.owner.pid)

    def said_closed(self, session: str) -> None:
        """Note that a client says it has closed its session fd."""
        self._let_go.add(session)
        self.pulse.beat()

    def let_go(self, session: Session) -> bool:
        """Say whether no client holds the session: it said so, has died, or never had it."""
        handed = session.id in self._let_go or not session.effects.get(f"{session.id}/hand")
        return handed or self.is_gone(session)

    def holder(self, session: Session) -> str:
        """Name the process that may still hold a session, for a person to look at."""
        peer = self._peers.get(session.client)
        pid = peer.pid if peer else session.owner.pid if session.owner else 0
        return f"pid {pid} (uid {session.owner.uid if session.owner else '?'})"

    async def rebind(self, session: Session) -> None:
        """A client that stays connected after its session was undone takes part in the next update."""
        async with self.lock(session.client):
            await self._rebind(session)

    async def _rebind(self, session: Session) -> None:
        if self.connection(session) is None or session.owner is None or session.client in self.leaving:
            return
        book = self.engine.book
        newest = book.of_client(session.client)
        if newest is None or newest.state not in SESSION.final:
            return
        stream = book.next_session(session.client)
        again = ev.SessionBound(
            session.client, newest.attempt + 1, session.owner, session.policy, session.deadline_s,
            session.order, session.devices,
        )  # fmt: skip
        try:
            await self.engine.record((stream, again))
            if self.connection(session) is None:  # it hung up meanwhile, when there was nothing to undo
                await self.engine.record(
                    (stream, ev.SessionAborted("its client left before anything was preserved"))
                )
        except IllegalTransition:
            log.info("%s was bound again meanwhile", session.client)

    # -- journal

    def _listen(self, record: Record) -> None:
        session = self.engine.book.session(record.stream)
        if session is not None and session.state in SESSION.final:
            self._let_go.discard(session.id)
            self._forget_peer(session.client)
        self.pulse.beat()
        for watcher in list(self._watch):
            watcher(record)

    def watch(self, watcher: Callable[[Record], None]) -> Callable[[], None]:
        """Call `watcher` with every record from now on; return what ends it."""
        self._watch.append(watcher)

        def stop() -> None:
            if watcher in self._watch:
                self._watch.remove(watcher)

        return stop

    def open_box(self) -> None:
        """Write every durable record to this boot's black box too, from now on."""
        self.box.open(self.held)

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database, unless somebody is frozen: it costs fsyncs that would be blackout."""
        if not any(one.state == S.READY for one in self.engine.book.live_sessions()):
            self.journal.checkpoint()

    # -- tasks

    def spawn(self, work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Run something beside everything else; its failure is luod's failure."""
        self._group.start_soon(work, *args)

    def close(self) -> None:
        """Let go of every fd. The second holder keeps the sessions."""
        for connection in list(self.connections):
            connection.close()
            self.detach(connection)
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        self.box.close()
        self.held.close()
