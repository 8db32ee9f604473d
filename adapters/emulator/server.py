# SPDX-License-Identifier: Apache-2.0
"""The emulator process: sockets above, the machine below. One thread; nothing it does waits for a caller.

Order. A call that returned happened before the next one, so every hang-up that came before a request must be seen before it: a
second epoll watches for hang-ups alone and is emptied before each request is served. Requests of one session are served in the
order of their arrival, and a session's last requests before its hang-up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..liveupdate import abi
from . import device_calls, wire
from .calls import Answer, Call, Channel, Held, abandon, send, send_answer
from .core import Blocked, Session
from .faults import Fault
from .handlers import Refused
from .machine import Machine
from .open_file import OpenFile
from .population import Population

_BATCH = 4096


class KernelServer:
    """The device and session sockets, the processes behind them, and the jump."""

    def __init__(self, directory: Path, machine: Machine) -> None:
        self.directory = directory
        self.machine = machine
        self.population = Population()
        self.held: list[Held] = []
        self.jump_fault: Fault | None = None
        self.running = True
        self._events = select.epoll()
        self._hangups = select.epoll()
        self._watched: dict[int, Callable[[int], None]] = {}
        self._channels: dict[int, Channel] = {}
        self._pidfds: dict[int, int] = {}
        self._blocked: list[Call] = []
        self._device: socket.socket | None = None
        self._files = device_calls.OpenFiles(self._add_opened)
        machine.board.publish = self._files.publish
        self._devices = wire.listen(directory, device_calls.DEVICES_SOCKET, socket.SOCK_SEQPACKET)
        self.watch(self._devices.fileno(), lambda _: self._accept_open())
        self._opening: dict[int, socket.socket] = {}
        self.sync_device()

    @property
    def blocked(self) -> int:
        """How many calls sleep until the jump."""
        return len(self._blocked)

    # -- the loop --------------------------------------------------------------------------------------------------------------

    def watch(self, fd: int, handle: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call `handle(events)` whenever `fd` is ready."""
        self._watched[fd] = handle
        self._events.register(fd, events)

    def rewatch(self, fd: int, events: int) -> None:
        """Change what `fd` is watched for."""
        self._events.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; before it is closed."""
        if self._watched.pop(fd, None) is not None:
            self._events.unregister(fd)

    def run(self, after_each: Callable[[], None] = lambda: None) -> None:
        """Serve until `running` is False. `after_each` runs after every batch of events."""
        self.watch(self._hangups.fileno(), lambda _: self.sweep())
        while self.running:
            for fd, events in self._events.poll(-1, _BATCH):
                handle = self._watched.get(fd)
                if handle is not None:
                    handle(events)
            after_each()

    def close(self) -> None:
        """Let go of every socket; sessions vanish with the kernel."""
        for channel in list(self._channels.values()):
            self._drop(channel)
        if self._device is not None:
            self._close_device()
        self._end_opening()
        self._devices.close()
        self._events.close()
        self._hangups.close()

    # -- processes -------------------------------------------------------------------------------------------------------------

    def attach(self, pid: int) -> bool:
        """Take a process into the world."""
        pidfd = self.population.add(pid)
        if pidfd is not None:
            self._pidfds[pidfd] = pid
            self._hangups.register(pidfd, select.EPOLLIN)
        return pidfd is not None

    def forget(self, pid: int) -> None:
        """Let a process out of the world."""
        for pidfd, member in list(self._pidfds.items()):
            if member == pid:
                self._hangups.unregister(pidfd)
                del self._pidfds[pidfd]
        self.population.forget(pid)

    def _seen(self, pid: int, sock: socket.socket) -> None:
        """A process called. Its end of `sock` being open after the pidfd was taken proves that the pidfd is its own."""
        if self.attach(pid):
            poller = select.poll()
            poller.register(sock, 0)
            if poller.poll(0):
                self.forget(pid)

    # -- hang-ups --------------------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """See every hang-up and every end of a process that has happened by now."""
        while True:
            events = self._hangups.poll(0, _BATCH)
            if not events:
                return
            for fd, _ in events:
                if fd in self._pidfds:
                    self.forget(self._pidfds[fd])
                    continue
                channel = self._channels.get(fd)
                if channel is not None:
                    self._hang_up(channel)

    def _hang_up(self, channel: Channel) -> None:
        while not channel.waiting and channel.sock.fileno() in self._channels:
            if not self._serve_one(channel):
                break
        if not channel.waiting and channel.sock.fileno() in self._channels:
            self._closed(channel)

    def _closed(self, channel: Channel) -> None:
        if channel.opened is not None:
            self._drop(channel)
            return
        model = self.machine.model
        if model is None:
            raise RuntimeError("a device without a kernel")
        if channel.session is None:
            model.close()
        else:
            try:
                model.session_close(channel.session)
            except Blocked:
                self._suspend(channel)
                return
            self.machine.record("CLOSE", 0, session=channel.session.name)
        self._drop(channel)

    def _add_channel(
        self, sock: socket.socket, session: Session | None, opened: OpenFile | None = None
    ) -> Channel:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        channel = Channel(sock, session, opened)
        self._channels[sock.fileno()] = channel
        self._resume(channel)
        return channel

    def _add_opened(self, sock: socket.socket, opened: OpenFile) -> None:
        self._add_channel(sock, None, opened)

    def _resume(self, channel: Channel) -> None:
        channel.waiting = False
        self.watch(channel.sock.fileno(), lambda _: self._readable(channel))
        self._hangups.register(channel.sock.fileno(), 0)

    def _suspend(self, channel: Channel) -> None:
        if not channel.waiting:
            channel.waiting = True
            self.unwatch(channel.sock.fileno())
            self._hangups.unregister(channel.sock.fileno())

    def _drop(self, channel: Channel) -> None:
        self._suspend(channel)
        del self._channels[channel.sock.fileno()]
        channel.sock.close()
        if channel.opened is not None:
            self._files.forget(channel.opened)
            channel.opened.release()

    # -- the device ------------------------------------------------------------------------------------------------------------

    def sync_device(self) -> None:
        """Have the device socket exactly when the running kernel offers the device."""
        self.machine.board.write_sysfs(self.directory / "sys")
        if self.machine.model is None and self._device is not None:
            self._close_device()
        if self.machine.model is not None and self._device is None:
            self._device = wire.listen(self.directory, wire.DEVICE_SOCKET, socket.SOCK_SEQPACKET)
            self.watch(self._device.fileno(), lambda _: self._accept())

    def _close_device(self) -> None:
        if self._device is not None:
            self.unwatch(self._device.fileno())
            self._device.close()
            self._device = None
            (self.directory / wire.DEVICE_SOCKET).unlink(missing_ok=True)

    def _accept(self) -> None:
        sock = self._next_connection()
        if sock is None:
            return
        self.sweep()
        self._seen(wire.peer_pid(sock), sock)
        model = self.machine.model
        code = errno.ENOENT
        if model is not None:
            try:
                model.open()
                code = 0
            except Refused as refusal:
                code = refusal.code
        if code == 0:
            self._add_channel(sock, None)
        with contextlib.suppress(OSError):  # the opener is gone already: its hang-up is on its way
            sock.send(wire.REPLY.pack(code, 0), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if code:
            sock.close()

    def _next_connection(self) -> socket.socket | None:
        if self._device is None:
            return None
        try:
            return self._device.accept()[0]
        except OSError:
            return None

    def _accept_open(self) -> None:
        try:
            sock = self._devices.accept()[0]
        except OSError:
            return
        self._opening[sock.fileno()] = sock
        self.watch(sock.fileno(), lambda _: self._open(sock))

    def _open(self, sock: socket.socket) -> None:
        """Open the device node whose path came on that connection."""
        self.sweep()
        self._seen(wire.peer_pid(sock), sock)
        answer = Answer()
        try:
            if self.machine.panic:
                raise Refused(errno.ENXIO)
            path = sock.recv(wire.MAX_MESSAGE, socket.MSG_DONTWAIT).decode("utf-8", "replace")
            given = self._files.publish(self.machine.board.open(path))
            answer = Answer(given=given)
        except Refused as refusal:
            answer = Answer(refusal.code)
        except OSError as error:
            answer = Answer(error.errno or errno.EIO)
        self.unwatch(sock.fileno())
        del self._opening[sock.fileno()]
        send(sock, answer)

    def _end_opening(self) -> None:
        for sock in self._opening.values():
            self.unwatch(sock.fileno())
            sock.close()
        self._opening.clear()

    # -- calls -----------------------------------------------------------------------------------------------------------------

    def _parse(self, channel: Channel, data: bytes, fds: list[int], pid: int) -> Call | None:
        if len(data) >= wire.REQUEST.size:
            magic, request, attached, length = wire.REQUEST.unpack_from(data)
            buf = data[wire.REQUEST.size :]
            if magic == wire.MAGIC and len(buf) == length and len(fds) == 1 + attached:
                device = None if channel.opened is None else device_calls.request_of(buf, attached)
                reply = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fds[0])
                files = [self._files.file(fd) for fd in fds[1:]]
                call = Call(channel, request, buf, reply, files[0] if files else None, pid)
                if device is not None:
                    named = {at: file for at, file in zip(device.fds, files, strict=True) if file is not None}
                    return replace(call, file=None, device=device, files=named)
                if attached <= 1:
                    return call
                for file in files:
                    if file is not None:
                        file.close()
                reply.close()
                return None
        for fd in fds:
            os.close(fd)
        return None

    def _readable(self, channel: Channel) -> None:
        self.sweep()
        if not channel.waiting and channel.sock.fileno() in self._channels:
            self._serve_one(channel)

    def _serve_one(self, channel: Channel) -> bool:
        """Take one request off the channel and serve it; False when there is none."""
        call = self._receive(channel)
        if call is None:
            return False
        fault = self.machine.faults.match(
            "call", op=call.operation, session=call.session_name, token=call.token
        )
        if fault is not None:
            self._hold(fault, call)
        else:
            self._execute(call)
        return True

    def _receive(self, channel: Channel) -> Call | None:
        while True:
            try:
                data, fds, pid = wire.receive(channel.sock, socket.MSG_DONTWAIT)
            except OSError:
                return None
            if not data:
                return None
            call = self._parse(channel, data, fds, pid)
            if call is not None:
                self._seen(pid, call.reply)
                return call

    def _execute(self, call: Call) -> None:
        try:
            call.answer = self._run(call)
        except Blocked:
            self._blocked.append(
                call
            )  # its session goes on taking calls: some are refused before they would sleep
            return
        except Refused as refusal:
            call.answer = Answer(refusal.code)
        except OSError as error:
            call.answer = Answer(errno.ENFILE if error.errno == errno.EMFILE else error.errno or errno.EIO)
        if call.file is not None:
            call.file.close()
            call.file = None
        fault = None
        if not call.answer.code:
            fault = self.machine.faults.match(
                "reply", op=call.operation, session=call.session_name, token=call.token
            )
        if fault is not None:
            self._hold(fault, call)
        else:
            send_answer(call)

    def _run(self, call: Call) -> Answer:
        if call.channel.opened is not None:
            return self._run_device_file(call, call.channel.opened)
        model = self.machine.model
        if model is None:
            raise Refused(errno.ENODEV)
        session = call.channel.session
        if session is None:
            return self._run_device(call)
        body, file = model.session_ioctl(session, call.request, call.buf, call.file)
        if call.request == abi.PRESERVE_FD:
            call.file = None  # it belongs to the session now
        if call.request != abi.GET_NAME:
            self.machine.record(
                abi.OPERATIONS[call.request], call.pid, session=session.name, token=call.token
            )
        return Answer(0, body, -1 if file is None else file.fileno())

    def _run_device_file(self, call: Call, opened: OpenFile) -> Answer:
        if call.device is None:
            raise Refused(errno.ENOTTY)  # an ioctl of another kind of file
        files, call.files = call.files, {}
        fault = self.machine.faults.match("device", op=call.operation)
        if fault is not None:
            for file in files.values():
                file.close()
            raise Refused(fault.errno)
        code, reply = device_calls.run(opened, call.device, files)
        if code:
            return Answer(code, device_calls.encode(reply))
        if call.request in opened.requests and call.request not in opened.queries:
            name, struct = opened.requests[call.request]
            argument = {} if struct is None else struct.unpack(reply.argument.ljust(struct.size, b"\0"))
            self.machine.record(name, call.pid, file=opened.label, argument=argument)
        return Answer(0, device_calls.encode(reply))

    def _run_device(self, call: Call) -> Answer:
        model = self.machine.model
        if model is None:
            raise Refused(errno.ENODEV)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            session = model.device_ioctl(call.request, call.buf)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        self._add_channel(ours, session)
        self.machine.record(abi.OPERATIONS[call.request], call.pid, session=session.name)
        return Answer(0, call.buf[: abi.S_SESSION.size], given=theirs)

    def _hold(self, fault: Fault, call: Call) -> None:
        self._suspend(call.channel)
        self.held.append(Held(fault, call))

    def release(self, fault: Fault) -> None:
        """End an order and let go what it holds."""
        fault.released = True
        for held in [held for held in self.held if held.fault is fault]:
            self.held.remove(held)
            self._resume(held.call.channel)
            if held.call.answer is None:
                self._execute(held.call)
            else:
                send_answer(held.call)
        if self.jump_fault is fault:
            self.jump_fault = None
            self.jump()

    # -- reboots ---------------------------------------------------------------------------------------------------------------

    def reboot_kexec(self, pid: int) -> bool:
        """Freeze, then jump unless a fault holds the jump; True when the jump has been made. `Refused` if nothing happened."""
        self.sweep()
        self.machine.serialize(pid)
        self.jump_fault = self.machine.faults.match("jump")
        if self.jump_fault is not None:
            return False
        self.jump()
        return True

    def jump(self) -> None:
        """End the world and start the next one."""
        self._end_world()
        self.machine.jump()
        self.sync_device()

    def end_world_and(self, start: Callable[[], None]) -> None:
        """End the world without any handover, then run `start`, which boots the next one."""
        self._end_world()
        start()
        self.sync_device()

    def _end_world(self) -> None:
        for sock in iter(self._next_connection, None):
            self._seen(wire.peer_pid(sock), sock)
            sock.close()
        self._end_opening()
        for channel in self._channels.values():
            # Callers that were not served yet belong to this world as well.
            while (call := self._receive(channel)) is not None:
                abandon(call)
        for pidfd in self._pidfds:
            self._hangups.unregister(pidfd)
        self._pidfds.clear()
        self.population.kill()
        for call in [*self._blocked, *(held.call for held in self.held)]:
            abandon(call)
        self._blocked.clear()
        self.held.clear()
        self.jump_fault = None
        for channel in list(self._channels.values()):
            self._drop(channel)
