# SPDX-License-Identifier: Apache-2.0
"""`Crew`: luod, its keeper and its clients as processes of one boot of a lab guest, and the operator who orders updates.

All are forked from one process that has imported everything: starting Python over 9p costs seconds on an emulated processor, a fork
almost nothing, so that luod can be killed and started again many times in a boot.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..adapters.keeper import __main__ as keeper_main
from ..adapters.kernel import open_kernel
from ..client import Client, ClientError
from ..daemon import __main__ as luod_main
from ..demo.client import DemoClient
from ..demo.process import Child
from ..engine.points import Points
from ..states.errors import LuodError
from ..views import every
from .report import emit

RUN = Path("/run/luod")
STATE = Path("/run/state/luod")
LOGS = Path("/run/state/logs")
CGROUPS = Path("/sys/fs/cgroup")
PATIENCE_S = 180.0
CONFIG = """[deadlines]
update_s = 900
freeze_s = 120
abort_s = 60
device_s = 30
"""
CAP_SYS_BOOT = 22
FINAL = ("aborted", "lost", "done")


class Member(DemoClient):
    """The demo's client in a lab guest. It says what its cgroup is charged, and stops itself where a scenario wants it to."""

    hold_at = ""

    def report(self, at: str, **more: object) -> None:
        """Tell the crew where this client is."""
        super().report(at, charged=charged(self.name), **more)
        if at == self.hold_at:
            os.kill(os.getpid(), signal.SIGSTOP)


def charged(group: str) -> int:
    """Return the bytes that a cgroup is charged now."""
    return int((CGROUPS / group / "memory.current").read_text("ascii"))


class Crew:
    """The processes of one boot. `image` is the kernel to update to, `cmdline` what it is to be started with."""

    def __init__(
        self, clients: Iterable[str], size: int, *, image: Path | None = None, cmdline: str = ""
    ) -> None:
        self.names = list(clients)
        self.size = size
        self.image = image
        self.cmdline = cmdline or Path("/proc/cmdline").read_text("utf-8").strip()
        self.kernel = open_kernel("device")
        self.boot = os.environ.get("LUOD_LAB_BOOT", "0")
        self.children: dict[str, Child] = {}
        self.restarts = 0
        self.ended: set[str] = set()
        """Ids of the updates whose end has been seen."""
        self.refuse = False
        """Take the image away behind luod's back as soon as an update has begun."""
        self.points: Callable[[], Points] | None = None
        """What makes luod die or stop: asked for anew whenever luod is started."""
        self.died: Callable[[], None] | None = None
        """Called when luod has killed itself, before it is started again."""
        for directory in (RUN, LOGS):
            directory.mkdir(parents=True, exist_ok=True)
        if STATE.is_dir():
            shutil.copytree(
                STATE, STATE.with_name(f"luod-after-boot-{int(self.boot) - 1}"), dirs_exist_ok=True
            )
        (RUN / "luod.toml").write_text(CONFIG, "ascii")

    # -- processes

    def fork(self, name: str, work: Callable[[int], int], *, group: str = "") -> Child:
        """Start a process of the crew in a cgroup of its own; one of the same name before it is ended first."""
        if name in self.children:
            self.children.pop(name).stop()

        def grouped(pipe: int) -> int:
            os.environ.pop("NOTIFY_SOCKET", None)  # readiness is for the supervisor to say
            place = CGROUPS / (group or name)
            place.mkdir(exist_ok=True)
            (place / "cgroup.procs").write_text("0", "ascii")
            return work(pipe)

        child = self.children[name] = Child(name, grouped, LOGS / f"{self.boot}-{name}.log")
        return child

    def start_keeper(self) -> None:
        """Start luod-keeper and wait until it answers."""
        args = ["--dir", str(RUN), "--kernel", "device"]
        child = self.fork("keeper", lambda pipe: keeper_main.run([*args, "--ready-fd", str(pipe)]))
        if not child.line(PATIENCE_S):
            raise LuodError("the keeper did not start", hint=child.log.read_text("utf-8")[-2000:])

    def start_luod(self, *, may_boot: bool = True, patience_s: float = PATIENCE_S) -> None:
        """Start luod and wait until it answers; when it kills itself on its way up, start it again."""
        args = [
            "--config",
            str(RUN / "luod.toml"),
            "--kernel",
            "device",
            "--state",
            str(STATE),
            "--run",
            str(RUN),
        ]
        while True:
            points = self.points() if self.points else None

            def work(pipe: int, points: Points | None = points) -> int:
                if points is not None:
                    setattr(luod_main, "injector", functools.partial(_always, points))  # noqa: B010
                if not may_boot:
                    drop_capability(CAP_SYS_BOOT)
                return luod_main.run([*args, "--ready-fd", str(pipe)])

            child = self.fork("luod", work)
            if child.line(patience_s):
                return
            if not (child.ended(patience_s) and child.code == -signal.SIGKILL and self.points):
                raise LuodError(
                    f"luod did not start: {child.code}", hint=child.log.read_text("utf-8")[-3000:]
                )
            self._note_death()

    def _note_death(self) -> None:
        self.restarts += 1
        if self.died:
            self.died()

    def revive(self) -> None:
        """Start luod again after it has killed itself. Raises `LuodError` when it ended in any other way."""
        child = self.children["luod"]
        if not (child.ended(PATIENCE_S) and child.code == -signal.SIGKILL and self.points):
            raise LuodError(f"luod ended with {child.code}", hint=child.log.read_text("utf-8")[-3000:])
        self._note_death()
        self.start_luod()

    def start_clients(self, boot: int, *, hold_at: dict[str, str] | None = None) -> None:
        """Start the clients: in the old kernel (1) wait until each has subscribed, in the new one (2) they just go."""
        for name in self.names:
            self.fork(f"client-{name}", self._client(name, boot, (hold_at or {}).get(name, "")), group=name)
        if boot == 1:
            for name in self.names:
                self.until(name, "subscribed")

    def _client(self, name: str, boot: int, hold_at: str) -> Callable[[int], int]:
        def work(pipe: int) -> int:
            # Reports of the last words only: the pipe is read when the client has ended.
            client = Member(name, RUN / "liveupdate.sock", self.kernel, self.size, pipe)
            client.hold_at = hold_at
            return client.first_boot() if boot == 1 else client.second_boot()

        return work

    def clients(self) -> list[Child]:
        """Return the client processes."""
        return [self.children[f"client-{name}"] for name in self.names]

    def until(self, name: str, at: str) -> dict[str, Any]:
        """Read a client's reports up to the one that says `at`; luod is started again when it dies meanwhile."""
        child = self.children[f"client-{name}"]
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            line = child.line(0.2)
            if line:
                told: dict[str, Any] = json.loads(line)
                emit("client", client=name, **told)
                if told["at"] == at:
                    return told
            elif child.ended():
                break
            elif self.points and self.children["luod"].ended():
                self.revive()
        raise LuodError(
            f"client {name} did not come to {at!r}; its exit code is {child.code}",
            hint=child.log.read_text("utf-8")[-3000:],
        )

    def wait_clients(self, at: str) -> int:
        """Wait for the end of all clients, whose last report must be `at`; return the bytes that they found right."""
        waiting = {child.pidfd for child in self.clients()}
        while waiting:
            poll = select.poll()
            luod = self.children["luod"].pidfd
            for fd in (*waiting, luod):
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(PATIENCE_S * 1000)}
            if not ready:
                raise LuodError("the clients do not end", hint=f"see {LOGS}")
            waiting -= ready
            if luod in ready:
                self.revive()
        total = 0
        for name in self.names:
            total += int(self.until(name, at)["bytes"])
            child = self.children[f"client-{name}"]
            child.ended(PATIENCE_S)
            if child.code:
                raise LuodError(
                    f"client {name} ended with {child.code}", hint=child.log.read_text("utf-8")[-3000:]
                )
        return total

    def stop(self) -> None:
        """End every process of the crew: clients first, the keeper last."""
        for name in sorted(self.children, key=lambda name: (name == "keeper", name == "luod")):
            child = self.children.pop(name)
            child.stop(signal.SIGTERM if name == "luod" else signal.SIGKILL)

    # -- the operator

    def link(self) -> Client:
        """Open a connection to luod as its operator."""
        link = Client.connect(RUN / "liveupdate.sock", timeout=PATIENCE_S)
        link.hello(["progress"])
        return link

    def update(self) -> str:
        """Order an update and ask again whenever luod has died; return how it ended. A kexec ends this process instead."""
        begun = False
        while True:
            try:
                with self.link() as link:
                    if not begun and (old := link.status()["update"]) and old["state"] in FINAL:
                        self.ended.add(old["id"])
                    begun = True
                    ended = self._ask(link)
            except LuodError:
                if not self.children["luod"].ended(5.0):
                    raise
                ended = ""
            if ended:
                return ended
            self.revive()

    def _ask(self, link: Client) -> str:
        status = link.status()
        update = status["update"]
        if update is not None and update["state"] in FINAL and update["id"] not in self.ended:
            self.ended.add(update["id"])
            self._signal(signal.SIGCONT)
            return str(update["state"])
        if update is None or update["state"] in FINAL:
            if not status["image_loaded"]:
                link.load(str(self.image), cmdline=self.cmdline)
            # Nobody moves before the image is gone again, so that luod cannot be quicker.
            self._signal(signal.SIGSTOP)
            link.kexec(deadline_s=900)
        elif update["paused"]:
            link.kexec(deadline_s=900)
        if self.refuse:
            self.kernel.unload()
        self._signal(signal.SIGCONT)
        link.watch(after=0)
        while True:
            record = link.next_event(PATIENCE_S, names=("PROGRESS",)).fields["record"]
            over = record["type"].rpartition(".v")[0] in ("update.aborted", "update.lost", "update.done")
            if over and record["stream"] not in self.ended:
                return self._ask(link)

    def _signal(self, number: signal.Signals) -> None:
        for child in self.clients():
            if not child.ended():
                signal.pidfd_send_signal(child.pidfd, number)

    def until_done(self) -> dict[str, Any]:
        """Wait until the update that led into this boot has ended; return it."""
        while True:
            with contextlib.suppress(LuodError), self.link() as link:
                link.watch()
                while True:
                    update: dict[str, Any] = link.status()["update"]
                    if update["state"] in FINAL:
                        self.ended.add(update["id"])
                        return update
                    link.next_event(PATIENCE_S)
            if not self.children["luod"].ended(5.0):
                raise LuodError("the update does not end", hint=f"see {LOGS}")
            self.revive()

    def sessions(self) -> list[dict[str, Any]]:
        """Return all sessions as luod tells them."""
        with self.link() as link:
            return every(link.call, "SESSIONS", "sessions")

    def states(self) -> dict[str, str]:
        """Return the state of each session by its id."""
        return {one["id"]: one["state"] for one in self.sessions()}

    def fds(self) -> dict[str, list[str]]:
        """Return what luod and the keeper have open by kind, with one operator and no client connected."""
        with self.link() as link:
            deadline = time.monotonic() + PATIENCE_S
            while link.status()["clients"] and time.monotonic() < deadline:
                continue
            return {name: self.children[name].fds() for name in ("luod", "keeper")}

    def refused(self, **how: Any) -> ClientError:
        """Order an update that luod must refuse, and return its refusal."""
        with self.link() as link:
            try:
                link.kexec(**how)
            except ClientError as error:
                return error
        raise LuodError("luod did not refuse the update")


def _always(points: Points, _kill_at: str, _trace: Path | None) -> Points:
    return points


def stopped(child: Child) -> None:
    """Wait until a process has stopped itself."""
    told = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if told is None or told.si_code != os.CLD_STOPPED:
        raise LuodError(f"{child.name} ended instead of stopping", hint=child.log.read_text("utf-8")[-3000:])


def halt_at(point: str) -> Callable[[], Points]:
    """Return points at which luod stops like a machine that hangs: at the one of this name it gets SIGSTOP."""

    def reached(key: str, stage: str) -> None:
        if f"{key}:{stage}" == point:
            os.kill(os.getpid(), signal.SIGSTOP)

    return lambda: reached


def drop_capability(number: int) -> None:
    """Take a capability away from this process. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    word = number // 32 * 3
    for place in range(word, word + 3):
        sets[place] &= ~(1 << number % 32)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
