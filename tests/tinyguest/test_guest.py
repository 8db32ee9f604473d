# SPDX-License-Identifier: Apache-2.0
"""The guest itself: the image is what the source says, and on real QEMU it counts and notices a single wrong word."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from luod.adapters import memfd
from luod.tinyguest import image
from luod.tinyguest.assemble import HERE, AssemblyFailed, assemble, module
from luod.tinyguest.serial import SerialLog

needs_gcc = pytest.mark.skipif(
    shutil.which("gcc") is None or platform.machine() != "x86_64", reason="needs gcc for x86"
)


@needs_gcc
def test_the_image_is_what_the_source_says() -> None:
    assert assemble() == image.IMAGE, "run `python -m luod.tinyguest.assemble`"
    assert module(image.IMAGE) == (HERE / "image.py").read_text()


@needs_gcc
def test_another_source_is_another_image(tmp_path: Path) -> None:
    source = tmp_path / "guest.S"
    source.write_text((HERE / "guest.S").read_text().replace("inc     dword ptr [bad]", "nop"))
    assert assemble(source) != image.IMAGE
    source.write_text("nonsense\n")
    with pytest.raises(AssemblyFailed, match="nonsense"):
        assemble(source)


def test_qemu_takes_it_for_a_multiboot_kernel() -> None:
    magic, flags, checksum = (int.from_bytes(image.IMAGE[at : at + 4], "little") for at in (0, 4, 8))
    assert magic == 0x1BADB002
    assert (magic + flags + checksum) % (1 << 32) == 0
    assert len(image.IMAGE) <= 2048


@contextlib.contextmanager
def guest(tmp_path: Path, words: str, *more: str, fds: tuple[int, ...] = ()) -> Iterator[int]:
    """Run the guest in QEMU; give the fd that its serial port comes out of."""
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio",
        "-kernel", str(image.write(tmp_path / "guest.bin")), "-append", words, *more,
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=fds) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.fileno()
        finally:
            process.kill()


def until(log: SerialLog, fd: int, tick: int) -> None:
    while log.last < tick:
        data = os.read(fd, 65536)
        assert data, log
        log.feed(data)


@pytest.mark.lab
@pytest.mark.parametrize(("machine", "mib"), [("q35", 16), ("pc", 64)])
def test_it_counts_and_finds_its_memory_whole(machine: str, mib: int, tmp_path: Path) -> None:
    log = SerialLog(4000000000)
    with guest(tmp_path, "seed=4000000000 hz=200 chunk=4096", "-machine", machine, "-m", f"{mib}M") as serial:
        until(log, serial, 2 * mib // 4 + 2)
    assert log.findings == []
    assert (log.boots, log.first) == (1, 1)
    assert log.passes >= 2
    assert (mib - 1) * 1024 < log.memory_kib <= mib * 1024


@pytest.mark.lab
def test_its_speed_is_a_word_of_its_command_line(tmp_path: Path) -> None:
    for words, said in (
        ("", b"seed 1 memory 16256 hz 10 chunk 256"),
        ("hz=3 seed=5", b"seed 5 memory 16256 hz 3"),
    ):
        with guest(tmp_path, words, "-m", "16M") as serial, os.fdopen(os.dup(serial), "rb") as lines:
            assert said in lines.readline()
            assert lines.readline().startswith(b"tick 1 ")


@pytest.mark.lab
def test_one_wrong_bit_anywhere_is_seen_once(tmp_path: Path) -> None:
    """In the first and in the last page that it owns."""
    size = 16 << 20
    log = SerialLog(9)
    ram = memfd.create("ram", size)
    try:
        backend = f"memory-backend-file,id=ram0,size=16M,mem-path=/proc/self/fd/{ram},share=on"
        arguments = ("-object", backend, "-machine", "q35,memory-backend=ram0", "-m", "16M")
        with guest(tmp_path, "seed=9 hz=200 chunk=1024", *arguments, fds=(ram,)) as serial:
            until(log, serial, 1)
            assert log.findings == []
            for wrong, place in enumerate((0x110000, log.memory_kib * 1024 - 4), 1):
                os.pwrite(ram, bytes([os.pread(ram, 1, place)[0] ^ 0x10]), place)
                until(log, serial, log.last + 40)
                assert log.bad == wrong
    finally:
        os.close(ram)
    assert len(log.findings) == 2
