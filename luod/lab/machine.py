# SPDX-License-Identifier: Apache-2.0
"""`Machine`: real Linux in QEMU, driven through a script of boots.

The guest's root is the host's file tree, read-only over 9p, so the guest runs the interpreter and the checkout that run here. Its
state is an ext4 disk. Its results come back as JSON lines over a virtio-serial port, which QEMU connects to a socket pair whose other
end is read here; the kernel's console goes to a file. QEMU is watched and stopped by pidfd, and dies with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import guest
from .accel import acceleration, qemu
from .disk import make_state_disk
from .errors import LabError
from .images import KernelImage
from .outcome import LabRun
from .script import REPOSITORY, Boot

GUEST = Path(guest.__file__).resolve()
COVERED = ("/tmp", "/run")
"""Directories that the guest mounts fresh memory over; what the run needs below them is shown again."""
UNHURRIED = "no_timer_check tsc=nowatchdog"
"""What keeps an emulated machine on a busy host from dying as it boots, where its processors stand still for longer than Linux expects.

The test of the timer takes late interrupts for missing ones and panics: "IO-APIC + timer doesn't work!". The clocksource watchdog of
Linux 7 waits with interrupts off for another processor that waits for it in stop_machine(), by a clock that its own interrupts drive: for
ever (watchdog_wait_seq() in kernel/time/clocksource.c).
"""
ROOT_ARGUMENTS = (
    "root=/dev/root rootfstype=9p rootflags=trans=virtio,version=9p2000.L,cache=loose,msize=512000 ro"
)

OnEvent = Callable[[dict[str, Any]], None]


class Machine:
    """A machine that starts with `kernel` and leaves everything about a run in `directory`.

    `memory_mib`, `cpus` and `state_mib` are its size. `show` names more host files and directories that the guest must see although
    they lie below /tmp or /run; the interpreter, the checkout and what steps name as arguments are seen anyway. `board` is QEMU's machine
    type (empty: its default), `devices` are more QEMU options: `luod/lab/passthrough.py`
    has both. `environment` is set for every step.
    """

    def __init__(
        self,
        kernel: KernelImage,
        directory: Path,
        *,
        memory_mib: int = 1536,
        cpus: int = 2,
        state_mib: int = 192,
        show: Sequence[Path] = (),
        devices: Sequence[str] = (),
        board: str = "",
        environment: dict[str, str] | None = None,
        accel: Sequence[str] | None = None,
    ) -> None:
        self.kernel = kernel
        self.directory = directory
        self.memory_mib = memory_mib
        self.cpus = cpus
        self.state_mib = state_mib
        self.devices = tuple(devices)
        self.board = board
        self.accel = tuple(accel) if accel is not None else acceleration(kernel)
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        self._show = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), *show]

    @property
    def console(self) -> Path:
        """The kernel's console of all boots."""
        return self.directory / "console.log"

    @property
    def disk(self) -> Path:
        """The image of the state disk."""
        return self.directory / "state.img"

    def command_line(self, arguments: str) -> str:
        """Return the kernel command line of a cold boot; `arguments` is the part that a scenario chooses."""
        return (
            f"console=ttyS0 {ROOT_ARGUMENTS} panic=-1 {UNHURRIED} quiet loglevel=5 {arguments} "
            f"init={sys.executable} -- -I -S -B {GUEST}"
        )

    def qemu_command(self, boot: Boot, results_fd: int) -> list[str]:
        """Return the command that starts QEMU for a cold boot; `results_fd` is the inherited socket for the results."""
        image = boot.kernel or self.kernel
        return [
            *_dies_with_parent(),
            qemu(), *(("-machine", self.board) if self.board else ()), *self.accel,
            "-cpu", "max", "-m", f"{self.memory_mib}M", "-smp", str(self.cpus),
            "-display", "none", "-nodefaults", "-no-reboot",
            "-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console",
            "-chardev", f"socket,id=results,fd={results_fd}",
            "-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=results,name={guest.PORT_NAME}",
            "-drive", f"file={self.disk},if=none,id=state,format=raw,cache=writeback", "-device", "virtio-blk-pci,drive=state",
            "-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
            "-device", "virtio-9p-pci,fsdev=root,mount_tag=/dev/root",
            "-device", "virtio-rng-pci",
            *self.devices,
            "-kernel", str(image.path), "-append", self.command_line(boot.arguments),
        ]  # fmt: skip

    def prepare(self, boots: Sequence[Boot], files: dict[str, bytes] | None = None) -> None:
        """Make the run's directory and the state disk, with the script and `files` (path on the disk -> content) on it.

        An earlier run in the directory is removed; anything else there is an error.
        """
        if self.directory.exists() and any(self.directory.iterdir()):
            if not (self.directory / "script.json").exists():
                raise LabError(
                    f"{self.directory} is not empty and holds no earlier lab run",
                    hint="name a directory of its own for the run",
                )
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        script = {
            "boots": [boot.as_json(self.environment) for boot in boots],
            "environment": self.environment,
            "show": _below_covered([*self._show, *_named_paths(boots)]),
        }
        content = {"lab/script.json": json.dumps(script, indent=1).encode(), **(files or {})}
        (self.directory / "script.json").write_bytes(content["lab/script.json"])
        with tempfile.TemporaryDirectory(prefix="luod-state-") as place:
            for name, data in content.items():
                path = Path(place) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            make_state_disk(self.disk, Path(place), self.state_mib)

    def run(
        self,
        boots: Sequence[Boot],
        *,
        timeout_s: float,
        files: dict[str, bytes] | None = None,
        on_event: OnEvent | None = None,
    ) -> LabRun:
        """Run the script and return what happened. `timeout_s` is for all boots together; QEMU is killed when it is over.

        Raises `LabUnavailable` when something is missing here. What goes wrong inside does not raise: see `LabRun.check`.
        """
        if not boots:
            raise LabError("a lab run needs at least one boot")
        qemu()
        _compile_sources()
        self.prepare(boots, files)
        outcome = LabRun(self.directory, list(boots))
        deadline = time.monotonic() + timeout_s
        with (self.directory / "results.jsonl").open("w", encoding="utf-8") as results:

            def take(event: dict[str, Any]) -> None:
                results.write(json.dumps(event) + "\n")
                results.flush()
                outcome.take(event)
                if on_event is not None:
                    on_event(event)

            for number, boot in enumerate(boots):
                if number and not boot.cold:
                    continue
                outcome.ended = self._power_on(boot, deadline, take)
                if outcome.ended != "off" or outcome.boots_begun <= number or outcome.failed:
                    break
        outcome.finish()
        return outcome

    def _power_on(self, boot: Boot, deadline: float, take: OnEvent) -> str:
        """Run QEMU once. Returns "off" (ended by itself, or its power was cut on request) or "timeout"."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            stderr = (self.directory / "qemu.log").open("ab")
            with stderr:
                process = subprocess.Popen(
                    self.qemu_command(boot, theirs.fileno()),
                    stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, pass_fds=(theirs.fileno(),),
                )  # fmt: skip
            theirs.close()
            pidfd = os.pidfd_open(process.pid)
            try:
                return self._watch(ours, pidfd, deadline, take)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
                process.wait()

    def _watch(self, results: socket.socket, pidfd: int, deadline: float, take: OnEvent) -> str:
        """Read result lines until QEMU is gone and its last line has been read."""
        pending = b""
        poll = select.poll()
        poll.register(results, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if results.fileno() in ready:
                data = results.recv(65536)
                if not data:
                    # QEMU closes the socket as it ends: the pidfd says the rest.
                    poll.unregister(results)
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    take(event)
                    if event["event"] == "cut":
                        return "off"
            elif pidfd in ready:
                return "off"
        return "timeout"


def _below_covered(paths: Sequence[Path]) -> list[str]:
    """Return the paths that the guest's fresh /tmp and /run would hide, outermost first and without those inside others."""
    shown: list[Path] = []
    for path in sorted({path.resolve() for path in paths} | {path.absolute() for path in paths}):
        covered = any(path.is_relative_to(top) for top in COVERED)
        if covered and not any(path.is_relative_to(other) for other in shown):
            shown.append(path)
    return [str(path) for path in shown]


def _named_paths(boots: Sequence[Boot]) -> list[Path]:
    """Return the host paths that steps name as arguments, such as programs and kernel images."""
    words = [word for boot in boots for step in boot.steps for word in step.argv if word.startswith("/")]
    return [path for path in map(Path, words) if path.exists()]


def _dies_with_parent() -> list[str]:
    """Have the kernel kill QEMU when this process dies without having stopped it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _compile_sources() -> None:
    """Bring the checkout's bytecode up to date: the guest reads it, cannot write it, and compiles some thirty times slower."""
    folders = [
        str(REPOSITORY / name) for name in ("luod", "states", "journal", "engine", "adapters", "tests")
    ]
    existing = [folder for folder in folders if os.path.isdir(folder)]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *existing], capture_output=True, check=False)
