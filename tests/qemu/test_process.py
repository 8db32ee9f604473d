# SPDX-License-Identifier: Apache-2.0
"""Processes that are, or are not, the QEMU that was meant; with other programs in its place."""

from __future__ import annotations

import mmap
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luod.adapters import memfd
from luod.adapters.qemu.errors import LaunchFailed, NotThatQemu, RamMismatch
from luod.adapters.qemu.process import Identity, QemuProcess, identity

PATIENCE_S = 30.0


@pytest.fixture
def sleeper(socket_path: Path) -> Iterator[QemuProcess]:
    with QemuProcess.spawn(["sleep", "600"], socket_path) as process:
        yield process


def test_a_process_is_known_by_pid_and_start(sleeper: QemuProcess, socket_path: Path) -> None:
    with QemuProcess.adopt(sleeper.identity, socket_path) as adopted:
        assert adopted.alive()
    assert sleeper.alive()  # letting go of what was adopted ends nothing
    reused = Identity(sleeper.pid, sleeper.identity.started - 1)
    with pytest.raises(NotThatQemu, match="was used again"):
        QemuProcess.adopt(reused, socket_path)
    sleeper.kill()
    with pytest.raises(NotThatQemu, match="no process"):
        QemuProcess.adopt(sleeper.identity, socket_path)


def test_an_adopted_process_is_seen_to_end(sleeper: QemuProcess, socket_path: Path) -> None:
    with QemuProcess.adopt(sleeper.identity, socket_path) as adopted:
        sleeper.kill()
        assert adopted.wait(PATIENCE_S)
        assert "has ended" in adopted.obituary()


def test_release_ends_nothing(sleeper: QemuProcess, socket_path: Path) -> None:
    other = QemuProcess.spawn(["sleep", "600"], socket_path)
    pid = other.pid
    other.release()
    with QemuProcess.adopt(identity(pid), socket_path) as adopted:
        adopted.kill()
        os.waitpid(pid, 0)


def test_last_words_are_kept_even_for_who_comes_later(socket_path: Path) -> None:
    program = "import os, sys; sys.stderr.write('x' * 9000 + 'out of luck'); sys.stderr.flush(); os.read(0, 1); os.abort()"
    with QemuProcess.spawn([sys.executable, "-c", program], socket_path) as process:
        assert process.wait(PATIENCE_S)
        assert process.obituary().endswith("xout of luck")
        assert f"process {process.pid} was ended by SIGABRT: xxx" in process.obituary()
        assert len(process.stderr_tail()) == 4096
    ready, ready_end = os.pipe()
    program = f"import os, signal; os.write(2, b'first'); os.write({ready_end}, b'.'); signal.pause()"
    with (
        QemuProcess.spawn([sys.executable, "-c", program], socket_path, pass_fds=(ready_end,)) as process,
        QemuProcess.adopt(process.identity, socket_path) as adopted,
    ):
        os.read(ready, 1)
        process.kill()
        assert "first" in adopted.obituary()
    os.close(ready)
    os.close(ready_end)


def test_what_is_no_program_cannot_be_started(socket_path: Path) -> None:
    with pytest.raises(LaunchFailed, match="cannot start /nonexistent/qemu") as caught:
        QemuProcess.spawn(["/nonexistent/qemu"], socket_path)
    assert caught.value.errno == "ENOENT"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("can't open backing store /proc/self/fd/9 for guest RAM: No such file or directory", RamMismatch),
        ("Could not open 'disk.img': No such file or directory", LaunchFailed),
    ],
)
def test_a_start_that_fails_says_why(words: str, error: type[Exception], socket_path: Path) -> None:
    program = f'echo "{words}" >&2; exit 1'
    with (
        QemuProcess.spawn(["sh", "-c", program], socket_path) as process,
        pytest.raises(error, match=words.split(":")[0]),
    ):
        process.connect(timeout_s=PATIENCE_S)


def test_another_process_behind_the_socket_is_refused(sleeper: QemuProcess, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        listener.listen()
        with pytest.raises(
            NotThatQemu, match=f"is served by process {os.getpid()}, not by QEMU {sleeper.pid}"
        ):
            sleeper.connect(timeout_s=PATIENCE_S)


def test_a_socket_left_over_is_out_of_the_way(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
    with QemuProcess.spawn(["sleep", "600"], socket_path):
        assert not socket_path.exists()


MAPPER = """
import mmap, os, sys
fd, kind = int(sys.argv[1]), sys.argv[2]
flags = mmap.MAP_PRIVATE if kind == "private" else mmap.MAP_SHARED
prot = mmap.PROT_READ if kind == "read-only" else mmap.PROT_READ | mmap.PROT_WRITE
view = mmap.mmap(fd, 4096, flags, prot)
os.write(2, b"mapped")
import signal; signal.pause()
"""


@pytest.mark.parametrize(("kind", "right"), [("shared", True), ("private", False), ("read-only", False)])
def test_memory_is_recognised_by_inode_and_must_be_shared(kind: str, right: bool, socket_path: Path) -> None:
    fd, other = memfd.create("", mmap.PAGESIZE), memfd.create("", mmap.PAGESIZE)
    ready, ready_end = os.pipe()
    try:
        argv = [sys.executable, "-c", MAPPER.replace("os.write(2", f"os.write({ready_end}"), str(fd), kind]
        with QemuProcess.spawn(argv, socket_path, pass_fds=(fd, ready_end)) as process:
            os.close(ready_end)
            assert os.read(ready, 16) == b"mapped"
            assert process.maps_shared(fd) is right
            assert not process.maps_shared(other)
            if right:
                process.require_mapped([fd])
            with pytest.raises(RamMismatch, match="share=on"):
                process.require_mapped([fd, other])
            facts = os.fstat(fd)
            found = process.find_descriptor(facts.st_ino, facts.st_dev, os.O_RDWR)
            assert found is not None
            assert os.fstat(found).st_ino == facts.st_ino
            os.close(found)
            assert process.find_descriptor(os.fstat(other).st_ino, facts.st_dev, os.O_RDWR) is None
    finally:
        for each in (fd, other, ready):
            os.close(each)
