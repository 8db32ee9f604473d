# SPDX-License-Identifier: Apache-2.0
"""Finding the kernel images that the lab boots.

Images are files named `bzImage-VERSION`. They are looked for in `$LUOD_LAB_KERNELS` when it is set (and then only there), else in
`$XDG_CACHE_HOME/luod/kernels`, where `luoctl lab build-kernel` puts them. The version that counts is the one in the image's own boot
header (Documentation/arch/x86/boot.rst, fields `header` at 0x202 and `kernel_version` at 0x20e), not the one in the file name.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from .errors import BadImage, NoSuchKernel

KERNELS_VARIABLE = "LUOD_LAB_KERNELS"
BUILD_HINT = f"run `luoctl lab build-kernel`, or point {KERNELS_VARIABLE} at a directory with files named bzImage-VERSION"


@dataclass(frozen=True, slots=True, order=True)
class KernelImage:
    """A bootable image: `numbers` sorts versions, `release` is what `uname -r` says once it runs."""

    numbers: tuple[int, ...]
    version: str
    release: str
    path: Path


def cache_root() -> Path:
    """Return the directory for everything the lab keeps between runs: `$XDG_CACHE_HOME/luod`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "luod"


def kernels_directory() -> Path:
    """Return the directory that images are taken from."""
    named = os.environ.get(KERNELS_VARIABLE, "")
    return Path(named) if named else cache_root() / "kernels"


def read_image(path: Path) -> KernelImage:
    """Read the version out of a bzImage's boot header.

    Raises `NoSuchKernel` when there is no such file and `BadImage` when it is not an x86 boot image.
    """
    try:
        with path.open("rb") as file:
            head = file.read(0x10000)
    except OSError as error:
        raise NoSuchKernel(f"cannot read kernel image {path}: {error.strerror}", hint=BUILD_HINT) from error
    if len(head) < 0x210 or head[0x202:0x206] != b"HdrS":
        raise BadImage(f"{path} is not an x86 Linux boot image (no HdrS header)", hint="give a bzImage")
    (pointer,) = struct.unpack_from("<H", head, 0x20E)
    start = pointer + 0x200
    text = head[start : start + 256].split(b"\0", 1)[0].decode("ascii", "replace") if pointer else ""
    match = re.match(r"(\d+(?:\.\d+)+)\S*", text)
    if match is None:
        raise BadImage(f"the boot header of {path} carries no kernel version", hint="give a bzImage")
    version = match.group(1)
    return KernelImage(tuple(int(n) for n in version.split(".")), version, match.group(0), path.resolve())


def available(directory: Path | None = None) -> list[KernelImage]:
    """Return the images of a directory (default: the one that is searched), oldest version first.

    A file of the right name that is no boot image is left out here; naming it explicitly says what is wrong with it.
    """
    found: list[KernelImage] = []
    for path in sorted((directory or kernels_directory()).glob("bzImage-*")):
        try:
            found.append(read_image(path))
        except (BadImage, NoSuchKernel):
            continue
    return sorted(found)


def find_image(wanted: str | Path | None = None, *, directory: Path | None = None) -> KernelImage:
    """Find one image: by path, by version or version prefix ("7.3" finds 7.3.4), or the newest when nothing is wanted.

    Raises `NoSuchKernel`, naming what there is.
    """
    if isinstance(wanted, Path) or (wanted is not None and ("/" in wanted or not wanted[:1].isdigit())):
        return read_image(Path(wanted))
    where = directory or kernels_directory()
    images = available(where)
    numbers = tuple(int(n) for n in wanted.split(".") if n.isdigit()) if wanted else ()
    matching = [image for image in images if image.numbers[: len(numbers)] == numbers]
    if not matching:
        what = f"no kernel image {wanted or ''}".rstrip()
        have = ", ".join(image.version for image in images) or "nothing"
        raise NoSuchKernel(f"{what} in {where} (found: {have})", hint=BUILD_HINT)
    return matching[-1]


def choose_pair(
    kernel: str | Path | None = None, next_kernel: str | Path | None = None
) -> tuple[KernelImage, KernelImage]:
    """Choose the kernel to start from and the one to update to.

    Without a wish the pair is the oldest and the newest image there is: the update worth showing. With one image only, it is updated
    to itself. Raises `NoSuchKernel`.
    """
    newest = find_image(next_kernel)
    if kernel is not None:
        return find_image(kernel), newest
    images = available()
    return (images[0] if images else newest), newest
