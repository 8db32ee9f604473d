# SPDX-License-Identifier: Apache-2.0
"""Assemble `guest.S` into the image that `image.py` carries: `python -m luod.tinyguest.assemble` writes that file anew.

Needs gcc and GNU ld that make 32-bit x86 code; nothing that uses the guest does.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from ..states.errors import LuodError

HERE = Path(__file__).parent
SOURCE = HERE / "guest.S"
ORIGIN = 0x100000
"""Where the image is loaded: the first MiB belongs to the firmware."""

_MODULE = '''\
# SPDX-License-Identifier: Apache-2.0
"""The assembled tiny guest, for hosts without an assembler. Written by `python -m luod.tinyguest.assemble`."""

from __future__ import annotations

from pathlib import Path

IMAGE = bytes.fromhex(
    """
{lines}
"""
)
"""A flat multiboot kernel for `qemu-system-x86_64 -kernel`; `guest.S` says what it does."""


def write(path: Path) -> Path:
    """Write the image to a file and return its path."""
    path.write_bytes(IMAGE)
    return path
'''


class AssemblyFailed(LuodError):
    """The assembler or the linker is missing or refuses the source."""


def assemble(source: Path = SOURCE) -> bytes:
    """Return the image that `source` makes. Raises `AssemblyFailed` with what the tools said."""
    with tempfile.TemporaryDirectory(prefix="tinyguest-") as directory:
        unlinked, image = Path(directory, "guest.o"), Path(directory, "guest.bin")
        for command in (
            ["gcc", "-m32", "-c", str(source), "-o", str(unlinked)],
            ["ld", "-m", "elf_i386", "-e", "start", f"-Ttext={ORIGIN:#x}", "--oformat", "binary", "-o", str(image),
             str(unlinked)],
        ):  # fmt: skip
            try:
                subprocess.run(command, capture_output=True, text=True, check=True)
            except FileNotFoundError:
                raise AssemblyFailed(
                    f"{command[0]} is not installed", hint="install gcc and binutils"
                ) from None
            except subprocess.CalledProcessError as error:
                raise AssemblyFailed(f"{' '.join(command)}: {error.stderr.strip()}") from None
        return image.read_bytes()


def module(image: bytes) -> str:
    """Return the text of `image.py` for an image."""
    digits = image.hex()
    lines = "\n".join(f"    {digits[at : at + 96]}" for at in range(0, len(digits), 96))
    return _MODULE.format(lines=lines)


def main() -> None:
    """Write `image.py` anew."""
    (HERE / "image.py").write_text(module(assemble()))


if __name__ == "__main__":
    main()
