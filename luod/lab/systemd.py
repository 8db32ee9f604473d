# SPDX-License-Identifier: Apache-2.0
"""A lab machine whose process 1 is systemd, from the host's own file tree: units run there as on a host.

The tree is read-only, so /etc, /var and /usr/local get a layer of memory over them, in which the machine's own units and files lie; what
must outlive the kexec is bound to the state disk. The units of the host that runs the lab play no part, and of systemd's own those are
masked that look for hardware or people. The script's steps are a unit too, `lab-steps.service`.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import guest
from .errors import LabUnavailable

STEPS = "lab-steps.service"
UNITS = Path("/etc/systemd/system")
TARGET = "multi-user.target"
PLACES = ("/lib/systemd/systemd", "/usr/lib/systemd/systemd")
LAYERED = ("/etc", "/var", "/usr/local")
MASKED = (
    "systemd-udevd.service", "systemd-udev-trigger.service", "systemd-udevd-kernel.socket", "systemd-udevd-control.socket",
    "systemd-logind.service", "systemd-user-sessions.service", "systemd-networkd.service", "systemd-resolved.service",
    "systemd-timesyncd.service", "systemd-binfmt.service", "systemd-random-seed.service", "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service",
    "ldconfig.service", "systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-sysusers.service",
    "systemd-firstboot.service", "systemd-machine-id-commit.service", "systemd-remount-fs.service", "systemd-boot-random-seed.service",
    "getty.target", "dbus.service", "dbus.socket", "kmod-static-nodes.service", "systemd-modules-load.service",
    "systemd-tmpfiles-setup-dev.service", "systemd-ask-password-wall.path", "systemd-ask-password-console.path", "remote-fs.target",
)  # fmt: skip
JOURNALD = "[Journal]\nStorage=volatile\nForwardToConsole=yes\nMaxLevelConsole=info\n"
STEPS_UNIT = f"""\
[Unit]
Description=The steps of this boot
DefaultDependencies=no
After=local-fs.target
[Service]
ExecStart={sys.executable} -I -S -B {Path(guest.__file__).resolve()} steps
StandardOutput=journal+console
LimitNOFILE=1024:524288
KillMode=process
"""


def systemd() -> str:
    """Return the path of systemd. Raises `LabUnavailable` where there is none."""
    for place in PLACES:
        if shutil.which(place):
            return place
    raise LabUnavailable("there is no systemd here", hint="apt install systemd: it need not run here")


@dataclass(frozen=True)
class Systemd:
    """What is installed on a machine that systemd runs.

    `units`: name -> text, in /etc/systemd/system; `enabled`: those that the machine starts by itself; `programs`: command -> words that
    are run for it, in /usr/local/bin, with the environment of the steps; `files`: path -> text; `kept`: path -> where on the state disk
    it really is.
    """

    units: Mapping[str, str]
    enabled: Sequence[str] = ()
    programs: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    kept: Mapping[str, Path] = field(default_factory=dict[str, Path])

    def as_json(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Return what process 1 does before it becomes systemd. Raises `LabUnavailable` where there is no systemd."""
        units = {**self.units, STEPS: STEPS_UNIT}
        return {
            "argv": [systemd(), "--system", f"--unit={TARGET}", "--show-status=yes"],
            "layered": LAYERED,
            # Empty, so that nothing is started which the host has for itself.
            "empty": [str(UNITS)],
            "kept": {path: str(place) for path, place in self.kept.items()},
            "files": [
                *(_file(str(UNITS / name), text) for name, text in units.items()),
                *(_file(path, text) for path, text in self.files.items()),
                *(_file(f"/usr/local/bin/{name}", _script(words, environment), 0o755) for name, words in self.programs.items()),
                _file("/etc/systemd/journald.conf.d/lab.conf", JOURNALD),
                _file("/etc/fstab", ""),
            ],
            "links": {
                **{str(UNITS / name): "/dev/null" for name in MASKED},
                **{str(UNITS / f"{TARGET}.wants" / name): str(UNITS / template(name)) for name in (*self.enabled, STEPS)},
            },
        }  # fmt: skip


def template(unit: str) -> str:
    """Return the name of the file of a unit: that of its template when it is an instance."""
    stem, at, rest = unit.partition("@")
    return f"{stem}@.{rest.rpartition('.')[2]}" if at else unit


def _file(path: str, text: str, mode: int = 0o644) -> dict[str, Any]:
    return {"path": path, "text": text, "mode": mode}


def _script(words: Sequence[str], environment: Mapping[str, str]) -> str:
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in environment.items() if name != "PATH"
    )
    return f'#!/bin/sh\n{exports}exec {shlex.join(words)} "$@"\n'
