# SPDX-License-Identifier: Apache-2.0
"""The keeper process: session fds by name, two sockets, and as little else as can be.

`keeper.notify` speaks systemd's fd-store datagrams (sd_notify(3): FDSTORE=1, FDSTOREREMOVE=1, FDNAME=, FDPOLL=0, BARRIER=1).
`keeper.sock` answers requests, one SOCK_SEQPACKET message each: NAMES, GET, STORE, REMOVE, BOOT_ID, and CREATE and RETRIEVE, for which the
keeper makes the ioctl itself and holds the fd before it answers. So there is no instant at which only luod has a session.

One thread serves; ioctls run in another, because the kernel may let one wait for long. SIGTERM ends the keeper only while it holds
nothing: losing what it holds must never be the accident of a routine stop. SIGKILL, or a second SIGTERM within 2 s, does end it.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...engine.ports import Kernel
from ...states.errors import LuodError
from ..liveupdate.errors import KernelError
from .messages import REQUEST_SIZE, receive, send

_UCRED = struct.Struct("3i")
INSIST_S = 2.0


class KeeperTaken(LuodError):
    """Another keeper serves this directory."""

    exit_code = 3


class Keeper:
    """Holds fds. `limit` is how many at most, as FileDescriptorStoreMax= is for systemd."""

    def __init__(self, directory: Path, kernel: Kernel, *, limit: int = 4096) -> None:
        self.directory = directory
        self._kernel = kernel
        self._limit = limit
        self._held: dict[str, list[tuple[int, bool]]] = {}
        self._peers: dict[int, socket.socket] = {}
        self._done: deque[tuple[str, dict[str, Any], int | None]] = deque()
        self._busy: dict[str, list[socket.socket]] = {}
        self._stopping = False
        self._term_at = -INSIST_S - 1
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        self._lock = os.open(directory / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise KeeperTaken(
                f"another luod-keeper serves {directory}",
                hint="it holds the sessions; do not start a second one",
            ) from None
        self._notify = self._bind("keeper.notify", socket.SOCK_DGRAM)
        self._listener = self._bind("keeper.sock", socket.SOCK_SEQPACKET)
        self._listener.listen(64)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.epoll()
        for fd in (self._notify.fileno(), self._listener.fileno(), self._wake_read):
            self._poll.register(fd, select.EPOLLIN)

    def _bind(self, name: str, kind: socket.SocketKind) -> socket.socket:
        path = self.directory / name
        path.unlink(missing_ok=True)  # the lock says that its owner is dead
        sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        sock.bind(str(path))
        path.chmod(0o600)
        return sock

    # -- serving

    def serve(self) -> None:
        """Serve until told to stop."""
        while not self._stopping:
            for fd, events in self._poll.poll():
                if fd == self._wake_read:
                    self._drain_wake()
                elif fd == self._listener.fileno():
                    self._accept()
                elif fd == self._notify.fileno():
                    self._datagram()
                elif fd in self._peers:
                    self._request(self._peers[fd])
                elif events & (select.EPOLLHUP | select.EPOLLERR):
                    self._hung_up(fd)

    def wake(self, signum: int = 0, _frame: object = None) -> None:
        """Signal handler for SIGTERM and SIGINT; also wakes the loop for an answer of the other thread."""
        if signum:
            now = time.monotonic()
            insisted = now - self._term_at <= INSIST_S
            self._term_at = now
            if insisted or not (self._held or self._busy):
                self._stopping = True
        os.write(self._wake_write, b"\0")

    def _drain_wake(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return
        while self._done:
            name, answer, fd = self._done.popleft()
            if fd is not None:
                self._held[name] = [(fd, False)]
            for peer in self._busy.pop(name):
                self._answer(peer, answer, fd)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in (0, os.getuid()):
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
        if peer.fileno() < 0 or peer.fileno() not in self._peers:
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
        except (OSError, ValueError):
            self._forget(peer)
            return
        if message is None:
            self._forget(peer)
            return
        try:
            self._obey(peer, message, fds)
        except LuodError as error:
            self._answer(peer, fault(error))
        except (KeyError, TypeError) as error:
            self._answer(
                peer, {"error": {"kind": "request", "message": f"a request without {error}", "hint": ""}}
            )
        finally:
            for fd in fds:
                os.close(fd)

    def _obey(self, peer: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        name = str(message.get("name", ""))
        match message["do"]:
            case "NAMES":
                self._answer(peer, {"names": [one for one, held in self._held.items() for _ in held]})
            case "BOOT_ID":
                self._answer(peer, {"boot_id": self._kernel.boot_id()})
            case "GET":
                held = self._held.get(name)
                self._answer(peer, {"held": bool(held)}, held[-1][0] if held else None)
            case "STORE":
                if len(fds) != 1:
                    raise LuodError(f"STORE of {name} needs one fd, {len(fds)} came")
                self._room(name)
                self._close(name)
                self._keep(name, fds.pop(), poll=False)
                self._answer(peer, {"held": True})
            case "REMOVE":
                held_before = name in self._held
                self._close(name)
                self._answer(peer, {"held": held_before})
            case "CREATE":
                self._acquire(peer, name, self._kernel.create_session)
            case "RETRIEVE":
                self._acquire(peer, name, self._kernel.retrieve_session)
            case other:
                raise LuodError(f"{other!r} is no request to a keeper")

    # -- sessions born here

    def _acquire(self, peer: socket.socket, name: str, ioctl: Callable[[str], int]) -> None:
        if name in self._held:
            self._answer(peer, {"held": True}, self._held[name][-1][0])
            return
        if name in self._busy:
            self._busy[name].append(peer)
            return
        self._room(name)
        self._busy[name] = [peer]
        threading.Thread(target=self._call, args=(name, ioctl), daemon=True).start()

    def _call(self, name: str, ioctl: Callable[[str], int]) -> None:
        try:
            self._done.append((name, {"held": False}, ioctl(name)))
        except LuodError as error:
            self._done.append((name, fault(error), None))
        except OSError as error:
            self._done.append((name, fault(LuodError(str(error))), None))
        self.wake()

    # -- holding

    def _room(self, name: str) -> None:
        count = sum(map(len, self._held.values())) + len(self._busy)
        if count >= self._limit:
            raise LuodError(
                f"{name} cannot be stored: {count} fds are held, the limit is {self._limit}",
                hint="raise --max of luod-keeper",
            )

    def _keep(self, name: str, fd: int, *, poll: bool) -> None:
        self._held.setdefault(name, []).append((fd, poll))
        if poll:
            try:
                self._poll.register(fd, 0)
            except OSError:  # not every file can be polled; then it is simply kept
                self._held[name][-1] = (fd, False)

    def _close(self, name: str) -> None:
        for fd, poll in self._held.pop(name, []):
            if poll:
                self._poll.unregister(fd)
            os.close(fd)

    def _hung_up(self, fd: int) -> None:
        for name, held in list(self._held.items()):
            for one in [one for one in held if one[0] == fd]:
                held.remove(one)
                self._poll.unregister(fd)
                os.close(fd)
            if not held:
                del self._held[name]

    # -- systemd's datagrams

    def _datagram(self) -> None:
        try:
            data, ancillary, _, _ = self._notify.recvmsg(
                65536, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return
        fds: list[int] = []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"{len(payload) // 4}i", payload[: len(payload) // 4 * 4])
        fields = dict(
            line.split("=", 1) for line in data.decode(errors="replace").splitlines() if "=" in line
        )
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTOREREMOVE") == "1":
            self._close(name)
        elif fields.get("FDSTORE") == "1":
            while fds:
                try:
                    self._room(name)
                except LuodError:
                    break
                self._keep(name, fds.pop(0), poll=fields.get("FDPOLL", "1") != "0")
        for fd in fds:
            os.close(fd)  # BARRIER=1 too: closing it tells the sender that all before it is done

    def close(self) -> None:
        """Let go of everything."""
        for name in list(self._held):
            self._close(name)
        for peer in list(self._peers.values()):
            self._forget(peer)
        self._listener.close()
        self._notify.close()
        self._poll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        os.close(self._lock)


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
    """Let SIGTERM and SIGINT ask the keeper to end."""
    signal.signal(signal.SIGTERM, keeper.wake)
    signal.signal(signal.SIGINT, keeper.wake)
