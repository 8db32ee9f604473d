# SPDX-License-Identifier: Apache-2.0
"""More QEMU versions than the one that is installed, so that an update can cross from an old one to a new one.

A version comes from a Debian suite with every library it needs, down to libc, and is unpacked into the cache; nothing of it is installed
and no root is needed. It runs through its own dynamic loader, behind a script that looks like any other QEMU binary.

    $XDG_CACHE_HOME/luod/qemu/VERSION/root/...         the packages, unpacked
    $XDG_CACHE_HOME/luod/qemu/VERSION/qemu-system-x86_64
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import debsource
from .accel import QEMU
from .errors import BuildFailed, LabUnavailable
from .images import cache_root
from .progress import PlainReporter, Reporter

SUITES = "trixie trixie-backports"
PACKAGE = "qemu-system-x86"
VERSION = re.compile(r"version (\d+(?:\.\d+)+)")
LOADER = "usr/lib64/ld-linux-x86-64.so.2"
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio", "usr/lib")


@dataclass(frozen=True, order=True)
class Qemu:
    """A QEMU that can be run here; `numbers` sorts versions."""

    numbers: tuple[int, ...]
    version: str
    binary: Path


def qemu_directory() -> Path:
    """Return where fetched versions are."""
    return cache_root() / "qemu"


def read_qemu(binary: Path) -> Qemu:
    """Ask a binary for its version. Raises `LabUnavailable` when it does not run or is no QEMU."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabUnavailable(f"{binary} does not run: {error}", hint="fetch it again") from error
    found = VERSION.search(said.stdout)
    if said.returncode or found is None:
        words = (said.stderr or said.stdout).strip()[-300:]
        raise LabUnavailable(f"{binary} does not say its version: {words}", hint="fetch it again")
    return Qemu(tuple(int(part) for part in found[1].split(".")), found[1], binary)


def available_qemus() -> list[Qemu]:
    """Return the installed QEMU and the fetched ones, oldest version first; one of each version."""
    found = {one.version: one for one in map(read_qemu, sorted(qemu_directory().glob(f"*/{QEMU}")))}
    installed = shutil.which(QEMU)
    if installed is not None:
        one = read_qemu(Path(installed))
        found[one.version] = one
    return sorted(found.values())


def fetch_qemu(*, suites: str = SUITES, reporter: Reporter | None = None) -> Qemu:
    """Fetch the newest QEMU of Debian suites (names apart by spaces; later ones may need the earlier ones), unless it is here already.

    Raises `LabUnavailable` when the suites cannot be had or have none, and `BuildFailed` when it cannot be fetched or does not run.
    """
    say = reporter or PlainReporter()
    directory = qemu_directory()
    directory.mkdir(parents=True, exist_ok=True)
    empty = directory / "no-packages"
    empty.write_text("", encoding="ascii")
    config = debsource.private_lists(directory, suites, status=empty)
    wanted = suites.split()[-1]
    version = debsource.candidate(PACKAGE, config, suite=wanted)
    if not version:
        raise LabUnavailable(f"{wanted} has no {PACKAGE}", hint="name other suites with --suites")
    short = re.split(r"[+~-]", version.partition(":")[2] or version)[0]
    place = directory / short
    binary = place / QEMU
    if not binary.exists():
        say.stage("fetch", f"{PACKAGE} {version} from {wanted}, with all that it needs")
        _unpack(PACKAGE, wanted, config, place, say)
    return read_qemu(binary)


def _unpack(package: str, suite: str, config: Path, place: Path, say: Reporter) -> None:
    """Fetch a package with all that it depends on and unpack it; the place appears only when it is whole."""
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=place.parent) as work:
        files = debsource.closure(package, suite, config, Path(work) / "packages")
        root = Path(work) / "whole" / "root"
        root.mkdir(parents=True)
        for number, file in enumerate(files, 1):
            say.advance(number / len(files), file.name)
            done = subprocess.run(
                ["dpkg-deb", "--extract", file, root], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise BuildFailed(f"cannot unpack {file.name}: {done.stderr.strip()}", hint="try again")
        if not (root / LOADER).exists():
            raise BuildFailed(f"{package} came without its dynamic loader", hint="fetch it on x86-64")
        final = place / "root"
        script = root.parent / QEMU
        script.write_text(_script(final), encoding="utf-8")
        script.chmod(0o755)
        if place.exists():
            shutil.rmtree(place)
        os.rename(root.parent, place)


def _script(root: Path) -> str:
    libraries = ":".join(str(root / each) for each in LIBRARIES)
    words = [str(root / LOADER), "--library-path", libraries, str(root / "usr/bin" / QEMU)]
    data = [f"-L {shlex.quote(str(root / each))}" for each in ("usr/share/qemu", "usr/share/seabios")]
    head = "#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n"
    return f'{head}exec {shlex.join(words)} {" ".join(data)} "$@"\n'
