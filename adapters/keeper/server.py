# SPDX-License-Identifier: Apache-2.0
"""The keeper process: session fds by name, two sockets, and as little else as can be.

`keeper.notify` speaks systemd's fd-store datagrams (sd_notify(3): FDSTORE=1, FDSTOREREMOVE=1, FDNAME=, FDPOLL=0, BARRIER=1).
`keeper.sock` answers requests, one SOCK_SEQPACKET message each: NAMES, GET, STORE, REMOVE, BOOT_ID, and CREATE and RETRIEVE, for which the
keeper makes the ioctl itself and holds the fd before it answers. So there is no instant at which only luod has a session.

One thread serves. The ioctls run in another, one after the other, because the kernel lets only one opener in and may let it wait for
long. SIGTERM ends the keeper only while it holds nothing: losing what it holds must never be the accident of a routine stop. SIGKILL, or
a second SIGTERM within `INSIST_S`, does end it; so does the shutdown of the machine. A fault while serving costs one peer, not the fds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import signal
import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...engine.ports import Kernel
from ...states.errors import LuodError
from ..liveupdate.errors import KernelError
from .messages import NAME_MAX, PAGE_BYTES, REQUEST_SIZE, fit_name, let_go, notice, receive, send, take
from .store import FdStore, StoreFull

_UCRED = struct.Struct("3i")
INSIST_S = 2.0
BACKLOG = 1024
MAX_PEERS = 256


class KeeperTaken(LuodError):
    """Another keeper serves this directory."""

    exit_code = 3


class BadRequest(LuodError):
    """A request that the keeper does not understand."""


class _Made(NamedTuple):
    """What became of an ioctl: an fd, or a fault to pass on."""

    name: str
    fd: int | None
    fault: dict[str, Any]


class Keeper:
    """Holds fds. `limit` is how many at most."""

    def __init__(self, directory: Path, kernel: Kernel, *, limit: int = 4096) -> None:
        self.directory = directory
        self._kernel = kernel
        self._boot_id = kernel.boot_id()
        self._peers: dict[int, socket.socket] = {}
        self._waiting: dict[str, list[socket.socket]] = {}
        self._orders: queue.SimpleQueue[tuple[str, Callable[[str], int]] | None] = queue.SimpleQueue()
        self._made: deque[_Made] = deque()
        self._worker: threading.Thread | None = None
        self._stopping = False
        self._asked_at = -INSIST_S - 1
        with contextlib.ExitStack() as undo:
            self._lock = _lock(directory)
            undo.callback(os.close, self._lock)
            self._notify = undo.enter_context(_bind(directory / "keeper.notify", socket.SOCK_DGRAM))
            self._listener = undo.enter_context(_bind(directory / "keeper.sock", socket.SOCK_SEQPACKET))
            self._listener.listen(BACKLOG)
            self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._poll = select.epoll()
            for fd in (self._notify.fileno(), self._listener.fileno(), self._wake_read):
                self._poll.register(fd, select.EPOLLIN)
            self._store = FdStore(limit, self._poll)
            undo.pop_all()

    # -- serving

    def serve(self) -> None:
        """Serve until told to stop."""
        while not self._stopping:
            for fd, _ in self._poll.poll():
                try:
                    self._serve_one(fd)
                except Exception:
                    _say(traceback.format_exc())
                    if fd in self._peers:
                        self._forget(self._peers[fd])

    def _serve_one(self, fd: int) -> None:
        if fd == self._wake_read:
            self._woken()
        elif fd == self._listener.fileno():
            self._accept()
        elif fd == self._notify.fileno():
            self._datagram()
        elif fd in self._peers:
            self._request(self._peers[fd])
        elif self._store.watches(fd) and (name := self._store.hung_up(fd)):
            _say(f"luod-keeper: the other end of {name} has hung up; it is no longer held")

    def on_signal(self, signum: int, _frame: object = None) -> None:
        """End when nothing is held, or when it is asked for twice within `INSIST_S` seconds."""
        now = time.monotonic()
        insisted = now - self._asked_at <= INSIST_S
        self._asked_at = now
        if insisted or not (self._store or self._waiting):
            self.stop()
        else:
            _say(
                f"luod-keeper: {len(self._store)} fds are held, so {signal.Signals(signum).name} does not end this process; "
                f"send it twice within {INSIST_S:g} s to lose them"
            )

    def stop(self) -> None:
        """Let `serve` return; may be called from any thread."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_write, b"\0")

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 65536)
        while self._made:
            made = self._made.popleft()
            if made.fd is not None:
                self._store.keep(made.name, made.fd)
            for peer in self._waiting.pop(made.name, []):
                self._answer(peer, made.fault or {"held": False}, made.fd)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return
        _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in (0, os.getuid()) or len(self._peers) >= MAX_PEERS:
            peer.close()
            return
        peer.setblocking(False)
        self._peers[peer.fileno()] = peer
        self._poll.register(peer.fileno(), select.EPOLLIN)

    def _forget(self, peer: socket.socket) -> None:
        if self._peers.pop(peer.fileno(), None) is not None:
            self._poll.unregister(peer.fileno())
            peer.close()

    def _answer(self, peer: socket.socket, answer: dict[str, Any], fd: int | None = None) -> None:
        if peer.fileno() < 0:
            return  # it died; what it asked for is held for whoever comes next
        try:
            send(peer, answer, [fd] if fd is not None else [])
        except OSError:
            self._forget(peer)

    def _request(self, peer: socket.socket) -> None:
        try:
            message, fds = receive(peer, REQUEST_SIZE)
        except BlockingIOError:
            return
        except ValueError as error:
            self._answer(peer, fault(BadRequest(f"not a request: {error}")))
            return
        except OSError:
            self._forget(peer)
            return
        if message is None:
            self._forget(peer)
            return
        try:
            self._obey(peer, message, fds)
        except LuodError as error:
            self._answer(peer, fault(error))
        finally:
            let_go(fds)

    def _obey(self, peer: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        match message.get("do"):
            case "NAMES":
                self._names(peer, message)
            case "BOOT_ID":
                self._answer(peer, {"boot_id": self._boot_id})
            case "GET":
                fd = self._store.newest(_name(message))
                self._answer(peer, {"held": fd is not None}, fd)
            case "STORE":
                self._replace(_name(message), fds)
                self._answer(peer, {"held": True})
            case "REMOVE":
                self._answer(peer, {"held": self._store.remove(_name(message))})
            case "CREATE":
                self._acquire(peer, _name(message), self._kernel.create_session)
            case "RETRIEVE":
                self._acquire(peer, _name(message), self._kernel.retrieve_session)
            case other:
                raise BadRequest(f"{str(other)[:60]!r} is no request to a keeper")

    def _names(self, peer: socket.socket, message: dict[str, Any]) -> None:
        after = message.get("after", 0)
        if not isinstance(after, int):
            raise BadRequest("NAMES: after must be a number")
        names, last, more = self._store.page(after, PAGE_BYTES)
        self._answer(peer, {"names": names, "last": last, "more": more})

    def _replace(self, name: str, fds: list[int]) -> None:
        if len(fds) != 1:
            raise BadRequest(f"STORE of {name} needs one fd, {len(fds)} came")
        if self._store.newest(name) is None:
            self._store.require_room(name, len(self._waiting))
        self._store.remove(name)
        self._store.keep(name, fds.pop())

    # -- sessions born here

    def _acquire(self, peer: socket.socket, name: str, ioctl: Callable[[str], int]) -> None:
        held = self._store.newest(name)
        if held is not None:
            self._answer(peer, {"held": True}, held)
        elif name in self._waiting:
            self._waiting[name].append(peer)
        else:
            self._store.require_room(name, len(self._waiting))
            self._waiting[name] = [peer]
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="ioctls", daemon=True)
                self._worker.start()
            self._orders.put((name, ioctl))

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            name, ioctl = order
            try:
                self._made.append(_Made(name, ioctl(name), {}))
            except LuodError as error:
                self._made.append(_Made(name, None, fault(error)))
            except Exception as error:  # whatever it was: somebody waits for an answer
                self._made.append(_Made(name, None, fault(BadRequest(f"{name}: {error!r}"))))
            self._wake()

    # -- systemd's datagrams

    def _datagram(self) -> None:
        try:
            data, fds, cut = take(self._notify, 65536)
        except BlockingIOError:
            return
        try:
            said = notice(data)
            if cut:
                _say("luod-keeper: a datagram was truncated; what it brought is not held")
            elif said.remove:
                self._store.remove(said.name)
            elif said.store:
                while fds:
                    self._store.require_room(said.name, len(self._waiting))
                    self._store.keep(said.name, fds.pop(0), watched=said.watched)
        except StoreFull as error:
            _say(f"luod-keeper: {error}")
        finally:
            let_go(fds)  # with BARRIER=1 this tells the sender that all before it is done

    def close(self) -> None:
        """Let go of everything."""
        if self._worker is not None:
            self._orders.put(None)
            if not self._waiting:
                self._worker.join()
        while self._made:
            made = self._made.popleft()
            if made.fd is not None:
                os.close(made.fd)
        self._store.close()
        for peer in list(self._peers.values()):
            self._forget(peer)
        self._listener.close()
        self._notify.close()
        self._poll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        os.close(self._lock)


def _lock(directory: Path) -> int:
    directory.mkdir(parents=True, exist_ok=True, mode=0o755)
    lock = os.open(directory / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise
        raise KeeperTaken(
            f"another luod-keeper serves {directory}", hint="it holds the sessions; do not start a second one"
        ) from None
    return lock


def _bind(path: Path, kind: socket.SocketKind) -> socket.socket:
    path.unlink(missing_ok=True)  # the lock says that its owner is dead
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)  # from its first instant it is for this uid alone
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


def _name(message: dict[str, Any]) -> str:
    name = message.get("name")
    if not fit_name(name):
        raise BadRequest(
            f"{message['do']}: the name must be 1 to {NAME_MAX} printable ASCII characters without a colon"
        )
    return str(name)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody to tell is no reason to drop what is held
        os.write(2, line.rstrip("\n").encode(errors="replace") + b"\n")


def fault(error: LuodError) -> dict[str, Any]:
    """Return an error as the client can raise it again."""
    body: dict[str, Any] = {"kind": "luod", "message": error.message, "hint": error.hint}
    if isinstance(error, KernelError):
        body |= {
            "kind": "kernel",
            "operation": error.operation,
            "subject": error.subject,
            "errno": error.errno,
        }
        body["class"] = type(error).__name__
    return {"error": body}


def install_signals(keeper: Keeper) -> None:
    """Let SIGTERM and SIGINT ask the keeper to end; a terminal that closes does not."""
    signal.signal(signal.SIGTERM, keeper.on_signal)
    signal.signal(signal.SIGINT, keeper.on_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
