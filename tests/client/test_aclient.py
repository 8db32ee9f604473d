# SPDX-License-Identifier: Apache-2.0
"""The asynchronous client: the same answers, and nothing lost when tasks are cancelled."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from luod_world import World

from luod import fdpass
from luod.aclient import AsyncClient, ClientError, ConnectionLost, Timeout, Unreachable

LONG = 20.0


class FakeLuod:
    """The other end of a client's socket, asked without waiting for anybody."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self._buffer = b""

    async def hear(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            await anyio.wait_readable(self.sock)
            data, fds = fdpass.receive(self.sock)
            assert data
            for fd in fds:
                os.close(fd)
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)  # type: ignore[no-any-return]

    def say(self, with_fds: int = 0, **message: Any) -> None:
        opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(with_fds)]
        if with_fds:
            message["fds"] = with_fds
        fdpass.send_all(self.sock, json.dumps(message).encode() + b"\n", opened)
        for fd in opened:
            os.close(fd)


@pytest.fixture
async def pair(no_leaks: None) -> AsyncIterator[tuple[AsyncClient, FakeLuod]]:
    ours, theirs = socket.socketpair()
    with theirs:
        async with AsyncClient(ours, timeout=LONG) as client:
            yield client, FakeLuod(theirs)


Pair = tuple[AsyncClient, FakeLuod]


async def test_calls_and_events_at_once(pair: Pair) -> None:
    client, luod = pair
    got: dict[Any, Any] = {}

    async def ask(number: int) -> None:
        got[number] = (await client.call("PING", number=number))["number"]

    async def listen() -> None:
        got["event"] = (await client.next_event(LONG, names=["NOW"])).name

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        for number in range(3):
            group.start_soon(ask, number)
        heard = [await luod.hear() for _ in range(3)]
        luod.say(event="EARLIER")
        luod.say(event="NOW")
        for one in reversed(heard):
            luod.say(reply=one["seq"], ok=True, number=one["number"])
    assert got == {"event": "NOW", 0: 0, 1: 1, 2: 2}
    assert (await client.next_event(0)).name == "EARLIER"


async def test_a_refusal(pair: Pair) -> None:
    client, luod = pair
    luod.say(reply=1, ok=False, error={"code": "NO_UPDATE", "message": "none", "hint": "start one"})
    with pytest.raises(ClientError) as caught:
        await client.abort()
    assert (caught.value.code, caught.value.hint) == ("NO_UPDATE", "start one")


async def test_the_fd_of_a_claim(pair: Pair) -> None:
    client, luod = pair
    luod.say(1, reply=1, ok=True, id="vm1")
    with await client.claim("vm1") as reply:
        os.close(reply.take_fd())


async def test_a_cancelled_call_leaves_the_rest_alone(pair: Pair) -> None:
    """The task that reads for all is cancelled: another one reads on; and the late reply is closed with its fd."""
    client, luod = pair
    got = []
    reader = anyio.CancelScope()

    async def claim() -> None:
        with reader:
            await client.claim("vm1")

    async def ask() -> None:
        got.append((await client.ping()).fields)

    async with anyio.create_task_group() as group:
        group.start_soon(claim)
        assert (await luod.hear())["seq"] == 1
        group.start_soon(ask)
        assert (await luod.hear())["seq"] == 2
        reader.cancel()
        luod.say(1, reply=1, ok=True)
        luod.say(reply=2, ok=True)
    assert got == [{}]
    assert not client.closed


async def test_timeouts(pair: Pair) -> None:
    client, luod = pair
    with pytest.raises(Timeout, match="PING"):
        await client.call("PING", timeout=0.01)
    with pytest.raises(Timeout, match="X or Y"):
        await client.next_event(0.01, names=["X", "Y"])
    luod.say(1, reply=1, ok=True)
    luod.say(event="A")
    assert (await client.next_event(LONG)).name == "A"


async def test_close_wakes_who_waits(pair: Pair) -> None:
    client, luod = pair
    lost = []

    async def wait(what: Any) -> None:
        with pytest.raises(ConnectionLost, match="closed"):
            await what
        lost.append(1)

    async with anyio.create_task_group() as group:
        group.start_soon(wait, client.call("PING", timeout=math.inf))
        await luod.hear()
        group.start_soon(wait, client.next_event())
        await anyio.lowlevel.checkpoint()
        client.close()
    assert len(lost) == 2


async def test_luod_hangs_up(pair: Pair) -> None:
    client, luod = pair
    luod.say(event="RESUME")
    luod.say(event="ERROR", error={"code": "LIMIT", "message": "too many connections"})
    luod.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConnectionLost, match="too many connections"):
        await client.ping()
    assert (await client.next_event(0)).name == "RESUME"


async def test_a_request_cancelled_in_the_middle_ends_the_connection(pair: Pair) -> None:
    client, _ = pair
    while not client.closed:
        with contextlib.suppress(Timeout):
            await client.call("PING", timeout=0.01, padding="x" * 60000)
    with pytest.raises(ConnectionLost):
        await client.ping()


async def test_connecting(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with pytest.raises(Unreachable) as caught:
        await AsyncClient.connect(path, retry_until=time.monotonic() + 0.1)
    assert caught.value.why == "missing"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:

        async def serve() -> None:
            server.bind(str(path))
            server.listen()

        async with anyio.create_task_group() as group:
            group.start_soon(serve)
            client = await AsyncClient.connect(path, retry_until=time.monotonic() + LONG)
            client.close()


async def test_against_luod(shared_world: World) -> None:
    async with await AsyncClient.connect(shared_world.socket, timeout=LONG) as client:
        assert (await client.hello(["freeze"]))["features"] == ["freeze"]
        assert (await client.subscribe("async1"))["session"] == "async1.1"
        await client.watch(after=0)
        event = await client.next_event(LONG, names=["PROGRESS"])
        assert event["record"]["id"] == 1
        with pytest.raises(ClientError) as caught:
            await client.finished("async1")
        assert caught.value.code == "OUT_OF_ORDER"
    await anyio.to_thread.run_sync(shared_world.wait_record, "session.aborted", "async1.1")
