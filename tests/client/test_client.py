# SPDX-License-Identifier: Apache-2.0
"""The client library against a luod that does what the test says: answers, is late, hangs up, sends too much."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from luod_world import World

from luod import fdpass
from luod.client import Client, ClientError, ConnectionLost, Reply, Timeout, TransportError, Unreachable
from luod.states.errors import LuodError
from luod.wire import MAX_LINE, ProtocolError

LONG = 20.0


class FakeLuod:
    """The other end of a client's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(LONG)
        self._buffer = b""
        self._pool = ThreadPoolExecutor(4)

    def background(self, work: Callable[[], Any]) -> Future[Any]:
        return self._pool.submit(work)

    def hear(self) -> dict[str, Any]:
        """Return the next command; its fds are closed, their number is in `came`."""
        came = 0
        while b"\n" not in self._buffer:
            data, fds = fdpass.receive(self.sock)
            assert data
            came += len(fds)
            for fd in fds:
                os.close(fd)
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return {**json.loads(line), "came": came}

    def say(self, fds: int = 0, **message: Any) -> None:
        """Send a message with so many fds."""
        opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(fds)]
        fdpass.send_all(self.sock, json.dumps(message).encode() + b"\n", opened)
        for fd in opened:
            os.close(fd)

    def close(self) -> None:
        self.sock.close()
        self._pool.shutdown()


@pytest.fixture
def pair() -> Iterator[tuple[Client, FakeLuod]]:
    ours, theirs = socket.socketpair()
    fake = FakeLuod(theirs)
    try:
        with Client(ours, timeout=LONG) as client:
            yield client, fake
    finally:
        fake.close()


def test_a_command_and_its_reply(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    asked = luod.background(lambda: client.subscribe("vm1", deadline_s=None))
    heard = luod.hear()
    assert heard == {
        "cmd": "SUBSCRIBE", "seq": 1, "id": "vm1", "policy": "required", "order": 0, "devices": "preserve", "came": 0,
    }  # fmt: skip
    luod.say(reply=1, ok=True, session="vm1.1")
    reply = asked.result(LONG)
    assert isinstance(reply, Reply)
    assert reply.fields == {"session": "vm1.1"}
    assert (reply["session"], reply.get("nothing", 5)) == ("vm1.1", 5)
    with pytest.raises(ConnectionLost, match="no fd"):
        reply.take_fd()


def test_a_refusal(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    asked = luod.background(client.kexec)
    luod.hear()
    error = {"code": "KERNEL", "message": "it said no", "hint": "ask again", "errno": "EBUSY", "newer": 1}
    luod.say(reply=1, ok=False, error=error)
    with pytest.raises(ClientError, match="it said no") as caught:
        asked.result(LONG)
    assert (caught.value.code, caught.value.hint, caught.value.errno) == ("KERNEL", "ask again", "EBUSY")
    assert (caught.value.exit_code, str(caught.value)) == (1, "it said no (ask again)")
    for body in (None, "no", [], {}, {"code": None}):
        asked = luod.background(client.kexec)
        luod.say(reply=luod.hear()["seq"], ok=False, error=body)
        with pytest.raises(ClientError) as caught:
            asked.result(LONG)
        assert caught.value.code == "UNKNOWN"


def test_fds_go_both_ways(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    with open("/dev/null", "rb") as null:
        asked = luod.background(lambda: client.adopt("vm1", null.fileno()))
        heard = luod.hear()
        assert (heard["fds"], heard["came"]) == (1, 1)
        luod.say(reply=1, ok=True)
        asked.result(LONG)
        assert not null.closed
    asked = luod.background(lambda: client.claim("vm1"))
    luod.hear()
    opened = os.open("/dev/null", os.O_RDONLY)
    fdpass.send_all(luod.sock, b'{"reply":2,"ok":true,"id":"vm1","fds":1}\n', [opened])
    os.close(opened)
    with asked.result(LONG) as reply:
        fd = reply.take_fd()
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_what_the_caller_does_not_take_is_closed(pair: tuple[Client, FakeLuod]) -> None:
    """The fixture that looks for leaks is the judge of all that is sent here."""
    client, luod = pair
    opened = os.open("/dev/null", os.O_RDONLY)
    for line in (
        b'{"event":"START_PRESERVATION","id":"vm1","fds":3}\n',
        b'{"event":"SESSION","id":"vm1","fds":3}\n',
        b'{"event":"RESUME","id":"vm1","fds":3}\n',
        b'{"reply":99,"ok":true,"fds":3}\n',
        b'{"neither":"reply nor event","fds":3}\n',
    ):
        fdpass.send_all(luod.sock, line, [opened] * 3)
    fdpass.send_all(luod.sock, b'{"event":"LAST","half":', [opened] * 3)
    os.close(opened)
    with client.next_event(LONG) as event:
        assert (event.name, len(event.fds)) == ("START_PRESERVATION", 3)
    asked = luod.background(client.ping)
    luod.hear()
    fdpass.send_all(luod.sock, b'1}\n{"reply":1,"ok":true}\n')
    assert asked.result(LONG).fields == {}


def test_a_reply_to_nobody_is_dropped_with_its_fds(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    with pytest.raises(Timeout, match="CLAIM"):
        client.call("CLAIM", timeout=0, id="vm1")
    luod.hear()
    opened = os.open("/dev/null", os.O_RDONLY)
    fdpass.send_all(luod.sock, b'{"reply":1,"ok":true,"fds":1}\n', [opened])
    os.close(opened)
    asked = luod.background(client.ping)
    assert luod.hear()["seq"] == 2
    luod.say(reply=2, ok=True)
    asked.result(LONG)
    assert not client.closed


def test_events_wait_for_those_who_ask(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    with pytest.raises(Timeout):
        client.next_event(0)
    for name in ("A", "B", "A", "C"):
        luod.say(event=name)
    assert client.next_event(LONG, names=["C"]).name == "C"
    assert [client.next_event(LONG).name for _ in range(3)] == ["A", "B", "A"]
    with pytest.raises(Timeout, match="X or Y"):
        client.next_event(0, names=["X", "Y"])


def test_threads_share_a_client(pair: tuple[Client, FakeLuod]) -> None:
    """Replies out of order and events between them: each thread gets its own."""
    client, luod = pair
    event = luod.background(lambda: client.next_event(LONG))
    calls = [luod.background(lambda number=number: client.call("PING", number=number)) for number in range(3)]
    heard = [luod.hear() for _ in calls]
    luod.say(event="NOW")
    for one in reversed(heard):
        luod.say(reply=one["seq"], ok=True, number=one["number"])
    assert event.result(LONG).name == "NOW"
    assert [one.result(LONG)["number"] for one in calls] == [0, 1, 2]


def test_close_wakes_who_waits(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    call = luod.background(lambda: client.call("PING", timeout=math.inf))
    luod.hear()
    event = luod.background(client.next_event)
    client.close()
    for waiting in (call, event):
        with pytest.raises(ConnectionLost, match="closed"):
            waiting.result(LONG)
    client.close()
    for use in (client.ping, client.next_event):
        with pytest.raises(ConnectionLost):
            use()


def test_luod_hangs_up(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    call = luod.background(client.ping)
    luod.hear()
    luod.say(event="RESUME")
    luod.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConnectionLost, match="ended") as caught:
        call.result(LONG)
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, TransportError)
    assert client.next_event(0).name == "RESUME", "what came before the end can still be had"
    with pytest.raises(ConnectionLost):
        client.next_event()


def test_the_reason_for_hanging_up_is_told(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    luod.say(
        event="ERROR", error={"code": "LIMIT", "message": "uid 7 has 9 connections already", "hint": "wait"}
    )
    luod.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConnectionLost, match="9 connections") as caught:
        client.ping()
    assert caught.value.hint == "wait"


def test_a_luod_that_talks_nonsense(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    luod.sock.sendall(b"HTTP/1.1 400 Bad Request\r\n")
    with pytest.raises(ConnectionLost, match="broke the protocol"):
        client.next_event(LONG)


def test_more_fds_than_may_be_open(pair: tuple[Client, FakeLuod]) -> None:
    """A client that is out of descriptors loses its connection, not its mind."""
    import resource

    client, luod = pair
    opened = os.open("/dev/null", os.O_RDONLY)
    fdpass.send_all(luod.sock, b'{"event":"START_PRESERVATION","id":"vm1"}\n', [opened])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened, hard))
    try:
        with pytest.raises(ConnectionLost, match="fds were lost"):
            client.next_event(LONG)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(opened)


def test_a_luod_that_does_not_read(pair: tuple[Client, FakeLuod]) -> None:
    """A request that went out in part ends the connection: nothing can follow half a line."""
    client, _ = pair
    with pytest.raises(Timeout, match="could not be sent"):  # noqa: PT012
        for _ in range(1000):
            with contextlib.suppress(Timeout):
                client.call("PING", timeout=0, padding="x" * 60000)
            if client.closed:
                raise Timeout("could not be sent")
    assert client.closed
    with pytest.raises(ConnectionLost):
        client.ping()


def test_what_does_not_fit_in_a_line_is_not_sent(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    with pytest.raises(ProtocolError, match="does not fit"):
        client.call("PING", padding="x" * MAX_LINE)
    asked = luod.background(client.ping)
    assert luod.hear()["seq"] == 1
    luod.say(reply=1, ok=True)
    asked.result(LONG)


def test_an_fd_that_is_not_open(pair: tuple[Client, FakeLuod]) -> None:
    client, luod = pair
    with pytest.raises(OSError, match="Bad file"):
        client.adopt("vm1", 9999)
    asked = luod.background(client.ping)
    luod.say(reply=luod.hear()["seq"], ok=True)
    asked.result(LONG)


# -- connecting


def listening(path: Path, backlog: int = 8) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(backlog)
    return sock


def test_why_luod_is_unreachable(tmp_path: Path) -> None:
    path = tmp_path / "sock"

    def why(where: object, **options: Any) -> str:
        with pytest.raises(Unreachable) as caught:
            Client.connect(str(where), **options)
        assert (caught.value.exit_code, caught.value.path) == (3, str(where))
        assert caught.value.hint
        assert str(where)[:50] in str(caught.value)
        return caught.value.why

    assert why(path) == "missing"
    path.touch()
    assert why(path) == "refused"
    path.unlink()
    listening(path).close()
    assert why(path) == "refused"
    assert why(tmp_path / ("x" * 200)) == "invalid"
    assert why(path / "below") == "invalid"
    path.unlink()
    with listening(path, 0), Client.connect(path):
        assert why(path, timeout=0.05) == "busy"


@pytest.mark.skipif(os.getuid() != 0, reason="root may open what others may not, and must become another uid")
def test_a_socket_that_may_not_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with listening(path):
        path.chmod(0o600)
        os.chmod(tmp_path, 0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(Unreachable) as caught:
                Client.connect(path)
        finally:
            os.seteuid(0)
    assert caught.value.why == "denied"


def test_waiting_for_luod(tmp_path: Path) -> None:
    """A socket that comes later is found; one that never comes is given up at the deadline, and not before."""
    path = tmp_path / "sock"
    began = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        Client.connect(path, retry_until=began + 0.2)
    assert caught.value.why == "missing"
    assert 0.2 <= time.monotonic() - began < 10
    attempts = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(
            lambda: (attempts.set(), Client.connect(path, retry_until=time.monotonic() + LONG))[1]
        )
        attempts.wait(LONG)
        with listening(path) as server, connecting.result(LONG):
            server.accept()[0].close()


def test_every_error_is_of_the_one_tree() -> None:
    for error in (ClientError, ConnectionLost, Timeout, Unreachable):
        assert issubclass(error, LuodError)


# -- against luod itself


def test_against_luod(shared_world: World) -> None:
    with shared_world.client() as client:
        hello = client.hello()
        assert (hello["version"], hello["role"]) == (1, "admin")
        assert hello["boot_id"] == client.status()["boot_id"] == shared_world.boot_id
        assert client.subscribe("lib1").fields == {"session": "lib1.1", "state": "new"}
        assert [one["id"] for one in client.clients()["clients"]] == ["lib1"]
        records = list(client.records())
        assert [one["id"] for one in records] == list(range(1, records[-1]["id"] + 1))
        assert {one["stream"] for one in client.records(stream="lib1.1")} == {"lib1.1"}
        assert list(client.records(after=records[-1]["id"])) == []
        with pytest.raises(ClientError) as caught:
            client.claim("lib1")
        assert caught.value.code == "OUT_OF_ORDER"
    shared_world.wait_record("session.aborted", "lib1.1")


def test_a_restart_of_luod(world: World) -> None:
    with world.client() as client:
        client.subscribe("vm1")
        world.kill_luod()
        with pytest.raises(ConnectionLost):
            client.ping()
        with pytest.raises(Unreachable) as caught:
            world.client()
        assert caught.value.why == "refused"
        world.start_luod()
    with world.client(retry_until=time.monotonic() + LONG) as client:
        assert client.subscribe("vm1")["session"] == "vm1.1"
