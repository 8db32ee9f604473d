# SPDX-License-Identifier: Apache-2.0
"""The control desk of the emulator: requests on D/control, answered at once or when what they wait for has happened."""

from __future__ import annotations

import array
import base64
import binascii
import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from . import wire
from .handlers import Refused
from .images import Loaded, check_load, read_image
from .machine import Machine
from .server import KernelServer

Reply = dict[str, Any]
_MAX_LINE = 1 << 20


@dataclass(eq=False)
class Client:
    """One connection to the desk."""

    sock: socket.socket
    pid: int
    inbox: bytes = b""
    outbox: bytes = b""
    fds: list[int] = field(default_factory=list[int])


class Request(msgspec.Struct, frozen=True):
    """A request; which fields count depends on `op`."""

    op: str
    pid: int = 0
    boot_id: str = ""
    cmdline: str | None = None
    kernel: bool = False
    initrd: bool = False
    flags: int = 0
    at: str = ""
    errno: int = 0
    op_name: str | None = None
    session: str | None = None
    token: str | None = None
    skip: int = 0
    times: int = 1
    fault: int = 0
    device: str = ""
    driver: str = ""
    at_boot: bool = False


@dataclass(frozen=True)
class Ask:
    """A request and who made it."""

    client: Client
    request: Request


def _refuse(code: int, message: str = "") -> Reply:
    return {"errno": code, "message": message or os.strerror(code)}


class Desk:
    """Serves D/control on the loop of the kernel server."""

    def __init__(self, server: KernelServer) -> None:
        self._server = server
        self._machine: Machine = server.machine
        self._clients: dict[int, Client] = {}
        self._waiting: list[tuple[Client, Callable[[], Reply | None]]] = []
        self._listener = wire.listen(server.directory, wire.CONTROL_SOCKET, socket.SOCK_STREAM)
        server.watch(self._listener.fileno(), lambda _: self._accept())
        self._ops: dict[str, Callable[[Ask], Reply | None]] = {
            "BOOT_ID": lambda _: self._boot_id(),
            "KEXEC_LOAD": self._kexec_load,
            "KEXEC_LOAD_LEGACY": self._kexec_load_legacy,
            "KEXEC_UNLOAD": self._kexec_unload,
            "KEXEC_LOADED": lambda _: {"loaded": self._machine.loaded is not None},
            "REBOOT_KEXEC": self._reboot_kexec,
            "SYNC": self._sync,
            "COLD_REBOOT": self._cold_reboot,
            "WAIT_BOOT": self._wait_boot,
            "ATTACH": self._attach,
            "SPARE": self._spare,
            "BIND": self._bind,
            "SPEAKS_PROPOSED": lambda _: {"speaks": self._machine.board.speaks_proposed},
            "STATE": lambda _: self._state(),
            "AUDIT": lambda _: {"calls": self._machine.calls},
            "INJECT": self._inject,
            "WAIT_HIT": self._wait_hit,
            "RELEASE": self._release,
            "CLEAR": self._clear,
            "SHUTDOWN": self._shutdown,
        }

    def close(self) -> None:
        """Hang up on everybody."""
        for client in list(self._clients.values()):
            self._hang_up(client)
        self._server.unwatch(self._listener.fileno())
        self._listener.close()
        (self._server.directory / wire.CONTROL_SOCKET).unlink(missing_ok=True)

    # -- connections -----------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock = self._listener.accept()[0]
        except OSError:
            return
        if wire.peer_uid(sock) not in {0, os.geteuid()}:
            sock.close()
            return
        sock.setblocking(False)
        client = Client(sock, wire.peer_pid(sock))
        self._clients[sock.fileno()] = client
        self._server.watch(sock.fileno(), lambda events: self._ready(client, events))

    def _ready(self, client: Client, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush(client)
        if events & ~select.EPOLLOUT and client.sock.fileno() in self._clients:
            self._read(client)

    def _read(self, client: Client) -> None:
        try:
            data, ancillary, _, _ = client.sock.recvmsg(
                1 << 16, socket.CMSG_SPACE(64), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                client.fds += array.array("i", payload)
        client.inbox += data
        if not data or len(client.inbox) > _MAX_LINE:
            self._hang_up(client)
            return
        while b"\n" in client.inbox:
            line, _, client.inbox = client.inbox.partition(b"\n")
            reply = self._answer(client, line)
            if reply is not None:
                self._send(client, reply)

    def _hang_up(self, client: Client) -> None:
        if self._clients.pop(client.sock.fileno(), None) is not None:
            self._server.unwatch(client.sock.fileno())
            self._waiting = [entry for entry in self._waiting if entry[0] is not client]
            for fd in client.fds:
                os.close(fd)
            client.sock.close()

    def _send(self, client: Client, reply: Reply) -> None:
        client.outbox += msgspec.json.encode(reply) + b"\n"
        self._flush(client)

    def _flush(self, client: Client) -> None:
        fd = client.sock.fileno()
        if fd not in self._clients:
            return
        with contextlib.suppress(BlockingIOError):
            try:
                while client.outbox:
                    sent = client.sock.send(client.outbox, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                    client.outbox = client.outbox[sent:]
            except (BrokenPipeError, ConnectionResetError):
                self._hang_up(client)
                return
        self._server.rewatch(fd, select.EPOLLIN | (select.EPOLLOUT if client.outbox else 0))

    def _answer(self, client: Client, line: bytes) -> Reply | None:
        try:
            request = msgspec.json.decode(line, type=Request)
        except msgspec.MsgspecError as error:
            return _refuse(errno.EPROTO, f"bad request: {error}")
        handle = self._ops.get(request.op)
        try:
            return (
                handle(Ask(client, request))
                if handle
                else _refuse(errno.ENOSYS, f"no such request: {request.op}")
            )
        except Refused as refusal:
            return _refuse(refusal.code)
        finally:
            for fd in client.fds:
                os.close(fd)
            client.fds.clear()

    def settle(self) -> None:
        """Answer whoever waits for something that has happened."""
        for entry in list(self._waiting):
            client, check = entry
            reply = check()
            if reply is not None and entry in self._waiting:
                self._waiting.remove(entry)
                self._send(client, reply)

    def _when(self, client: Client, check: Callable[[], Reply | None]) -> Reply | None:
        reply = check()
        if reply is None:
            self._waiting.append((client, check))
        return reply

    # -- requests --------------------------------------------------------------------------------------------------------------

    def _boot_id(self) -> Reply:
        if self._machine.panic:
            return _refuse(errno.EHOSTDOWN, f"kernel panic: {self._machine.panic}")
        return {"boot_id": self._machine.boot_id}

    def _kexec_load(self, ask: Ask) -> Reply:
        code = self._machine.faults.errno("load")
        if code:
            raise Refused(code)
        fds = iter(ask.client.fds)
        kernel = next(fds, -1) if ask.request.kernel else -1
        initrd = next(fds, -1) if ask.request.initrd else -1
        try:
            cmdline = base64.b64decode(ask.request.cmdline or "", validate=True)
        except binascii.Error:
            return _refuse(errno.EFAULT)
        self._machine.loaded = check_load(kernel, initrd, cmdline, ask.request.flags)
        self._machine.record("KEXEC_LOAD" if self._machine.loaded else "KEXEC_UNLOAD", ask.client.pid)
        return {}

    def _kexec_load_legacy(self, ask: Ask) -> Reply:
        image = read_image(next(iter(ask.client.fds), -1))
        self._machine.loaded = Loaded(image, ask.request.cmdline or "", handover=False)
        self._machine.record("KEXEC_LOAD_LEGACY", ask.client.pid)
        return {}

    def _kexec_unload(self, ask: Ask) -> Reply:
        self._machine.loaded = None
        self._machine.record("KEXEC_UNLOAD", ask.client.pid)
        return {}

    def _sync(self, ask: Ask) -> Reply | None:
        code = self._machine.faults.errno("sync")
        if code:
            raise Refused(code)
        fault = self._machine.faults.match("call", op="SYNC")

        def end() -> Reply | None:
            if fault is not None and not fault.released:
                return None
            self._machine.record("SYNC", ask.client.pid)
            return {}

        return self._when(ask.client, end)

    def _reboot_kexec(self, ask: Ask) -> Reply | None:
        if self._server.jump_fault is not None:
            return self._when(ask.client, lambda: None)  # the first caller holds the lock until the jump
        before = self._machine.boots
        self._server.reboot_kexec(ask.client.pid)
        return self._when(ask.client, lambda: self._boot_id() if self._machine.boots > before else None)

    def _cold_reboot(self, ask: Ask) -> Reply:
        image = read_image(ask.client.fds[0]) if ask.client.fds else None
        self._machine.record("COLD_REBOOT", ask.client.pid)
        self._server.end_world_and(lambda: self._machine.cold_boot(image, ask.request.cmdline))
        return self._boot_id()

    def _wait_boot(self, ask: Ask) -> Reply | None:
        return self._when(
            ask.client, lambda: self._boot_id() if self._machine.boot_id != ask.request.boot_id else None
        )

    def _attach(self, ask: Ask) -> Reply:
        if ask.request.pid <= 0:
            return _refuse(errno.EINVAL)
        self._server.attach(ask.request.pid)
        return {}

    def _spare(self, ask: Ask) -> Reply:
        self._server.forget(ask.request.pid)
        self._server.population.spare(ask.request.pid)
        return {}

    def _bind(self, ask: Ask) -> Reply:
        self._server.sweep()
        self._machine.board.bind(ask.request.device, ask.request.driver, at_boot=ask.request.at_boot)
        self._machine.board.write_sysfs(self._server.directory / "sys")
        return {}

    def _state(self) -> Reply:
        self._server.sweep()
        faults = [
            {"fault": fault.number, "at": fault.at, "hits": fault.hits}
            for fault in self._machine.faults.orders.values()
        ]
        return {
            **self._machine.state(),
            "members": self._server.population.pids(),
            "blocked": self._server.blocked,
            "faults": faults,
        }

    def _inject(self, ask: Ask) -> Reply:
        try:
            fault = self._machine.faults.add(
                ask.request.at,
                errno=ask.request.errno,
                op=ask.request.op_name,
                session=None if ask.request.session is None else ask.request.session.encode(),
                token=None if ask.request.token is None else int(ask.request.token, 16),
                skip=ask.request.skip,
                times=ask.request.times,
            )
        except ValueError as error:
            return _refuse(errno.EINVAL, str(error))
        return {"fault": fault.number}

    def _wait_hit(self, ask: Ask) -> Reply | None:
        fault = self._machine.faults.orders.get(ask.request.fault)
        if fault is None:
            return _refuse(errno.ESRCH)
        return self._when(ask.client, lambda: {} if fault.hits else None)

    def _release(self, ask: Ask) -> Reply:
        fault = self._machine.faults.orders.pop(ask.request.fault, None)
        if fault is None:
            return _refuse(errno.ESRCH)
        self._server.release(fault)
        return {}

    def _clear(self, _: Ask) -> Reply:
        for fault in list(self._machine.faults.orders.values()):
            self._server.release(fault)
        self._machine.faults.clear()
        return {}

    def _shutdown(self, _: Ask) -> Reply:
        self._server.running = False
        return {}
