# SPDX-License-Identifier: Apache-2.0
"""The monitor against a peer that can do what no QEMU does on request: answer late, in pieces, never, or nonsense."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from luod.adapters.qemu.errors import (
    CommandRefused,
    LaunchFailed,
    MonitorError,
    MonitorTimeout,
    QmpGarbled,
    VmmDied,
)
from luod.adapters.qemu.monitor import Monitor

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 99}, "package": ""}, "capabilities": []}
}
PATIENCE_S = 30.0
Answer = Callable[["Peer", dict[str, Any], list[int]], None]


class Peer:
    """The server's end of a monitor. `answer` is called with each request and the descriptors that came in the same message."""

    def __init__(self, answer: Answer, greeting: Any = GREETING) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.answer = answer
        self.thread = threading.Thread(target=self.serve, args=(greeting,))
        self.thread.start()

    def say(self, *messages: Any) -> None:
        self.theirs.sendall(b"".join(json.dumps(each).encode() + b"\r\n" for each in messages))

    def serve(self, greeting: Any) -> None:
        if greeting is not None:
            self.say(greeting)
        rest = b""
        fds: list[int] = []
        while True:
            try:
                data, ancillary, _, _ = self.theirs.recvmsg(
                    65536, socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC
                )
            except OSError:
                data, ancillary = b"", []
            for _, _, payload in ancillary:
                fds += array.array("i", payload)
            if not data:
                break
            rest += data
            while b"\n" in rest:
                line, _, rest = rest.partition(b"\n")
                request = json.loads(line)
                if request["execute"] == "qmp_capabilities":
                    self.say({"return": {}, "id": request["id"]})
                else:
                    self.answer(self, request, fds)
                for fd in fds:
                    os.close(fd)
                fds = []

    def close(self) -> None:
        for end in (self.theirs, self.ours):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.theirs.close()
        self.ours.close()


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def make(answer: Answer = echo, **options: Any) -> Peer:
        peers.append(Peer(answer, **options))
        return peers[-1]

    yield make
    for each in peers:
        each.close()


def echo(peer: Peer, request: dict[str, Any], fds: list[int]) -> None:
    peer.say({"return": [request["arguments"], [os.fstat(fd).st_ino for fd in fds]], "id": request["id"]})


def silence(peer: Peer, request: dict[str, Any], fds: list[int]) -> None:
    pass


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def connect(peer: Peer, within_s: float = PATIENCE_S, **options: Any) -> Monitor:
    return Monitor(peer.ours, until=time.monotonic() + within_s, **options)


def test_each_of_many_threads_gets_its_answer_and_its_descriptor(make_peer: Callable[..., Peer]) -> None:
    with connect(make_peer()) as monitor, ThreadPoolExecutor(16) as pool:

        def ask(n: int) -> None:
            fd = os.memfd_create(f"m{n}")
            try:
                arguments, inodes = monitor.execute("add-fd", (fd,), timeout_s=PATIENCE_S, fdset_id=n)
                assert arguments == {"fdset-id": n}
                assert inodes == [os.fstat(fd).st_ino]
            finally:
                os.close(fd)

        for _ in pool.map(ask, range(300)):
            pass
        assert monitor.greeting.version == "99.1.0"


def test_a_descriptor_goes_once_with_a_request_of_many_pieces(make_peer: Callable[..., Peer]) -> None:
    with connect(make_peer()) as monitor:
        fd = os.memfd_create("m")
        try:
            _, inodes = monitor.execute("add-fd", (fd,), timeout_s=PATIENCE_S, blob="x" * (4 << 20))
            assert inodes == [os.fstat(fd).st_ino]
        finally:
            os.close(fd)


def test_an_error_is_raised_with_what_qemu_said(make_peer: Callable[..., Peer]) -> None:
    def refuse(peer: Peer, request: dict[str, Any], fds: list[int]) -> None:
        peer.say({"error": {"class": "DeviceNotFound", "desc": "no: File exists"}, "id": request["id"]})

    with connect(make_peer(refuse)) as monitor:
        with pytest.raises(CommandRefused, match="device_del: no") as caught:
            monitor.execute("device_del", id="x")
        assert (caught.value.error_class, caught.value.desc) == ("DeviceNotFound", "no: File exists")
        assert caught.value.errno == "EEXIST"


def test_a_late_answer_is_nobodys(make_peer: Callable[..., Peer]) -> None:
    asked: list[str] = []

    def late(peer: Peer, request: dict[str, Any], fds: list[int]) -> None:
        asked.append(request["id"])
        if len(asked) == 2:
            peer.say({"return": "first", "id": asked[0]}, {"return": "second", "id": asked[1]})

    with connect(make_peer(late)) as monitor:
        with pytest.raises(MonitorTimeout, match=r"query-status within 0\.01 s"):
            monitor.execute("query-status", timeout_s=0.01)
        assert monitor.execute("query-name", timeout_s=PATIENCE_S) == "second"


def test_events_go_to_all_who_listened_before_and_in_order(make_peer: Callable[..., Peer]) -> None:
    def tell(peer: Peer, request: dict[str, Any], fds: list[int]) -> None:
        names = request["arguments"]["names"]
        peer.say(*({"event": name, "data": {"n": n}} for n, name in enumerate(names)))
        peer.say({"return": {}, "id": request["id"]})

    with connect(make_peer(tell)) as monitor:
        monitor.execute("tell", names=["STOP"])
        with monitor.listen() as one, monitor.listen() as other:
            monitor.execute("tell", names=["A", "STOP", "B", "STOP"])
            assert one.wait({"STOP"}, soon()).data == {"n": 1}
            assert one.wait({"A", "STOP"}, soon()).data == {"n": 3}
            assert [event.name for event in one.drain()] == []
            assert other.wait({"STOP"}, soon(), accept=lambda event: event.data["n"] > 1).data == {"n": 3}
            monitor.execute("tell", names=["B"])
            assert [event.name for event in other.drain()] == ["B"]
            with pytest.raises(MonitorTimeout, match="did not say STOP"):
                other.wait({"STOP"}, time.monotonic())


def test_an_event_ends_a_wait_that_has_begun(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    with connect(peer) as monitor, monitor.listen() as events, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(events.wait, {"RESUME"}, soon())
        peer.say({"event": "STOP"}, {"event": "RESUME"})
        assert waiting.result(PATIENCE_S).name == "RESUME"


def test_the_end_of_qemu_ends_every_wait(make_peer: Callable[..., Peer]) -> None:
    arrived = threading.Event()

    def hear(peer: Peer, request: dict[str, Any], fds: list[int]) -> None:
        arrived.set()

    peer = make_peer(hear)
    with (
        connect(peer, obituary=lambda: "process 7 exited with 1: out of luck") as monitor,
        monitor.listen() as events,
    ):
        with ThreadPoolExecutor(2) as pool:
            asking = pool.submit(monitor.execute, "quit", timeout_s=PATIENCE_S)
            waiting = pool.submit(events.wait, {"SHUTDOWN"}, soon())
            assert arrived.wait(PATIENCE_S)
            peer.theirs.shutdown(socket.SHUT_RDWR)
            for each in (asking, waiting):
                with pytest.raises(VmmDied, match="out of luck"):
                    each.result(PATIENCE_S)
        with pytest.raises(VmmDied, match=r"query-status: .*out of luck"):
            monitor.execute("query-status")
        assert isinstance(monitor.over, VmmDied)


def test_nonsense_ends_the_conversation(make_peer: Callable[..., Peer]) -> None:
    def babble(peer: Peer, request: dict[str, Any], fds: list[int]) -> None:
        peer.theirs.sendall(b"Segmentation fault\n")

    with connect(make_peer(babble)) as monitor:
        for _ in range(2):
            with pytest.raises(QmpGarbled, match="Segmentation fault"):
                monitor.execute("query-status", timeout_s=PATIENCE_S)


def test_closing_ends_a_wait_in_another_thread(make_peer: Callable[..., Peer]) -> None:
    arrived = threading.Event()

    def hear(peer: Peer, request: dict[str, Any], fds: list[int]) -> None:
        arrived.set()

    def inquest() -> str:
        pytest.fail("nobody has died")

    with connect(make_peer(hear), obituary=inquest) as monitor, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(monitor.execute, "query-status", timeout_s=PATIENCE_S)
        assert arrived.wait(PATIENCE_S)
        monitor.close()
        with pytest.raises(MonitorError, match="was closed"):
            asking.result(PATIENCE_S)


def test_an_answer_before_the_question_is_none() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(json.dumps(GREETING).encode() + b'\n{"return": {}, "id": "luod-1"}\n')
        with pytest.raises(MonitorTimeout):
            Monitor(ours, until=time.monotonic() + 0.05)


def test_half_a_request_ends_the_conversation() -> None:
    """As when QEMU is stopped and its socket fills up: what came after half a line would not be understood."""
    ours, theirs = socket.socketpair()
    with theirs:
        negotiated = threading.Thread(
            target=lambda: (theirs.recv(4096), theirs.sendall(b'{"return": {}, "id": "luod-1"}\n'))
        )
        theirs.sendall(json.dumps(GREETING).encode() + b"\n")
        negotiated.start()
        with Monitor(ours, until=soon()) as monitor:
            negotiated.join()
            with pytest.raises(MonitorTimeout, match="does not read"):
                monitor.execute("x", timeout_s=0.05, blob="x" * (4 << 20))
            assert isinstance(monitor.over, MonitorTimeout)
            with pytest.raises(MonitorTimeout, match=r"query-status: .*does not read"):
                monitor.execute("query-status")


@pytest.mark.parametrize(
    ("greeting", "error"), [(None, MonitorTimeout), ({"hello": 1}, QmpGarbled)], ids=["silent", "other"]
)
def test_what_does_not_greet_is_let_go(
    greeting: Any, error: type[Exception], make_peer: Callable[..., Peer]
) -> None:
    peer = make_peer(greeting=greeting)
    with pytest.raises(error):
        connect(peer, within_s=0.05 if greeting is None else PATIENCE_S)
    assert peer.ours.fileno() == -1


# -- finding the socket


def test_a_socket_that_comes_later_is_found(make_peer: Callable[..., Peer], socket_path: Path) -> None:
    peer = make_peer()
    asked = threading.Event()

    def alive() -> bool:
        asked.set()
        return True

    def serve() -> None:
        assert asked.wait(PATIENCE_S)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(socket_path))
            listener.listen()
            taken, _ = listener.accept()
            with taken:
                taken.sendall(json.dumps(GREETING).encode() + b"\n")
                request = json.loads(taken.recv(4096))
                taken.sendall(json.dumps({"return": {}, "id": request["id"]}).encode() + b"\n")
                taken.recv(1)

    server = threading.Thread(target=serve)
    server.start()
    with Monitor.connect(socket_path, timeout_s=PATIENCE_S, alive=alive) as monitor:
        assert monitor.greeting.version == "99.1.0"
    server.join()
    peer.close()


def test_a_socket_that_never_comes(socket_path: Path) -> None:
    with pytest.raises(MonitorTimeout, match="nobody serves"):
        Monitor.connect(socket_path, timeout_s=0.02)
    with pytest.raises(LaunchFailed, match="so it ended"):
        Monitor.connect(
            socket_path, timeout_s=PATIENCE_S, alive=lambda: False, obituary=lambda: "so it ended"
        )
    with pytest.raises(MonitorError, match="107 bytes"):
        Monitor.connect(socket_path.parent / ("x" * 120), timeout_s=PATIENCE_S)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        listener.listen()

        def refuse(_: socket.socket) -> None:
            raise LaunchFailed("not you")

        with pytest.raises(LaunchFailed, match="not you"):
            Monitor.connect(socket_path, timeout_s=PATIENCE_S, check=refuse)
