# SPDX-License-Identifier: Apache-2.0
"""The kernel's own C headers, of a version that knows what luod speaks: Debian's package `linux-libc-dev`, unpacked, not installed.

A release's own headers are as old as its kernel. `Headers` of a given version stay in the cache, beside the kernel images.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import debsource
from .errors import BuildFailed, LabUnavailable
from .images import cache_root

PACKAGE = "linux-libc-dev"
MULTIARCH = "x86_64-linux-gnu"


def fetch(minimum: Sequence[int], *, suite: str = debsource.DEFAULT_SUITE, root: Path | None = None) -> Path:
    """Return a directory with headers of the kernel `minimum` (such as (7, 3)) or a newer one; it is fetched once.

    Raises `LabUnavailable` when Debian's archive cannot be reached or has only older ones, `BuildFailed` when the package is damaged.
    """
    place = (root or cache_root()) / "headers"
    tree = place / ".".join(map(str, minimum))
    if tree.is_dir():
        return tree
    work = place / "work"
    version, config = debsource.locate(PACKAGE, work, suite)
    numbers = tuple(int(part) for part in version.split("-")[0].split(".") if part.isdigit())
    if numbers < tuple(minimum):
        raise LabUnavailable(
            f"the {PACKAGE} of {suite} is {version}, too old",
            hint="name a newer suite",
        )
    package = debsource.download(PACKAGE, version, work / "fetch", config)
    unpacked = work / "tree"
    shutil.rmtree(unpacked, ignore_errors=True)
    done = subprocess.run(["dpkg", "-x", package, unpacked], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildFailed(
            f"cannot unpack {package}: {done.stderr.strip()}", hint=f"delete {work} and try again"
        )
    unpacked.rename(tree)
    shutil.rmtree(work, ignore_errors=True)
    return tree


def include_options(tree: Path) -> list[str]:
    """Return the compiler options that put these headers before the machine's own."""
    include = tree / "usr" / "include"
    return ["-isystem", str(include / MULTIARCH), "-isystem", str(include)]
