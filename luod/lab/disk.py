# SPDX-License-Identifier: Apache-2.0
"""The state disk: an ext4 image that survives kexec and cold boots, made and read without root by e2fsprogs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .errors import LabError, LabUnavailable


def find_tool(name: str, package: str) -> str:
    """Return the path of a program, looking in the system directories too, which are not on every user's path.

    Raises `LabUnavailable`, naming the package to install.
    """
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if found is None:
        raise LabUnavailable(f"{name} is not installed", hint=f"apt-get install {package}")
    return found


def make_state_disk(image: Path, content: Path, size_mib: int) -> None:
    """Make an ext4 image holding a copy of a directory. Raises `LabError` when mke2fs fails."""
    command = [
        find_tool("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0,lazy_itable_init=1",
        "-d", str(content), str(image), f"{size_mib}M",
    ]  # fmt: skip
    _checked(command, f"cannot make the state disk {image}", "check the free space there")


def read_state_disk(image: Path, target: Path) -> None:
    """Copy everything on a state disk into a directory.

    The image is not changed: a copy of it gets its journal replayed first, since after a power cut the newest writes are only there.
    """
    fsck, debugfs = find_tool("e2fsck", "e2fsprogs"), find_tool("debugfs", "e2fsprogs")
    target.mkdir(parents=True, exist_ok=True)
    copy = image.with_name(f"{image.name}.copy")
    try:
        _checked(
            ["cp", "--sparse=always", str(image), str(copy)],
            f"cannot copy {image}",
            "check the free space there",
        )
        replayed = subprocess.run(
            [fsck, "-p", "-E", "journal_only", str(copy)], capture_output=True, text=True, check=False
        )
        if replayed.returncode > 1:
            raise LabError(
                f"the file system on {image} is damaged: {replayed.stdout.strip()}",
                hint=f"run e2fsck on a copy of {image}",
            )
        # Owners cannot be set without root, and debugfs says so for each file on stderr; the content is what is wanted.
        _checked(
            [debugfs, "-R", f'rdump / "{target}"', str(copy)],
            f"cannot read {image}",
            "the image may be cut short",
        )
    finally:
        copy.unlink(missing_ok=True)


def _checked(command: list[str], failure: str, hint: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{failure}: {done.stderr.strip() or done.returncode}", hint=hint)
