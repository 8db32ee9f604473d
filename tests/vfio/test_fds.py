# SPDX-License-Identifier: Apache-2.0
"""Descriptors by name, here and in a real keeper: what outlives a process and what does not, and who closes what."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luod.adapters.emulator.process import Emulator
from luod.adapters.keeper.client import Keeper
from luod.devices.fds import HeldFds


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    kernel, run = tmp_path / "kernel", tmp_path / "run"
    for directory in (kernel, run):
        directory.mkdir()
    with Emulator.start(kernel):
        ready, told = os.pipe()
        command = [
            sys.executable,
            "-m",
            "luod.adapters.keeper",
            "--dir",
            run,
            "--kernel",
            "emulated",
            "--emulator",
            kernel,
        ]
        process = subprocess.Popen([*command, "--ready-fd", str(told)], pass_fds=(told,))
        os.close(told)
        with open(ready, "rb") as pipe:
            assert pipe.read(1)
        yield Keeper(run)
        process.kill()
        process.wait()


def file(text: str) -> int:
    fd = os.memfd_create(text)
    os.write(fd, text.encode())
    return fd


def text(fd: int | None) -> str:
    assert fd is not None
    return os.pread(fd, 100, 0).decode()


def test_what_is_lasting_outlives_its_process(keeper: Keeper) -> None:
    before = HeldFds("vm1", keeper)
    before.keep("0x20", file("iommufd"), lasting=True)
    before.keep("0x10", file("memory"))
    before.close()
    after = HeldFds("vm1", keeper)
    assert after.own("0x20") is None
    assert text(after.find("0x20")) == "iommufd"
    assert after.find("0x10") is None
    assert after.names() == ["0x20"]
    after.close()


def test_guests_that_share_a_keeper_do_not_see_each_other(keeper: Keeper) -> None:
    one, other = HeldFds("vm1", keeper), HeldFds("vm2", keeper)
    one.keep("0x20", file("of vm1"), lasting=True)
    assert other.find("0x20") is None
    other.keep("0x20", file("of vm2"), lasting=True)
    other.forget("0x20")
    assert text(one.find("0x20")) == "of vm1"
    assert keeper.names() == ["vm1/0x20"]
    one.close()


def test_a_new_one_takes_the_place_of_the_old_one_here_and_there(keeper: Keeper) -> None:
    held = HeldFds("vm1", keeper)
    first = held.keep("0x20", file("first"), lasting=True)
    held.keep("0x20", file("second"), lasting=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
    held.close()
    assert text(held.find("0x20")) == "second"
    assert keeper.names() == ["vm1/0x20"]
    held.close()


def test_what_is_forgotten_is_held_by_nobody(keeper: Keeper) -> None:
    held = HeldFds("vm1", keeper)
    fd = held.keep("0x30", file("device"), lasting=True)
    held.forget("0x30")
    held.forget("0x30")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert held.find("0x30") is None
    assert keeper.names() == []


def test_an_fd_that_cannot_be_made_to_last_is_not_kept(tmp_path: Path) -> None:
    held = HeldFds("vm1", Keeper(tmp_path))
    fd = file("lost")
    with pytest.raises(Exception, match="does not answer"):
        held.keep("0x20", fd, lasting=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert held.own("0x20") is None
