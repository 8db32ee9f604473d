# SPDX-License-Identifier: Apache-2.0
"""`Monitor`: a conversation with one QEMU over its QMP socket, for any number of threads.

A thread of its own reads, so that an end of QEMU is known at once and its events never pile up in QEMU. Who sends waits for the
answer with a deadline. Descriptors go by SCM_RIGHTS in the same sendmsg as the command that needs them.
"""

from __future__ import annotations

import array
import contextlib
import errno
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .codec import Codec, Event, Failure, Greeting, Return
from .errors import (
    CommandRefused,
    LaunchFailed,
    MonitorError,
    MonitorTimeout,
    QemuError,
    QmpGarbled,
    VmmDied,
)

COMMAND_S = 5.0
"""How long an answer may take, in seconds, unless the caller says otherwise."""
_RETRY_S = 0.005
_MAX_EVENTS = 4096


class Events:
    """The events that have come since `Monitor.listen`, in their order. Who listens before a command misses nothing of it.

    At most 4096 are kept; older ones go first.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.waiting: deque[Event] = deque(maxlen=_MAX_EVENTS)

    def wait(
        self, names: Collection[str], until: float, *, accept: Callable[[Event], bool] = lambda _: True
    ) -> Event:
        """Return the next event of one of `names` that `accept` likes; those before it are passed over.

        `until` is a time of the monotonic clock. Raises `MonitorTimeout` when it is reached and `VmmDied` when QEMU ends before.
        """
        return self._monitor.await_event(self, names, until, accept)

    def drain(self) -> list[Event]:
        """Return what has come and was not waited for, and forget it."""
        return self._monitor.drain(self)


class Monitor:
    """A connection to QEMU's monitor. Use it as a context manager, or call `close`: it has a socket and a thread.

    `obituary` says how the process ended, for the message of `VmmDied`. QEMU serves one connection at a time.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        until: float,
        obituary: Callable[[], str] = lambda: "",
        name: str = "QEMU",
    ) -> None:
        """Take over a connected socket and negotiate until `until` (monotonic). Raises as `execute` does; the socket is then closed."""
        self.name = name
        self._sock = sock
        self._obituary = obituary
        self._codec = Codec()
        self._answers: dict[str, Return | Failure | None] = {}
        self._listeners: list[Events] = []
        self._end: QemuError | None = None
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._reader = threading.Thread(target=self._read, name=f"qmp {name}", daemon=True)
        sock.setblocking(True)
        self._reader.start()
        try:
            self.greeting = self._await_greeting(until)
            self.execute("qmp_capabilities", timeout_s=until - time.monotonic())
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls,
        path: Path,
        *,
        timeout_s: float,
        alive: Callable[[], bool] = lambda: True,
        obituary: Callable[[], str] = lambda: "",
        check: Callable[[socket.socket], None] = lambda _: None,
        name: str = "QEMU",
    ) -> Monitor:
        """Connect to the socket at `path` and negotiate, within `timeout_s`.

        A QEMU that has just been started does not listen yet: while `alive` says that it runs, the socket is tried again. `check` may
        refuse the peer by raising. Raises `LaunchFailed` when QEMU ends first, `MonitorTimeout`, and `MonitorError` for a bad path.
        """
        until = time.monotonic() + timeout_s
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _reach(sock, path, until, alive, obituary)
            check(sock)
        except BaseException:
            sock.close()
            raise
        return cls(sock, until=until, obituary=obituary, name=name)

    # -- commands

    def execute(
        self, command: str, fds: Sequence[int] = (), *, timeout_s: float = COMMAND_S, **arguments: Any
    ) -> Any:
        """Run a QMP command and return what it returns. In names of arguments `_` stands for `-`.

        `fds` stay the caller's; QEMU gets copies. Raises `CommandRefused` for a QMP error, `MonitorTimeout`, and `VmmDied` or
        `QmpGarbled` when the conversation has ended.
        """
        return self.ask(
            command, {name.replace("_", "-"): value for name, value in arguments.items()}, fds, timeout_s
        )

    def ask(
        self,
        command: str,
        arguments: dict[str, Any],
        fds: Sequence[int] = (),
        timeout_s: float = COMMAND_S,
    ) -> Any:
        """Run a QMP command as `execute` does, with arguments named exactly so."""
        until = time.monotonic() + timeout_s
        with self._changed:
            self._refuse_if_over(command)
            number, line = self._codec.request(command, arguments)
            self._answers[number] = None
        try:
            self._send(command, line, fds, until)
            with self._changed:
                self._changed.wait_for(lambda: self._answers[number] or self._end, until - time.monotonic())
                answer = self._answers[number]
                if answer is None:
                    self._refuse_if_over(command)
                    raise MonitorTimeout(
                        f"{self.name} did not answer {command} within {timeout_s:g} s",
                        hint="is the host overloaded, or QEMU stopped or hung? Raise the timeout or look with `ps`",
                    )
        finally:
            with self._changed:
                del self._answers[number]
        if isinstance(answer, Failure):
            raise CommandRefused(command, answer.error_class, answer.desc)
        return answer.value

    def _send(self, command: str, line: bytes, fds: Sequence[int], until: float) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        rest = memoryview(line)
        # The lock is waited for with the deadline too: the one before may be stuck on a QEMU that does not read.
        if not self._sending.acquire(timeout=max(0.0, until - time.monotonic())):
            raise MonitorTimeout(f"{self.name} does not read its monitor: {command} was not sent")
        try:
            while rest:
                try:
                    sent = self._sock.sendmsg([rest], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
                except BlockingIOError:
                    self._await_room(command, len(rest) < len(line), until)
                except OSError as error:
                    self._finish(self._death(error.strerror or str(error)))
                    with self._changed:
                        self._refuse_if_over(command)
                else:
                    rest, rights = rest[sent:], []
        finally:
            self._sending.release()

    def _await_room(self, command: str, halfway: bool, until: float) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            late = MonitorTimeout(f"{self.name} does not read its monitor: {command} was not sent")
            if halfway:
                self._finish(late)  # half a line is out: nothing that follows it would be understood
            raise late

    def _refuse_if_over(self, command: str) -> None:
        if self._end is not None:
            end = self._end
            raise type(end)(f"{command}: {end.message}", hint=end.hint)

    # -- events

    @contextlib.contextmanager
    def listen(self) -> Generator[Events]:
        """Collect the events that come from now on. Several may listen; each gets all of them."""
        events = Events(self)
        with self._changed:
            self._listeners.append(events)
        try:
            yield events
        finally:
            with self._changed:
                self._listeners.remove(events)

    def await_event(
        self, events: Events, names: Collection[str], until: float, accept: Callable[[Event], bool]
    ) -> Event:
        """What `Events.wait` does."""
        with self._changed:
            while True:
                while events.waiting:
                    event = events.waiting.popleft()
                    if event.name in names and accept(event):
                        return event
                self._refuse_if_over(f"waiting for {' or '.join(sorted(names))}")
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    if events.waiting:
                        continue
                    raise MonitorTimeout(f"{self.name} did not say {' or '.join(sorted(names))} in time")

    def drain(self, events: Events) -> list[Event]:
        """What `Events.drain` does."""
        with self._changed:
            found = list(events.waiting)
            events.waiting.clear()
            return found

    # -- the reader

    def _read(self) -> None:
        while True:
            how = "it hung up"
            try:
                data = self._sock.recv(1 << 16)
            except OSError as error:
                data, how = b"", error.strerror or str(error)
            if not data:
                # Asking how QEMU ended takes a while when it has not; who hangs up himself does not ask.
                if self.over is None:
                    self._finish(self._death(how))
                return
            with self._changed:
                for message in self._codec.feed(data):
                    match message:
                        case Event():
                            for events in self._listeners:
                                events.waiting.append(message)
                        case Return() | Failure():
                            if message.id in self._answers:
                                self._answers[message.id] = message
                        case Greeting():
                            pass
                        case QmpGarbled():
                            self._end = message
                self._changed.notify_all()
                if self._end is not None:
                    return

    def _death(self, how: str) -> QemuError:
        return VmmDied(f"{self.name} is gone: {self._obituary() or how}", hint=_GONE)

    def _finish(self, end: QemuError) -> None:
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()

    def _await_greeting(self, until: float) -> Greeting:
        with self._changed:
            self._changed.wait_for(lambda: self._codec.greeting or self._end, until - time.monotonic())
            self._refuse_if_over("connecting")
            if self._codec.greeting is None:
                raise MonitorTimeout(
                    f"{self.name} does not greet", hint="is another program connected to its monitor?"
                )
            return self._codec.greeting

    @property
    def over(self) -> QemuError | None:
        """What ended the conversation, or None while it goes on."""
        with self._changed:
            return self._end

    def close(self) -> None:
        """Hang up. Whoever waits for an answer gets a `MonitorError`. QEMU runs on."""
        self._finish(MonitorError(f"the conversation with {self.name} was closed"))
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        with self._sending:
            self._sock.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_GONE = "its memory and what was saved are still with whoever holds the memfds: start another QEMU on them"


def _reach(
    sock: socket.socket, path: Path, until: float, alive: Callable[[], bool], obituary: Callable[[], str]
) -> None:
    """Connect as soon as somebody listens."""
    while True:
        living = alive()
        # A deadline for connect itself: it blocks while the queue of the listener is full.
        sock.settimeout(max(_RETRY_S, until - time.monotonic()))
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError):
            if not living:
                raise LaunchFailed(
                    f"QEMU ended before it served {path}: {obituary()}", hint="see what it says"
                ) from None
            if time.monotonic() >= until:
                raise MonitorTimeout(
                    f"nobody serves {path}", hint="QEMU needs `-qmp unix:PATH,server=on,wait=off`"
                ) from None
            time.sleep(_RETRY_S)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "")
            raise MonitorError(
                f"cannot connect to {path}: {error.strerror or error}",
                hint="the path of a Unix socket has at most 107 bytes, and QEMU's user must let this one in",
                errno=name,
            ) from None
        else:
            return
