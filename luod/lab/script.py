# SPDX-License-Identifier: Apache-2.0
"""What a lab machine is told to do: boots made of steps.

A run is a list of boots. The first is a cold boot; each further one is reached by a kexec out of the one before, or (`cold=True`) by
starting the machine again with the same state disk. Steps run one after the other in the guest; the first that fails ends the run.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .images import KernelImage
from .systemd import Systemd

REPOSITORY = Path(__file__).resolve().parents[2]
"""The directory that `luod` is imported from: the checkout, or site-packages."""
STATE = Path("/run/state")
"""Where the guest has the disk that survives kexec and cold boots."""
DEFAULT_ARGUMENTS = "kho=on liveupdate=on"


@dataclass(frozen=True)
class Step:
    """One thing to do in the guest. Make it with the functions below."""

    name: str
    kind: Literal["run", "start", "signal", "wait", "cut"]
    timeout_s: float = 60.0
    argv: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    directory: str = ""
    codes: tuple[int, ...] = (0,)
    cgroup: str = ""
    uid: int = 0
    leaves: bool = False
    ready: bool = False
    ready_fd: int = 0
    go_on: bool = False
    target: str = ""
    signal: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return what the guest reads."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def run(name: str, argv: Sequence[str | Path], **options: Any) -> Step:
    """Run a program to its end, which must be with one of `codes`.

    Options: `timeout_s`, `environment`, `directory`, `codes`, `cgroup` (a name: the process is in that cgroup from its first
    instruction), `uid` (run as that user and group), `go_on` (a failure does not end the run), `leaves` (the program takes the machine
    out of this boot; coming back is the failure).
    """
    return Step(name, "run", argv=tuple(map(str, argv)), **options)


def start(name: str, argv: Sequence[str | Path], **options: Any) -> Step:
    """Start a program that stays.

    With `ready=True` the next step waits for its READY=1 on NOTIFY_SOCKET, with `ready_fd=N` for a byte on its descriptor N. Other
    options as for `run`.
    """
    return Step(name, "start", argv=tuple(map(str, argv)), **options)


def python(name: str, module: str, *arguments: str | Path, stays: bool = False, **options: Any) -> Step:
    """Run (or, with `stays`, start) a Python module with the interpreter of this process: `python -m MODULE ARGUMENTS`."""
    return (start if stays else run)(name, (sys.executable, "-m", module, *arguments), **options)


def send(target: str, number: signal.Signals, *, name: str = "") -> Step:
    """Send a signal to a program that was started."""
    return Step(name or f"{number.name.lower()}-{target}", "signal", target=target, signal=int(number))


def wait(target: str, *, timeout_s: float = 60.0, codes: tuple[int, ...] = (0,), name: str = "") -> Step:
    """Wait for the end of a program that was started. A code below zero is the signal that ended it."""
    return Step(name or f"wait-{target}", "wait", target=target, timeout_s=timeout_s, codes=codes)


def cut_power() -> Step:
    """End this boot by cutting the power: QEMU is killed, nothing in the guest hears of it. The next boot must be a cold one."""
    return Step("cut-power", "cut", timeout_s=60.0)


def kexec(
    image: KernelImage, *, append: str | None = None, timeout_s: float = 60.0, name: str = "kexec"
) -> Step:
    """Load an image with kexec_file_load and jump into it; started programs stay alive until then.

    `append` is what the next kernel gets in place of `kho=on liveupdate=on`.
    """
    arguments: list[str | Path] = ["--kernel", image.path]
    if append is not None:
        arguments += ["--append", append]
    return python(name, "luod.lab.jump", *arguments, leaves=True, timeout_s=timeout_s)


@dataclass(frozen=True)
class Boot:
    """The steps of one boot; `cold` boots start the machine again instead of coming from a kexec.

    `kernel` and `arguments` count for cold boots only: a kexec brings its own. `expect` is how the boot is meant to end: "panic" is for
    kernels that must die at once. With `systemd` that is process 1, and the steps are one of its services.
    """

    steps: Sequence[Step]
    cold: bool = False
    kernel: KernelImage | None = None
    arguments: str = DEFAULT_ARGUMENTS
    expect: Literal["done", "panic"] = "done"
    systemd: Systemd | None = None

    def as_json(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Return what the guest reads."""
        init = self.systemd.as_json(environment) if self.systemd is not None else None
        return {"steps": [step.as_json() for step in self.steps], "init": init}
