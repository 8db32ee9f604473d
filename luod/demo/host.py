# SPDX-License-Identifier: Apache-2.0
"""The demo's host: starts and ends the processes of one emulated machine, as its init would, and luod again when it was killed."""

from __future__ import annotations

import functools
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..adapters.emulator import __main__ as emulator_main
from ..adapters.emulator.control import Control
from ..adapters.emulator.images import stub_image
from ..adapters.keeper import __main__ as keeper_main
from ..client import Client
from ..daemon import __main__ as luod_main
from . import client as demo_client
from .outcome import DemoFailed, Outcome, Setting, is_volatile
from .process import Child, undisturbed

PATIENCE_S = 90.0
LONGEST_ADDRESS = 107
"""Bytes of a socket's path that fit into sockaddr_un (unix(7))."""
Say = Callable[[str], None]


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
        self.config: Path | None = None
        """luod's settings, where they are not the defaults."""
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
        with undisturbed():
            child = self._children[name] = Child(
                name, work, self.dir / "logs" / f"{name.replace('/', '-')}.log"
            )
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
            if self.config is not None:
                args += ["--config", str(self.config)]
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

    @undisturbed()
    def stop(self) -> None:
        """End every process of the run. A Ctrl-C waits for that."""
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


def _luod(args: tuple[str, ...], pipe: int) -> int:
    return luod_main.run([*args, "--ready-fd", str(pipe)])


def _wait_boot(directory: Path, boot_id: str) -> int:
    """Be a process that ends when the emulated kernel has changed."""
    with Control(directory) as control:
        control.wait_boot(boot_id)
    return 0
