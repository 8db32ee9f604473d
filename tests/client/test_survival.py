# SPDX-License-Identifier: Apache-2.0
"""No client can end luod, or stop it from serving others, whatever it is allowed to say.

Each test has a luod of its own, so that one that dies is seen as exactly that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from luod_world import PATIENCE_S, Puppet, Wire, World

from luod.client import Client, ClientError


@contextlib.contextmanager
def surviving(state: Path) -> Iterator[World]:
    """A world whose luod must live at the end of the block, answer, and end on SIGTERM as it should."""
    world = World(state)
    try:
        world.boot()
        assert world.luod is not None
        yield world
        with world.client() as link:
            link.ping()
        code = world.luod.end(signal.SIGTERM)
        log = world.log.read_text(errors="replace")
        assert code == 0, f"luod ended with {code}: {log[-3000:]}"
        assert "Traceback" not in log, log[-3000:]
    finally:
        world.power_off()


def subscribe_many(link: Client, count: int) -> None:
    for number in range(count):
        link.subscribe(f"vm-with-a-long-name-as-they-are-common-{number:04}")


def test_a_client_that_comes_and_goes(disk_path: Path) -> None:
    with surviving(disk_path / "state") as world, Puppet(world) as puppet:
        puppet.call("SUBSCRIBE", id="again")
        before = world.resting_fds()
        for _ in range(10):
            assert puppet.ask("churn", client="again", count=30) == ["new"], "subscribed, and undone at once"
            puppet.reconnect()
            puppet.call("SUBSCRIBE", id="again")
        assert world.settled_fds(before) == before


def test_an_inventory_as_large_as_a_line(disk_path: Path) -> None:
    """What a line can bring, replies, claims and watchers can carry, or it is refused."""
    resources = [{"token": f"{number:#x}", "kind": "m", "size": 1} for number in range(1, 1600)]
    with surviving(disk_path / "state") as world, Puppet(world) as puppet, world.client() as admin:
        puppet.call("SUBSCRIBE", id="vm1")
        admin.watch()
        world.kexec(admin)
        puppet.event("START_PRESERVATION")
        try:
            puppet.call("PRESERVED", id="vm1", resources=resources)
        except ClientError as error:
            assert error.code in ("LIMIT", "BAD_FIELD", "LINE_TOO_LONG")  # noqa: PT017
        else:
            with world.client() as observer:
                with contextlib.suppress(ClientError):
                    assert len(observer.session("vm1")["session"]["resources"]) == len(resources)
                with contextlib.suppress(ClientError):
                    observer.journal()
        admin.ping()
        with world.client() as other:
            other.abort()
        puppet.event("ABORT")
        puppet.drop()
        puppet.call("ABORTED", id="vm1")


def test_more_sessions_than_fit_in_a_line(disk_path: Path) -> None:
    with surviving(disk_path / "state") as world, world.client() as link:
        subscribe_many(link, 250)
        with world.client() as observer:
            assert observer.status()["sessions"] == {"new": 250}
            with contextlib.suppress(ClientError):
                observer.sessions()
            with contextlib.suppress(ClientError):
                observer.clients()
            observer.ping()


def test_paths_that_are_none(disk_path: Path) -> None:
    with surviving(disk_path / "state") as world, world.client() as admin:
        for path in ("\0", "/tmp/a\0b", "", "/", "/proc/self/mem", "x" * 4096):
            with pytest.raises(ClientError):
                admin.load(path)
            with pytest.raises(ClientError):
                admin.load(world.image, initrd=path or "\0")
        with pytest.raises(ClientError):
            admin.load(world.image, cmdline="a\0b")


def test_an_adopted_fd_that_only_looks_like_a_session(disk_path: Path) -> None:
    """The fd is the client's: what it answers, or that it never answers, must not hold luod up."""
    with surviving(disk_path / "state") as world, Wire(world.socket) as wire:
        assert wire.reply(cmd="SUBSCRIBE", id="vm1")["ok"] is True
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            line = json.dumps({"cmd": "ADOPT", "id": "vm1", "seq": 77, "fds": 1}).encode() + b"\n"
            wire.send(line, [theirs.fileno()])
            wire.sock.settimeout(5)
            assert wire.line()["ok"] is False


@pytest.mark.skipif(os.getuid() != 0, reason="a client of another uid can only be made by root")
def test_a_fork_bomb_of_connections(disk_path: Path) -> None:
    """A uid that may have no more connections is told so, and everybody else is served."""
    with surviving(disk_path / "state") as world:
        world.kill_luod()
        world.config.write_text("[limits]\nconnections = 50\n")
        world.start_luod()
        with Puppet(world, 65534) as puppet:
            assert puppet.ask("flood", count=200) >= 150
            with world.client(retry_until=time.monotonic() + PATIENCE_S) as other:
                other.ping()
