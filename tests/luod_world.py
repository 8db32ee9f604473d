# SPDX-License-Identifier: Apache-2.0
"""A host in miniature for tests: an emulated kernel, luod-keeper and luod as real processes, and clients of any uid.

Every process is waited for by its pidfd. `end` fails when luod or the keeper has written a traceback.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forked import PATIENCE_S, Child, ForkedProgram

from luod.adapters import memfd
from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator
from luod.adapters.kernel import open_kernel
from luod.client import Client, ClientError, Timeout

CMDLINE = "kho=on liveupdate=on"


class Program:
    """A process of ours that says on a pipe when it is ready."""

    def __init__(self, log: Path, module: str, *args: object) -> None:
        ready, ready_end = os.pipe()
        argv = [sys.executable, "-m", module, *map(str, args), "--ready-fd", str(ready_end)]
        try:
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    argv, pass_fds=(ready_end,), stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
        finally:
            os.close(ready_end)
        self.pid = self.process.pid
        with open(ready, "rb", buffering=0) as pipe:
            if not pipe.read(1):
                self.process.wait(PATIENCE_S)
                raise AssertionError(
                    f"{module} ended with {self.process.returncode}:\n{log.read_text(errors='replace')}"
                )

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def fds(self) -> list[str]:
        """What it has open, by name, `socket:` and the like without their numbers."""
        found = []
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{self.pid}/fd/{name}").partition(":[")[0])
        return sorted(found)


class World:
    """One emulated machine, from power on to power off. `machine` are options of `Emulator.start`."""

    def __init__(self, state: Path, settings: str = "", **machine: Any) -> None:
        # Clients of other uids must be able to reach the socket, whose path may have 107 bytes at most.
        self.dir = Path(tempfile.mkdtemp(prefix="luod-world-", dir="/tmp"))
        self.dir.chmod(0o755)
        self.run = self.dir / "run"
        self.emulator_dir = self.dir / "emu"
        self.state = state
        self.socket = self.run / "liveupdate.sock"
        self.config = self.dir / "luod.toml"
        self.config.write_text(settings)
        self.log = self.dir / "log"
        self.log.touch()
        self.image = stub_image(self.dir / "next-kernel")
        self.luod: Program | None = None
        self.keeper: Program | ForkedProgram | None = None
        self.emulator = Emulator.start(self.emulator_dir, **machine)
        self.control = self.emulator.control(timeout=PATIENCE_S)
        self.control.spare(os.getpid())
        self.kernel = open_kernel("emulated", directory=self.emulator_dir)

    # -- the programs of a boot

    def boot(self) -> None:
        self.boot_id = self.control.boot_id()
        self.start_keeper()
        self.start_luod()

    def start_keeper(self, *more: object, forked: bool = False) -> Program | ForkedProgram:
        backend = ("--kernel", "emulated", "--emulator", self.emulator_dir)
        kind = ForkedProgram if forked else Program
        self.keeper = keeper = kind(self.log, "luod.adapters.keeper", "--dir", self.run, *backend, *more)
        self.control.attach(keeper.pid)
        return keeper

    def start_luod(self, *more: object) -> Program:
        args = ("--config", self.config, "--kernel", "emulated", "--emulator", self.emulator_dir)
        places = ("--state", self.state, "--run", self.run)
        self.luod = Program(self.log, "luod.daemon", *args, *places, *more)
        self.control.attach(self.luod.pid)
        return self.luod

    def kill_luod(self) -> None:
        assert self.luod is not None
        assert self.luod.end() == -signal.SIGKILL

    def restart_luod(self) -> None:
        self.kill_luod()
        self.start_luod()

    def client(self, **options: Any) -> Client:
        return Client.connect(self.socket, timeout=PATIENCE_S, **options)

    # -- updates

    def load(self, admin: Client) -> None:
        admin.load(self.image, cmdline=CMDLINE)

    def kexec(self, admin: Client) -> str:
        """Load and begin an update; return its id."""
        self.load(admin)
        return str(admin.kexec()["update"])

    def next_boot(self, *members: Puppet) -> None:
        """Wait for the kexec, bury everybody, and start the programs of the new boot."""
        self.control.wait_boot(self.boot_id)
        for program in (self.luod, self.keeper):
            assert program is not None
            assert program.wait() == -signal.SIGKILL
        for puppet in members:
            puppet.buried()
        self.boot()

    # -- looking

    def wait_record(self, kind: str, stream: str = "", after: int = 0, key: str = "") -> dict[str, Any]:
        """Wait for a record whose type begins with `kind` (of the effect `key`), and return it.

        Sending an fd is an effect: its answer is there before its outcome is.
        """
        with self.client() as watcher:
            watcher.watch(after=after)
            while True:
                record: dict[str, Any] = watcher.next_event(PATIENCE_S, names=["PROGRESS"])["record"]
                if (
                    record["type"].startswith(kind)
                    and (not stream or record["stream"] == stream)
                    and (not key or record["body"]["key"] == key)
                ):
                    return record

    def settled_fds(self, expected: list[str]) -> list[str]:
        """Return what luod has open as soon as that is `expected`, else what it has after a while."""
        assert self.luod is not None
        until = time.monotonic() + 10
        with self.client() as link:
            while True:
                link.ping()
                found = self.luod.fds()
                if found == expected or time.monotonic() > until:
                    return found

    def resting_fds(self) -> list[str]:
        """Return what luod has open with one observer connected; call it when no connection of the test is ending."""
        with self.client() as link:
            link.status()
            assert self.luod is not None
            return self.luod.fds()

    def power_off(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.dir)
            stack.callback(self.emulator.stop)
            stack.callback(self.control.close)
            for program in (self.keeper, self.luod):
                if program is not None:
                    stack.callback(program.end)

    def end(self) -> None:
        """Stop everything; fail when a program has written a traceback or does not end as it should."""
        try:
            if self.luod is not None and self.luod.process.poll() is None:
                code = self.luod.end(signal.SIGTERM)
                assert code == 0, f"luod ended with {code}:\n{self.log.read_text(errors='replace')[-4000:]}"
            log = self.log.read_text(errors="replace")
            assert "Traceback" not in log, log[-6000:]
        finally:
            self.power_off()


@contextlib.contextmanager
def new_world(state: Path, settings: str = "", *, boot: bool = True, **machine: Any) -> Iterator[World]:
    world = World(state, settings, **machine)
    try:
        if boot:
            world.boot()
        yield world
    except BaseException:
        sys.stderr.write(world.log.read_text(errors="replace")[-6000:])
        world.power_off()
        raise
    world.end()


class Puppet:
    """A client in a process of its own, with the uid that a test gives it; it does what the test says, call by call."""

    def __init__(self, world: World, uid: int = 0) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def serve() -> None:
            ours.close()
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            _Strings(world, theirs).serve()

        self._child = Child(serve)
        theirs.close()
        self._sock = ours
        self._sock.settimeout(PATIENCE_S)
        self.pid = self._child.pid

    def ask(self, do: str, **more: object) -> Any:
        self._sock.send(json.dumps({"do": do, **more}).encode())
        answer = json.loads(self._sock.recv(1 << 20))
        if "code" in answer:
            raise ClientError(answer["code"], answer["message"], hint=answer["hint"], errno=answer["errno"])
        assert "failed" not in answer, answer["failed"]
        return answer["result"]

    def call(self, cmd: str, **fields: object) -> dict[str, Any]:
        """Send a command; an fd that comes back stays in the puppet's hand."""
        return self.ask("call", cmd=cmd, fields=fields)  # type: ignore[no-any-return]

    def event(self, *names: str) -> dict[str, Any]:
        return self.ask("event", names=names)  # type: ignore[no-any-return]

    def preserve(self, token: int, text: str) -> None:
        """Preserve a memfd with a text through the session in hand."""
        self.ask("preserve", token=token, text=text)

    def retrieve(self, token: int) -> str:
        return str(self.ask("retrieve", token=token))

    def finish(self) -> None:
        """Run FINISH on the session in hand and close it."""
        self.ask("finish")

    def drop(self) -> None:
        """Close the session in hand."""
        self.ask("drop")

    def reconnect(self) -> None:
        self.ask("connect")

    def adopt(self, client: str) -> dict[str, Any]:
        return self.ask("adopt", client=client)  # type: ignore[no-any-return]

    def buried(self) -> None:
        """Wait for its death by the reboot."""
        assert self._child.wait() == -signal.SIGKILL
        self._sock.close()

    def kill(self) -> None:
        self._child.end()
        self.buried()

    def __enter__(self) -> Puppet:
        return self

    def __exit__(self, *_: object) -> None:
        with self._sock:
            if self._sock.fileno() >= 0:
                self._sock.shutdown(socket.SHUT_WR)
                self._child.wait()


class _Strings:
    """The puppet's own side."""

    def __init__(self, world: World, sock: socket.socket) -> None:
        self.world = world
        self.sock = sock
        self.link: Client | None = None
        self.session = -1

    def serve(self) -> None:
        while request := self.sock.recv(1 << 20):
            message = json.loads(request)
            answer: dict[str, Any]
            try:
                answer = {"result": getattr(self, message.pop("do"))(**message)}
            except ClientError as error:
                answer = {
                    "code": error.code,
                    "message": error.message,
                    "hint": error.hint,
                    "errno": error.errno,
                }
            except Exception as error:
                answer = {"failed": repr(error)}
            self.sock.send(json.dumps(answer).encode())

    def connect(self) -> None:
        if self.link is not None:
            self.link.close()
        self.link = Client.connect(
            self.world.socket, timeout=PATIENCE_S, retry_until=time.monotonic() + PATIENCE_S
        )

    def _link(self) -> Client:
        if self.link is None:
            self.connect()
        assert self.link is not None
        return self.link

    def _take(self, fds: list[int]) -> None:
        while fds:
            self.drop()
            self.session = fds.pop()

    def call(self, cmd: str, fields: dict[str, Any]) -> dict[str, Any]:
        reply = self._link().call(cmd, **fields)
        self._take(reply.fds)
        return reply.fields

    def post(self, cmd: str, **fields: Any) -> None:
        """Send a command whose reply may never come, because the kernel goes first."""
        self._link()
        assert self.link is not None
        with contextlib.suppress(Timeout):
            self.link.call(cmd, timeout=0, **fields)

    def flood(self, count: int) -> int:
        """Connect many times at once; return how many of them luod ended by itself."""
        sockets = []
        try:
            for _ in range(count):
                sockets.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                sockets[-1].settimeout(PATIENCE_S)
                sockets[-1].connect(str(self.world.socket))
            ended = 0
            for sock in sockets:
                try:
                    sock.sendall(b'{"cmd":"PING","seq":1}\n')
                    ended += b'"ERROR"' in sock.recv(4096)
                except (BrokenPipeError, ConnectionResetError):
                    ended += 1
            return ended
        finally:
            for sock in sockets:
                sock.close()

    def churn(self, client: str, count: int) -> list[str]:
        """Subscribe and leave, many times; return the states that the session was in right after it was subscribed."""
        states = set()
        for _ in range(count):
            with Wire(self.world.socket) as wire:
                assert wire.reply(cmd="SUBSCRIBE", id=client)["ok"]
                states.add(wire.reply(cmd="SESSION", id=client)["session"]["state"])
        return sorted(states)

    def adopt(self, client: str) -> dict[str, Any]:
        return self._link().adopt(client, self.session).fields

    def event(self, names: list[str]) -> dict[str, Any]:
        event = self._link().next_event(PATIENCE_S, names=names)
        self._take(event.fds)
        return {"event": event.name, **event.fields}

    def preserve(self, token: int, text: str) -> None:
        fd = memfd.create("puppet", 4096)
        try:
            os.pwrite(fd, text.encode(), 0)
            self.world.kernel.preserve_fd(self.session, token, fd)
        finally:
            os.close(fd)

    def retrieve(self, token: int) -> str:
        fd = self.world.kernel.retrieve_fd(self.session, token)
        try:
            return os.pread(fd, 4096, 0).rstrip(b"\0").decode()
        finally:
            os.close(fd)

    def finish(self) -> None:
        self.world.kernel.finish(self.session)
        self.drop()

    def drop(self) -> None:
        if self.session >= 0:
            os.close(self.session)
            self.session = -1


class Wire:
    """A connection that says exactly what a test wants, byte for byte."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(str(path))
        self._buffer = b""
        self._fds = array.array("i")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()
        while self._fds:
            os.close(self._fds.pop())

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.sock.sendmsg([data], rights)
        self.sock.sendall(data[sent:])

    def say(self, **message: object) -> None:
        self.send(json.dumps(message).encode() + b"\n")

    def line(self) -> dict[str, Any]:
        """Return the next message; EOFError at the end."""
        while b"\n" not in self._buffer:
            data, fds, _, _ = socket.recv_fds(self.sock, 65536, 16)
            self._fds.extend(fds)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)  # type: ignore[no-any-return]

    def reply(self, **message: object) -> dict[str, Any]:
        self.say(seq=77, **message)
        while (answer := self.line()).get("reply") != 77:
            pass
        return answer

    def error(self) -> str:
        """Return the code of the next message, which must be an ERROR event."""
        answer = self.line()
        assert answer["event"] == "ERROR", answer
        return str(answer["error"]["code"])
