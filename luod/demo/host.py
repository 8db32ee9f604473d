# SPDX-License-Identifier: Apache-2.0
"""The demo's host: starts an emulated machine's processes, plays its operator, and looks at everything afterwards.

One run is: boot, clients subscribe, load, kexec, boot again, clients claim, verify and finish. Whenever luod dies it is started again at
once, and the operator asks again for what was asked for. All waiting is on pipes, pidfds and WATCH.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..adapters.emulator import __main__ as emulator_main
from ..adapters.emulator.control import Control
from ..adapters.emulator.images import stub_image
from ..adapters.keeper import __main__ as keeper_main
from ..client import Client, ClientError, ConnectionLost
from ..daemon import __main__ as luod_main
from ..journal.errors import JournalVolatile
from ..journal.volume import check
from ..states.errors import LuodError
from ..states.table import SESSION
from ..views import every
from . import client as demo_client
from .process import Child

PATIENCE_S = 90.0
LEAK_S = 1.0
CMDLINE = "console=ttyS0 kho=on liveupdate=on"
LONGEST_ADDRESS = 107
"""Bytes of a socket's path that fit into sockaddr_un (unix(7))."""
Say = Callable[[str], None]


class DemoFailed(LuodError):
    """The demo did not end as it must; the message says where, the hint where to look."""


class Setting(msgspec.Struct, frozen=True):
    """What one run is: how many sessions of how many bytes each, and where luod is to die."""

    sessions: int = 8
    size: int = 16 << 20
    kill_at: str = ""
    boot: int = 0
    """The boot in which luod is to die: 1 is the old kernel, 2 the new one, 0 whichever reaches the point first."""
    then_at: str = ""
    """Where the luod that was started in its place is to die as well, in the same boot."""
    operator: str = "again"
    """What the operator does with an update that waits for a person: `again` or `abort`."""
    refuse: bool = False
    """Whether the kernel refuses the kexec, so that everything must be rolled back."""

    @property
    def point(self) -> str:
        """The crash point as a person names it: `2:vm0.1/hand:after_call`."""
        first = f"{self.boot}:{self.kill_at}" if self.boot and self.kill_at else self.kill_at
        return f"{first} then {self.then_at}" if self.then_at else first


class Outcome(msgspec.Struct):
    """What one run has shown."""

    ending: str
    restarts: int = 0
    bytes_verified: int = 0
    points: list[str] = []
    recovery_points: list[str] = []
    """The crash points that the luod has reached that was started in place of the killed one, in the boot of the kill."""
    sessions: list[dict[str, Any]] = []
    update: dict[str, Any] | None = None
    audit: list[dict[str, Any]] = []
    held: dict[str, Any] = {}
    """What the emulated kernel holds in the end."""
    fds_before: dict[str, list[str]] = {}
    fds_after: dict[str, list[str]] = {}
    late_records: list[str] = []
    kernel: str = "emulated luo-v5"
    boots: list[str] = []


BOX = {
    "luod": Counter({"socket": 1, "/memfd:luod.ring (deleted)": 2}),  # held, and duplicated by its mapping
    "keeper": Counter({"socket": 1, "/memfd:luod.ring (deleted)": 1}),
}
"""What the black box of a boot that prepared an update costs each process."""


def leaked(outcome: Outcome) -> dict[str, Counter[str]]:
    """Return what luod and the keeper have open in the end beyond what they began with and the black box, by process."""
    found: dict[str, Counter[str]] = {}
    for name, after in outcome.fds_after.items():
        box = BOX[name] if len(outcome.boots) == 1 else Counter[str]()
        if extra := Counter(after) - Counter(outcome.fds_before[name]) - box:
            found[name] = extra
    return found


def is_volatile(place: Path) -> bool:
    """Say whether a journal in `place` would be forgotten by a power cut."""
    try:
        check(place)
    except JournalVolatile:
        return True
    return False


def workspace(parent: Path | None = None) -> Path:
    """Make a directory for a run, on a file system that keeps what is synced where there is one."""
    for place in (parent, Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()):
        if place is not None and os.access(place, os.W_OK) and not is_volatile(place):
            return Path(tempfile.mkdtemp(prefix="luod-demo-", dir=place))
    return Path(tempfile.mkdtemp(prefix="luod-demo-"))


class Life(NamedTuple):
    """One luod process: in which boot, where it is to die, and the file in which it notes the crash points that it reaches."""

    boot: int
    kill_at: str
    trace: Path

    def reached(self) -> list[str]:
        """Return the crash points that it has reached, in order."""
        return self.trace.read_text().splitlines() if self.trace.exists() else []

    def killed(self) -> bool:
        """Say whether it has reached the point at which it was to die."""
        return bool(self.kill_at) and self.kill_at in self.reached()


def short(path: Path) -> Path:
    """Return a directory for sockets: `path`, or a link to it where its name is longer than a socket address may be."""
    path.mkdir(parents=True, exist_ok=True)
    if len(str(path / "liveupdate.sock")) <= LONGEST_ADDRESS:
        return path
    link = Path(tempfile.mkdtemp(prefix="luod-run-", dir="/tmp")) / "run"
    link.symlink_to(path.resolve())
    return link


class Host:
    """One emulated machine in a directory."""

    def __init__(self, directory: Path, setting: Setting, say: Say = lambda _: None) -> None:
        self.dir = directory
        self.setting = setting
        self.say = say
        self.run_dir = short(directory / "run")
        self.emulator_dir = directory / "emu"
        self.outcome = Outcome("unfinished")
        self.boot = 0
        self.lives: list[Life] = []
        self._said_abort = False
        self._children: dict[str, Child] = {}
        for one in (self.run_dir, directory / "logs"):
            one.mkdir(parents=True, exist_ok=True)
        (directory / "state").mkdir(mode=0o700, exist_ok=True)
        self.image = stub_image(directory / "next-kernel")

    # -- processes

    def _start(self, name: str, work: Callable[[int], int]) -> Child:
        old = self._children.pop(name, None)
        if old is not None:
            old.stop()
        child = Child(name, work, self.dir / "logs" / f"{name.replace('/', '-')}.log")
        self._children[name] = child
        return child

    def _ready(self, child: Child) -> None:
        if not child.line(PATIENCE_S):
            raise self.failed(f"{child.name} did not start")

    def start_emulator(self) -> None:
        """Start the emulated kernel."""
        args = ["--dir", str(self.emulator_dir)]
        child = self._start("emulator", lambda pipe: emulator_main.main([*args, "--ready-fd", str(pipe)]))
        self._ready(child)
        self.control = Control(self.emulator_dir, timeout=PATIENCE_S)

    def start_boot(self) -> None:
        """Be init: start the keeper and luod, and watch for the next boot."""
        self.boot += 1
        self.boot_id = self.control.boot_id()
        self.outcome.boots.append(self.boot_id)
        args = ["--dir", str(self.run_dir), "--kernel", "emulated", "--emulator", str(self.emulator_dir)]
        keeper = self._start("keeper", lambda pipe: keeper_main.run([*args, "--ready-fd", str(pipe)]))
        self.control.attach(keeper.pid)
        self._ready(keeper)
        self.start_luod()
        boot_id, directory = self.boot_id, self.emulator_dir
        self._start("init", lambda _: _wait_boot(directory, boot_id))
        self.control.spare(self._children["init"].pid)

    def start_luod(self) -> None:
        """Start luod; if it dies at a crash point on its way up, start it again."""
        while True:
            args = [
                "--kernel", "emulated", "--emulator", str(self.emulator_dir), "--run", str(self.run_dir),
                "--state", str(self.dir / "state"),
            ]  # fmt: skip
            if is_volatile(self.dir):
                args += ["--volatile"]
            life = Life(self.boot, self._next_kill(), self.dir / f"points-{len(self.lives) + 1}")
            args += ["--crash-trace", str(life.trace)]
            if life.kill_at:
                args += ["--crash-at", life.kill_at]
            self.lives.append(life)
            child = self._start("luod", functools.partial(_luod, tuple(args)))
            self.control.attach(child.pid)
            if child.line(PATIENCE_S):
                return
            if not (child.ended(PATIENCE_S) and child.code == -signal.SIGKILL and life.killed()):
                raise self.failed("luod did not start")
            self.outcome.restarts += 1

    def _next_kill(self) -> str:
        """Return where the next luod is to die: the first at `kill_at`, the one in its place at `then_at`."""
        setting, killed = self.setting, [life for life in self.lives if life.killed()]
        if not killed:
            return setting.kill_at if setting.boot in (0, self.boot) else ""
        return setting.then_at if len(killed) == 1 and killed[0].boot == self.boot else ""

    def _revived(self) -> bool:
        """Start luod again if it died where it was to die; say whether it did."""
        if not (self._children["luod"].ended(PATIENCE_S) and self.lives[-1].killed()):
            return False
        self.outcome.restarts += 1
        self.start_luod()
        return True

    def start_clients(self) -> None:
        """Start the client processes of this boot."""
        for number in range(self.setting.sessions):
            name = f"vm{number}"
            child = self._start(f"client/{name}", self._client(name, self.boot))
            self.control.attach(child.pid)

    def _client(self, name: str, boot: int) -> Callable[[int], int]:
        size = self.setting.size

        def work(pipe: int) -> int:
            return demo_client.run(name, self.run_dir, "emulated", self.emulator_dir, size, boot, pipe)

        return work

    def clients(self) -> list[Child]:
        """Return the client processes."""
        return [child for name, child in self._children.items() if name.startswith("client/")]

    def link(self) -> Client:
        """Open a connection to luod as its operator."""
        link = Client.connect(self.run_dir / "liveupdate.sock", timeout=PATIENCE_S)
        link.hello(["progress"])
        return link

    def stop(self) -> None:
        """End every process of the run."""
        for name in (
            "init",
            *(name for name in self._children if name.startswith("client/")),
            "luod",
            "keeper",
        ):
            child = self._children.pop(name, None)
            if child is not None:
                child.stop()
        if hasattr(self, "control"):
            self.control.close()
        if self.run_dir.is_symlink():
            shutil.rmtree(self.run_dir.parent, ignore_errors=True)
        child = self._children.pop("emulator", None)
        if child is not None:
            child.stop(signal.SIGTERM)

    def failed(self, what: str) -> DemoFailed:
        """Return an error with the last lines of every log."""
        tails: list[str] = []
        for log in sorted((self.dir / "logs").iterdir()):
            lines = log.read_text(errors="replace").splitlines()[-5:]
            tails += [f"  {log.name}: {line}" for line in lines]
        return DemoFailed("\n".join([what, *tails]), hint=f"everything of this run is in {self.dir}")

    # -- the run

    def run(self) -> Outcome:
        """Go through the whole update; return what it has shown. Raises `DemoFailed`."""
        self.start_emulator()
        self.say("the first kernel boots")
        self.start_boot()
        with self.link() as link:
            self._settle_fds(link, self.outcome.fds_before)
        if self.setting.refuse:
            self.control.inject("freeze", errno=errno.EBUSY)
        self.start_clients()
        for child in self.clients():
            if b"subscribed" not in child.line(PATIENCE_S):
                raise self.failed(f"{child.name} did not subscribe")
        self.say(f"{self.setting.sessions} clients filled their memory and subscribed")
        if self._first_boot() == "aborted":
            self._after_abort()
            return self._look()
        self.say("the second kernel boots")
        self._bury("luod", "keeper", *(child.name for child in self.clients()))
        self.start_boot()
        with self.link() as link:
            self._settle_fds(link, self.outcome.fds_before)
        self.start_clients()
        self._second_boot()
        return self._look()

    def _bury(self, *names: str) -> None:
        for name in names:
            child = self._children[name]
            if not child.ended(PATIENCE_S):
                raise self.failed(f"{name} outlived its kernel")
            child.stop()
            if name.startswith("client/"):
                del self._children[name]

    def _first_boot(self) -> str:
        """Ask for the update until the kernel has changed or the update is undone."""
        aborting = False
        while True:
            try:
                with self.link() as link:
                    ended = self._ask(link, aborting)
            except (ConnectionLost, LuodError) as error:
                if (
                    not isinstance(error, ConnectionLost)
                    and self._children["luod"].code is None
                    and not self._dying()
                ):
                    raise
                ended = ""
            if ended:
                return ended
            ended = self._wait_change()
            if ended:
                return ended
            aborting = self.setting.operator == "abort"

    def _dying(self) -> bool:
        return self._children["luod"].ended(5.0)

    def _ask(self, link: Client, aborting: bool) -> str:
        """Do what the operator has to do now, then follow the update; return its ending, or nothing when luod died."""
        status = link.call("STATUS").fields
        update = status["update"]
        if update is None:
            if not status["image_loaded"]:
                link.call("LOAD", kernel=str(self.image), cmdline=CMDLINE)
            link.call("KEXEC")
        elif update["state"] in ("aborted", "lost", "done"):
            return str(update["state"])
        elif update["paused"] and not self._said_abort and not self._decide(link, aborting):
            return self._ask(link, aborting)
        link.call("WATCH", after=0)
        while True:
            event = link.next_event(PATIENCE_S)
            if event.name == "PROGRESS" and event.fields["record"]["type"].startswith("update.aborted."):
                return "aborted"

    def _decide(self, link: Client, aborting: bool) -> bool:
        """Be the person for whom an update waits; return False if it had gone on meanwhile."""
        try:
            if aborting:
                link.call("ABORT", reason="the operator has changed his mind")
                self._said_abort = True
            else:
                link.call("KEXEC")
        except ClientError as error:
            if error.code in ("NO_UPDATE", "TOO_LATE", "UPDATE_RUNNING"):
                return False
            raise
        return True

    def _wait_change(self) -> str:
        """Wait until luod has died or the boot has changed; restart luod if it killed itself."""
        luod, init = self._children["luod"], self._children["init"]
        poll = select.poll()
        for child in (luod, init):
            poll.register(child.pidfd, select.POLLIN)
        if not poll.poll(PATIENCE_S * 1000):
            raise self.failed("nothing happened")
        if luod.ended() and self._revived():
            return ""
        # The emulator answers nobody between the end of a world and the next boot, so this cannot come too early.
        if init.ended() or self.control.boot_id() != self.boot_id:
            return "kexec"
        raise self.failed(f"luod ended with {luod.code}")

    def _second_boot(self) -> None:
        """Wait until all clients have finished and the update is done."""
        waiting = {child.pidfd: child for child in self.clients()}
        while waiting:
            luod = self._children["luod"]
            poll = select.poll()
            for pidfd in (*waiting, luod.pidfd):
                poll.register(pidfd, select.POLLIN)
            ready = poll.poll(PATIENCE_S * 1000)
            if not ready:
                raise self.failed("clients did not finish")
            for pidfd, _ in ready:
                if pidfd == luod.pidfd:
                    self._revive()
                else:
                    self._take(waiting.pop(pidfd), "finished")
        while True:
            try:
                with self.link() as link:
                    if link.call("STATUS").fields["update"]["state"] != "recovering":
                        break
                    link.call("WATCH", after=0)
                    while not link.next_event(PATIENCE_S).fields["record"]["type"].startswith("update.done."):
                        pass
            except LuodError:
                if not self._dying():
                    raise
                self._revive()

    def _revive(self) -> None:
        if not self._revived():
            raise self.failed(f"luod ended with {self._children['luod'].code}")

    def _take(self, child: Child, at: str) -> None:
        child.ended(None)
        reports = [json.loads(line) for line in child.lines_now()]
        final = [report for report in reports if report["at"] == at]
        if child.code != 0 or not final:
            raise self.failed(f"{child.name} ended with {child.code}")
        self.outcome.bytes_verified += final[-1]["bytes"]

    def _after_abort(self) -> None:
        """After an abort every client still has its memory, whole."""
        for child in self.clients():
            if not child.ended(PATIENCE_S):
                raise self.failed(f"{child.name} did not hear of the abort")
            self._take(child, "aborted")

    # -- looking

    def _settle_fds(self, link: Client, book: dict[str, list[str]]) -> None:
        """Note what luod and the keeper have open, with one operator connected and no client."""
        deadline = time.monotonic() + PATIENCE_S
        while link.call("STATUS").fields["clients"] and time.monotonic() < deadline:
            continue
        for name in ("luod", "keeper"):
            book[name] = self._children[name].fds()

    def _settle_fds_after(self, link: Client) -> None:
        """Note what is open in the end. A connection that is just being closed is no leak: a leak is still there a second later."""
        patience = time.monotonic() + LEAK_S
        while True:
            self._settle_fds(link, self.outcome.fds_after)
            if not leaked(self.outcome) or time.monotonic() > patience:
                return

    def _note_points(self) -> None:
        reached = [f"{life.boot}:{point}" for life in self.lives for point in life.reached()]
        self.outcome.points = list(dict.fromkeys(reached))
        for before, life in pairwise(self.lives):
            if before.killed() and before.boot == life.boot:
                self.outcome.recovery_points = list(dict.fromkeys(life.reached()))
                return

    def _look(self) -> Outcome:
        """Gather what the checks need, and see that one more recovery changes nothing."""
        with self.link() as link:
            self._settle_fds_after(link)
            self.outcome.sessions = _settled_sessions(link)
            status = link.call("STATUS").fields
            self.outcome.update = status["update"]
            rows = status["journal"]["rows"]
        self._note_points()
        self._children["luod"].stop()
        self.start_luod()
        with self.link() as link:
            late = link.call("JOURNAL", after=rows).fields["records"]
        self.outcome.late_records = [record["type"] for record in late]
        self.outcome.audit = self.control.audit()
        self.outcome.held = self.control.state()
        self.outcome.ending = str(self.outcome.update["state"]) if self.outcome.update else "none"
        self._children["luod"].stop(signal.SIGTERM)
        return self.outcome


def _settled_sessions(link: Client) -> list[dict[str, Any]]:
    """Return all sessions once each has ended; what a client leaves behind is cleared away a moment after it."""
    link.call("WATCH")
    while True:
        sessions = every(link.call, "SESSIONS", "sessions")
        if all(one["state"] in SESSION.final for one in sessions):
            return sessions
        link.next_event(PATIENCE_S).close()


def _luod(args: tuple[str, ...], pipe: int) -> int:
    return luod_main.run([*args, "--ready-fd", str(pipe)])


def _wait_boot(directory: Path, boot_id: str) -> int:
    """Be a process that ends when the emulated kernel has changed."""
    with Control(directory) as control:
        control.wait_boot(boot_id)
    return 0


def journal_of(directory: Path) -> Path:
    """Return the journal of a run."""
    return directory / "state" / "journal.db"


def discard(directory: Path) -> None:
    """Remove what a run has left."""
    shutil.rmtree(directory, ignore_errors=True)
